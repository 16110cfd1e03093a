// A mask added to scores. Included once per ISA level.
#pragma once

#include <cfloat>

#include "../core/attention/softmax.inl"
#include "params.h"

namespace pdn {
namespace attention {
namespace {

// `count` values of the mask as what is to be added to scores, which are logarithms to base 2.
PDN_INLINE void read_mask(const Mask& mask, int64_t at, int64_t count, float* values) {
    if (mask.boolean) {
        const uint8_t* keep = static_cast<const uint8_t*>(mask.data) + at;
        for (int64_t i = 0; i < count; ++i) values[i] = keep[i] ? 0.f : kNothing;
        return;
    }
    const float* bias = static_cast<const float*>(mask.data) + at;
    for (int64_t i = 0; i < count; ++i) {  // the smallest number, a common mask, must not become -inf
        const float scaled = bias[i] * kLog2E;
        values[i] = scaled < -FLT_MAX && bias[i] >= -FLT_MAX ? -FLT_MAX : scaled;
    }
}

// Adds to the scores [keys][step] of kWidth queries, of which `live` are there, what the mask holds for them; returns
// the largest of each query.
PDN_INLINE vf add_mask(const Mask& mask, int64_t image, int64_t head, int64_t query, int64_t live, int64_t first,
                       int64_t keys, float* scores, int64_t step) {
    const int64_t at = image * mask.batch_stride + head * mask.head_stride + query * mask.query_stride + first;
    vf top = splat(kNothing);
    float values[kWidth];
    for (int64_t key = 0; key < keys; key += kWidth) {
        const int64_t n = keys - key < kWidth ? keys - key : kWidth;
        vf rows[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) {
            if (i == 0 || (i < live && mask.query_stride != 0))
                read_mask(mask, at + i * mask.query_stride + key, n, values);
            rows[i] = load_partial(values, static_cast<int>(n));
        }
        transpose(rows);
        for (int64_t i = 0; i < n; ++i) {
            float* row = scores + (key + i) * step;
            const vf score = load(row) + rows[i];
            store(row, score);
            top = larger(score, top);
        }
    }
    return top;
}

}  // namespace
}  // namespace attention
}  // namespace pdn
