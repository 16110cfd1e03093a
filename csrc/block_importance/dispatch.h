// Attention mass of blocks of keys for the bindings: run on all threads.
#pragma once

#include "../core/isa.h"
#include "params.h"

namespace pdn {
namespace block_importance {

// The kernels of one ISA level.
const KernelSet& kernel_set(Isa isa);

// False if scratch memory is exhausted. Sizes are at least 1.
bool run(Isa isa, const ImportanceParams& p);

}  // namespace block_importance
}  // namespace pdn
