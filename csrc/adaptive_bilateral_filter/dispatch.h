// The filter and its gradients for the bindings: radii, blocks, all threads.
#pragma once

#include "../core/isa.h"
#include "params.h"

namespace pdn {
namespace adaptive_bilateral_filter {

// The kernels of one ISA level.
const KernelSet& kernel_set(Isa isa);

// False if scratch memory is exhausted. `forward` writes p.output and p.norm, `backward` p.dinput and p.dsigma.
bool forward(Isa isa, const Params& p);
bool backward(Isa isa, const Params& p);

}  // namespace adaptive_bilateral_filter
}  // namespace pdn
