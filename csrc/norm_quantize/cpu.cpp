// Compiled once per ISA level: PDN_ISA names the level, and the one exported symbol carries the name.
#include "group_norm.inl"
#include "layer_norm.inl"
#include "params.h"

#define PDN_JOIN2(a, b) a##b
#define PDN_JOIN(a, b) PDN_JOIN2(a, b)

namespace pdn {
namespace norm_quantize {

extern const KernelSet PDN_JOIN(kernels_, PDN_ISA);
const KernelSet PDN_JOIN(kernels_, PDN_ISA) = {
    kWidth,     group_chunk, group_partial,      group_coefficients, group_scratch, group_statistics,
    group_fold, group_write, layer_coefficients, layer_scratch,      layer_fold,    layer_rows,
};

}  // namespace norm_quantize
}  // namespace pdn
