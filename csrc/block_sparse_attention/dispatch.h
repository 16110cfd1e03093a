// Gradients of attention over listed blocks for the bindings: run on all threads.
#pragma once

#include "../core/isa.h"
#include "params.h"

namespace pdn {
namespace block_sparse_attention {

// The kernels of one ISA level.
const KernelSet& kernel_set(Isa isa);

// False if scratch memory is exhausted. There may be no batches or no queries.
bool run(Isa isa, const BackwardParams& p);

}  // namespace block_sparse_attention
}  // namespace pdn
