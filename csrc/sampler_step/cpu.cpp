// Compiled once per ISA level: PDN_ISA names the level, and the one exported symbol carries the name.
#include "kernel.inl"
#include "params.h"

#define PDN_JOIN2(a, b) a##b
#define PDN_JOIN(a, b) PDN_JOIN2(a, b)

namespace pdn {
namespace sampler_step {

extern const KernelSet PDN_JOIN(kernels_, PDN_ISA);
const KernelSet PDN_JOIN(kernels_, PDN_ISA) = {kWidth, chunk};

}  // namespace sampler_step
}  // namespace pdn
