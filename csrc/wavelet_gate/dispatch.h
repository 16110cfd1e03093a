// Gated wavelets for the bindings: run on all threads.
#pragma once

#include "../core/isa.h"
#include "params.h"

namespace pdn {
namespace wavelet_gate {

// The kernels of one ISA level.
const KernelSet& kernel_set(Isa isa);

// Each is false if scratch memory is exhausted.
bool forward(Isa isa, Params p);
bool backward(Isa isa, Params p);
bool pool(Isa isa, PoolParams p);

}  // namespace wavelet_gate
}  // namespace pdn
