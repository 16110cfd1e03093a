// Layer norm over rows: moments, then codes, while the row is in the cache. Included once per ISA level.
#pragma once

#include "../core/quantize.inl"
#include "params.h"

namespace pdn {
namespace norm_quantize {
namespace {

// Per FiLM vector: gain and offset of each channel, then one float, nonzero where they are divided by a given scale
// (which they are unless that leaves something infinite or NaN).
int64_t layer_stride(const LayerNormParams& p) { return (p.channels + kWidth - 1) / kWidth * kWidth; }
int64_t layer_coefficients(const LayerNormParams& p) { return 2 * layer_stride(p) + kWidth; }
int64_t layer_scratch(const LayerNormParams& p) {
    return p.out.scale ? 0 : p.channels * static_cast<int64_t>(sizeof(float));
}

PDN_INLINE bool layer_fold_over(const LayerNormParams& p, const float* film, float divisor, float* coefficients) {
    const int64_t size = layer_stride(p);
    vi bad{};
    each_vector(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        vf gain = p.weight ? load_lanes(p.weight + c, lanes) : splat(1.f);
        vf offset = p.bias ? load_lanes(p.bias + c, lanes) : vf{};
        if (film) {
            const vf scale = 1.f + load_lanes(film + c, lanes);
            gain = gain * scale;
            offset = offset * scale + load_lanes(film + p.channels + c, lanes);
        }
        const vf factor = (p.channel_scale ? load_lanes(p.channel_scale + c, lanes) : splat(1.f)) / divisor;
        gain = gain * factor;
        offset = offset * factor;
        bad |= ((gain - gain) != 0.f) | ((offset - offset) != 0.f);
        store_lanes(coefficients + c, gain, lanes);
        store_lanes(coefficients + size + c, offset, lanes);
    });
    return !any(bad);
}

void layer_fold(const LayerNormParams& p, int64_t index, float* coefficients) {
    const float* film = p.film ? p.film + index * 2 * p.channels : nullptr;
    float& folded = coefficients[2 * layer_stride(p)];
    folded = p.out.scale && layer_fold_over(p, film, *p.out.scale, coefficients) ? 1.f : 0.f;
    if (folded == 0.f) layer_fold_over(p, film, 1.f, coefficients);
}

struct Moments {
    float mean, rest;  // what the mean lost in rounding: the mean of the deviations from `mean`
    float rstd;
};

PDN_INLINE vf first_lanes(vf v, int n) {
    vi lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return select(lane < n, v, vf{});
}

template <class T>
PDN_INLINE Moments moments_of(const LayerNormParams& p, const T* x) {
    const int rest = static_cast<int>(p.channels % kWidth);
    const int64_t whole = p.channels - rest;
    const float count = static_cast<float>(p.channels);
    vf sum[4] = {};
    int64_t c = 0;
    for (; c + 4 * kWidth <= whole; c += 4 * kWidth)
        for (int i = 0; i < 4; ++i) sum[i] += load(x + c + i * kWidth);
    for (; c < whole; c += kWidth) sum[0] += load(x + c);
    if (rest > 0) sum[1] += load_partial(x + c, rest);
    const float mean = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])) / count;
    vf apart[4] = {}, square[4] = {};
    const auto add = [&](vf d, int i) __attribute__((always_inline)) {
        apart[i] += d;
        square[i] += d * d;
    };
    c = 0;
    for (; c + 4 * kWidth <= whole; c += 4 * kWidth)
        for (int i = 0; i < 4; ++i) add(load(x + c + i * kWidth) - mean, i);
    for (; c < whole; c += kWidth) add(load(x + c) - mean, 0);
    if (rest > 0) add(first_lanes(load_partial(x + c, rest) - mean, rest), 1);
    const float off = reduce_add((apart[0] + apart[1]) + (apart[2] + apart[3])) / count;
    const float squares = reduce_add((square[0] + square[1]) + (square[2] + square[3]));
    const double variance = static_cast<double>(squares) / static_cast<double>(count) - static_cast<double>(off) * off;
    const double positive = variance < 0 ? 0.0 : variance;
    return {mean, off, static_cast<float>(1.0 / __builtin_sqrt(positive + p.eps))};
}

template <class T, class Lanes>
PDN_INLINE vf normalised(const T* x, const Moments& m, const float* coefficients, int64_t size, Lanes lanes) {
    const vf centered = (load_lanes(x, lanes) - m.mean) - m.rest;
    return (centered * m.rstd) * load_lanes(coefficients, lanes) + load_lanes(coefficients + size, lanes);
}

template <class T>
void rows_typed(const LayerNormParams& p, int64_t begin, int64_t end, const float* all, float* values) {
    const int64_t size = layer_stride(p);
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(p.input) + row * p.row_stride;
        int8_t* y = p.out.codes + row * p.channels;
        const float* at = all + row / p.film_rows * layer_coefficients(p);
        const Moments m = moments_of(p, x);
        if (p.out.scale == nullptr) {
            Range range;
            each_vector(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
                const vf v = normalised(x + c, m, at + c, size, lanes);
                range.add(v);
                store_lanes(values + c, v, lanes);
            });
            const Codes codes = codes_of(range, false);
            p.out.out_scale[row] = codes.scale;
            p.out.out_zero_point[row] = codes.zero_point;
            each_vector(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
                quantize_lanes(y + c, load_lanes(values + c, lanes), codes, lanes);
            });
            continue;
        }
        const Codes codes = codes_of(*p.out.scale, p.out.zero_point);
        const bool finite = m.mean - m.mean == 0.f && m.rstd - m.rstd == 0.f;
        if (finite && at[2 * size] != 0.f) {
            each_vector(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
                store_codes(y + c, round_even(within_codes(normalised(x + c, m, at + c, size, lanes))) + codes.zero_point, codes.lowest, lanes);
            });
        } else {  // NaN and infinities: with care
            const float divisor = at[2 * size] != 0.f ? 1.f : codes.scale;
            const Codes careful = {divisor, codes.zero_point, codes.lowest};
            each_vector(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
                quantize_lanes(y + c, normalised(x + c, m, at + c, size, lanes), careful, lanes);
            });
        }
    }
}

void layer_rows(const LayerNormParams& p, int64_t begin, int64_t end, const float* coefficients, void* scratch) {
    float* values = static_cast<float*>(scratch);
    switch (p.dtype) {
        case DType::float32:
            return rows_typed<float>(p, begin, end, coefficients, values);
        case DType::bfloat16:
            return rows_typed<bf16>(p, begin, end, coefficients, values);
        case DType::float16:
            return rows_typed<fp16>(p, begin, end, coefficients, values);
    }
}

}  // namespace
}  // namespace norm_quantize
}  // namespace pdn
