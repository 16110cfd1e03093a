// Compiled once per ISA level: PDN_ISA names the level, and the one exported symbol carries the name.
#include "kernel.inl"
#include "params.h"

#define PDN_JOIN2(a, b) a##b
#define PDN_JOIN(a, b) PDN_JOIN2(a, b)

namespace pdn {
namespace block_sparse_attention {

extern const KernelSet PDN_JOIN(kernels_, PDN_ISA);
const KernelSet PDN_JOIN(kernels_, PDN_ISA) = {workspace_bytes, scratch_bytes, begin_keys, begin_queries,
                                               accumulate,      end_keys,      end_queries};

}  // namespace block_sparse_attention
}  // namespace pdn
