// Compiled once per ISA level: PDN_ISA names the level, and the one exported symbol carries the name.
#include "kernel.inl"
#include "params.h"

#define PDN_JOIN2(a, b) a##b
#define PDN_JOIN(a, b) PDN_JOIN2(a, b)

namespace pdn {
namespace attention {

extern const KernelSet PDN_JOIN(kernels_, PDN_ISA);
const KernelSet PDN_JOIN(kernels_, PDN_ISA) = {kWidth, scratch_bytes, attend, code_bytes, average_keys, encode_keys};

}  // namespace attention
}  // namespace pdn
