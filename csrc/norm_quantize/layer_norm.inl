// Layer norm over rows: moments, then codes, while the row is in the cache. Included once per ISA level.
#pragma once

#include "write_dynamic.inl"

namespace pdn {
namespace norm_quantize {
namespace {

// Per FiLM vector: gain and offset of each channel, divided by a given scale, then one float, nonzero where rows of
// finite values stay within kSafeCode. Where they may not, it is 0 and nothing is divided.
int64_t layer_stride(const LayerNormParams& p) { return (p.channels + kWidth - 1) / kWidth * kWidth; }
int64_t layer_coefficients(const LayerNormParams& p) { return 2 * layer_stride(p) + kWidth; }
int64_t layer_scratch(const LayerNormParams& p) {
    return p.out.scale ? 0 : kTogether * p.channels * static_cast<int64_t>(sizeof(float));
}

PDN_INLINE bool layer_fold_over(const LayerNormParams& p, const float* film, float divisor, float* coefficients) {
    const int64_t size = layer_stride(p);
    // no value is further from the mean of n than sqrt(n) deviations
    const float furthest = static_cast<float>(__builtin_sqrt(static_cast<double>(p.channels)));
    vi safe = ~vi{};
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
        safe &= magnitude(gain) * furthest + magnitude(offset) < kSafeCode;  // false for NaN
        store_lanes(coefficients + c, gain, lanes);
        store_lanes(coefficients + size + c, offset, lanes);
    });
    return !any(~safe);
}

void layer_fold(const LayerNormParams& p, int64_t index, float* coefficients) {
    const float* film = p.film ? p.film + index * 2 * p.channels : nullptr;
    const float divisor = p.out.scale ? *p.out.scale : 1.f;
    const bool safe = layer_fold_over(p, film, divisor, coefficients);
    if (!safe && p.out.scale) layer_fold_over(p, film, 1.f, coefficients);
    coefficients[2 * layer_stride(p)] = safe ? 1.f : 0.f;
}

// (x - mean) * rstd + shift is normalised: `shift` makes up for the digits that the mean lost in rounding.
struct Moments {
    float mean, rstd, shift;
};

PDN_INLINE vf first_lanes(vf v, int n) {
    vi lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return select(lane < n, v, vf{});
}

// Of `V` rows.
template <class T, int V>
PDN_INLINE void find_moments(const T* x, int64_t stride, int64_t channels, double eps, Moments* m) {
    const int rest = static_cast<int>(channels % kWidth);
    const int64_t whole = channels - rest;
    const float share = 1.f / static_cast<float>(channels);
    vf sum[V] = {}, apart[V] = {}, square[V] = {};
    for (int64_t c = 0; c < whole; c += kWidth)
        for (int i = 0; i < V; ++i) sum[i] += load(x + i * stride + c);
    for (int i = 0; i < V && rest > 0; ++i) sum[i] += load_partial(x + i * stride + whole, rest);
    for (int i = 0; i < V; ++i) m[i].mean = reduce_add(sum[i]) * share;
    for (int64_t c = 0; c < whole; c += kWidth) {
        for (int i = 0; i < V; ++i) {
            const vf d = load(x + i * stride + c) - m[i].mean;
            apart[i] += d;
            square[i] += d * d;
        }
    }
    for (int i = 0; i < V && rest > 0; ++i) {
        const vf d = first_lanes(load_partial(x + i * stride + whole, rest) - m[i].mean, rest);
        apart[i] += d;
        square[i] += d * d;
    }
    for (int i = 0; i < V; ++i) {
        const float off = reduce_add(apart[i]) * share;
        const float variance = reduce_add(square[i]) * share - off * off;
        m[i].rstd = 1.f / __builtin_sqrtf((variance < 0.f ? 0.f : variance) + static_cast<float>(eps));
        m[i].shift = -off * m[i].rstd;
    }
}

// The vector at one channel of `V` rows.
template <class T, int V, class Lanes>
PDN_INLINE void normalise(const T* x, int64_t stride, const Moments* m, const float* coefficients, int64_t size, vf* v,
                          Lanes lanes) {
    const vf gain = load_lanes(coefficients, lanes), offset = load_lanes(coefficients + size, lanes);
    for (int i = 0; i < V; ++i) {
        const vf normalised = (load_lanes(x + i * stride, lanes) - m[i].mean) * m[i].rstd + m[i].shift;
        v[i] = normalised * gain + offset;
    }
}

template <class T, int V>
PDN_INLINE void write_rows(const LayerNormParams& p, int64_t row, const float* all, float* values) {
    const int64_t size = layer_stride(p), channels = p.channels, stride = p.row_stride;
    const T* x = static_cast<const T*>(p.input) + row * stride;
    int8_t* y = p.out.codes + row * channels;
    const float* at = all + row / p.film_rows * layer_coefficients(p);
    const bool folded = at[2 * size] != 0.f;  // and so, with finite moments, safe
    Moments m[V];
    find_moments<T, V>(x, stride, channels, p.eps, m);
    bool safe = folded;
    for (int i = 0; i < V; ++i) safe &= m[i].shift - m[i].shift == 0.f && m[i].mean - m[i].mean == 0.f;
    if (p.out.scale == nullptr) {
        Range ranges[V];
        each_vector(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            vf v[V];
            normalise<T, V>(x + c, stride, m, at + c, size, v, lanes);
            for (int i = 0; i < V; ++i) store_lanes(values + i * channels + c, v[i], lanes);
            for (int i = 0; i < V; ++i) ranges[i].add_finite(v[i]);
            if (!safe)
                for (int i = 0; i < V; ++i) ranges[i].add(v[i]);
        });
        write_dynamic<V>(values, channels, ranges, safe, p.out, row);
        return;
    }
    const Codes codes = codes_of(*p.out.scale, p.out.zero_point);
    if (safe) {
        each_vector(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            vf v[V];
            normalise<T, V>(x + c, stride, m, at + c, size, v, lanes);
            for (int i = 0; i < V; ++i)
                store_codes(y + i * channels + c, round_even(v[i]) + codes.zero_point, codes.lowest, lanes);
        });
    } else {  // NaN and infinities
        const Codes careful = {folded ? 1.f : codes.scale, codes.zero_point, codes.lowest};
        each_vector(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            vf v[V];
            normalise<T, V>(x + c, stride, m, at + c, size, v, lanes);
            for (int i = 0; i < V; ++i) quantize_lanes(y + i * channels + c, v[i], careful, lanes);
        });
    }
}

template <class T>
void rows_typed(const LayerNormParams& p, int64_t begin, int64_t end, const float* all, float* values) {
    int64_t row = begin;
    while (row < end) {
        const int64_t film_end = (row / p.film_rows + 1) * p.film_rows;  // rows done together share a FiLM vector
        const int64_t last = film_end < end ? film_end : end;
        for (; row + kTogether <= last; row += kTogether) write_rows<T, kTogether>(p, row, all, values);
        for (; row < last; ++row) write_rows<T, 1>(p, row, all, values);
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
