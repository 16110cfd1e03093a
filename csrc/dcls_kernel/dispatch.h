// Construction of DCLS kernels for the bindings: run on all threads.
#pragma once

#include "../core/isa.h"
#include "params.h"

namespace pdn {
namespace dcls_kernel {

// The kernels of one ISA level.
const KernelSet& kernel_set(Isa isa);

// Write the kernel; false if scratch memory is exhausted.
bool forward(Isa isa, const Params& p);

// Write the gradients of weight, positions and widths; false if scratch memory is exhausted.
bool backward(Isa isa, const Params& p);

}  // namespace dcls_kernel
}  // namespace pdn
