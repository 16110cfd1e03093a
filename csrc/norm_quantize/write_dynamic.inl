// What group norm and layer norm share. Included once per ISA level.
#pragma once

#include "../core/quantize.inl"
#include "params.h"

namespace pdn {
namespace norm_quantize {
namespace {

PDN_INLINE vf magnitude(vf v) { return (vf)((vi)v & 0x7fffffff); }

// `V` rows of values under scales of their own.
template <int V>
PDN_INLINE void write_dynamic(const float* values, int64_t channels, const Range* ranges, bool safe,
                              const CodesOut& out, int64_t row) {
    Codes codes[V];
    vf inverse[V];
    for (int i = 0; i < V; ++i) {
        codes[i] = codes_of(ranges[i], false);
        inverse[i] = splat(1.f / codes[i].scale);
        out.out_scale[row + i] = codes[i].scale;
        out.out_zero_point[row + i] = codes[i].zero_point;
    }
    int8_t* y = out.codes + row * channels;
    each_vector(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        vi q[V];
        for (int i = 0; i < V; ++i) {
            const vf v = load_lanes(values + i * channels + c, lanes);
            q[i] = safe ? round_even(v * inverse[i]) + codes[i].zero_point : exact_codes(v, codes[i]);
        }
        for (int i = 0; i < V; ++i) store_codes(y + i * channels + c, q[i], -128, lanes);
    });
}

}  // namespace
}  // namespace norm_quantize
}  // namespace pdn
