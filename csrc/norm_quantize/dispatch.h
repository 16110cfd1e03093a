// Norm + activation + quantization for the bindings: run on all threads.
#pragma once

#include "../core/isa.h"
#include "params.h"

namespace pdn {
namespace norm_quantize {

// The kernels of one ISA level.
const KernelSet& kernel_set(Isa isa);

// False if scratch memory is exhausted.
bool run(Isa isa, const GroupNormParams& p);
bool run(Isa isa, const LayerNormParams& p);

}  // namespace norm_quantize
}  // namespace pdn
