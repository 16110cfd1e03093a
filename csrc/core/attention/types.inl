// From a dtype to the types of the kernels' templates. Included once per ISA level.
#pragma once

#include "rows.inl"

namespace pdn {
namespace attention {
namespace {

// Whether tokens of this dtype are multiplied in pairs of elements.
PDN_INLINE bool uses_pairs([[maybe_unused]] DType dtype) {
#if defined(__AVX512BF16__)
    return dtype == DType::bfloat16;
#else
    return false;
#endif
}

// body.operator()<Cells, T>(): what a cell is, and an element in memory.
template <class Body>
PDN_INLINE void with_types(DType dtype, const Body& body) {
    if (dtype == DType::float32) return body.template operator()<Floats, float>();
    if (dtype == DType::float16) return body.template operator()<Floats, fp16>();
#if defined(__AVX512BF16__)
    body.template operator()<Bf16Pairs, bf16>();
#else
    body.template operator()<Floats, bf16>();
#endif
}

}  // namespace
}  // namespace attention
}  // namespace pdn
