// Quantization for the bindings: run on all threads.
#pragma once

#include "../core/isa.h"
#include "params.h"

namespace pdn {
namespace quantize {

// The kernels of one ISA level.
const KernelSet& kernel_set(Isa isa);

// False if scratch memory is exhausted.
bool run(Isa isa, const QuantizeParams& p);
void run(Isa isa, const DequantizeParams& p);

}  // namespace quantize
}  // namespace pdn
