// A mask added to scores. Included once per ISA level.
#pragma once

#include <cfloat>

#include "../core/attention/softmax.inl"
#include "params.h"

namespace pdn {
namespace attention {
namespace {

// Add row `query` of the mask to `count` scores from key `first` on.
PDN_INLINE void add_mask(const Mask& mask, int64_t image, int64_t head, int64_t query, int64_t first, int64_t count,
                         float* scores) {
    const int64_t at = image * mask.batch_stride + head * mask.head_stride + query * mask.query_stride + first;
    if (mask.boolean) {
        const uint8_t* keep = static_cast<const uint8_t*>(mask.data) + at;
        for (int64_t i = 0; i < count; ++i) scores[i] += keep[i] ? 0.f : kNothing;
        return;
    }
    const float* bias = static_cast<const float*>(mask.data) + at;
    for (int64_t i = 0; i < count; ++i) {  // the smallest number, a common mask, must not become -inf
        const float scaled = bias[i] * kLog2E;
        scores[i] += scaled < -FLT_MAX && bias[i] >= -FLT_MAX ? -FLT_MAX : scaled;
    }
}

}  // namespace
}  // namespace attention
}  // namespace pdn
