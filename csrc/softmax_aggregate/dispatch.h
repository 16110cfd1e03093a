// The weighted sum of feature maps for the bindings: run on all threads.
#pragma once

#include "../core/isa.h"
#include "params.h"

namespace pdn {
namespace softmax_aggregate {

// The kernels of one ISA level.
const KernelSet& kernel_set(Isa isa);

// False if scratch memory is exhausted.
bool run(Isa isa, Params p);
bool run(Isa isa, GradParams p);

}  // namespace softmax_aggregate
}  // namespace pdn
