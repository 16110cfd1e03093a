// Compiled once per ISA level: PDN_ISA names the level, and the one exported symbol carries the name.
#include "gradient.inl"
#include "params.h"
#include "stage.inl"

#define PDN_JOIN2(a, b) a##b
#define PDN_JOIN(a, b) PDN_JOIN2(a, b)

namespace pdn {
namespace ode_stage {

extern const KernelSet PDN_JOIN(kernels_, PDN_ISA);
const KernelSet PDN_JOIN(kernels_, PDN_ISA) = {
    kWidth, chunk_pixels, stage_partial, stage_coefficients, combine, fold, normalise, grad_sums, grad_fold, grad_write,
};

}  // namespace ode_stage
}  // namespace pdn
