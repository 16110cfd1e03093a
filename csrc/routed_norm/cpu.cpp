// Compiled once per ISA level: PDN_ISA names the level, and the one exported symbol carries the name.
#include "backward.inl"
#include "forward.inl"
#include "params.h"

#define PDN_JOIN2(a, b) a##b
#define PDN_JOIN(a, b) PDN_JOIN2(a, b)

namespace pdn {
namespace routed_norm {

extern const KernelSet PDN_JOIN(kernels_, PDN_ISA);
const KernelSet PDN_JOIN(kernels_, PDN_ISA) = {kWidth, forward, backward};

}  // namespace routed_norm
}  // namespace pdn
