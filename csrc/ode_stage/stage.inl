// The stage: the combination of state and slopes with the moments of each channel in one pass, the normalisation in a
// second one over what still lies in the cache. Included once per ISA level.
#pragma once

#include "rows.inl"

namespace pdn {
namespace ode_stage {
namespace {

// Per channel of a chunk: the mean, relative to the image's first pixel; the sum of squares about the mean; and that
// pixel's value.
int64_t stage_partial(int64_t channels) { return 3 * channel_array(channels); }

// One part of one image. `target` is where the point is kept for the second pass, or null where it is the state.
template <class T>
struct Source {
    const T* state;
    const T* slope[kMostSlopes];
    int64_t state_stride, slope_stride, target_stride, drift_offset;
    float drift;
    float weight[kMostSlopes];
    T* target;
};

template <class T, int S, bool D, class Lanes>
PDN_INLINE vf point_of(const Source<T>& s, int64_t pixel, int64_t c, Lanes lanes) {
    const T* x = s.state + pixel * s.state_stride + c;
    vf v = load_lanes(x, lanes);
    if constexpr (D) v += s.drift * load_lanes(x + s.drift_offset, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < S; ++i) v += s.weight[i] * load_lanes(s.slope[i] + pixel * s.slope_stride + c, lanes);
    return v;
}

// The point, kept, as it is read again: rounded to the tensor's type.
template <class T, int S, bool D, class Lanes>
PDN_INLINE vf kept_point(const Source<T>& s, int64_t pixel, int64_t c, Lanes lanes) {
    vf v = point_of<T, S, D>(s, pixel, c, lanes);
    if (s.target) {
        T* to = s.target + pixel * s.target_stride + c;
        store_lanes(to, v, lanes);
        if constexpr (sizeof(T) < sizeof(float)) v = load_lanes(to, lanes);
    }
    return v;
}

// `count` values whose mean and sum of squares about it are these, after `before` others.
template <class Lanes>
PDN_INLINE void join(int64_t before, int64_t count, vf own_mean, vf own_squares, float* mean, float* squares,
                     Lanes lanes) {
    const float n = static_cast<float>(before), m = static_cast<float>(count);
    const vf apart = own_mean - load_lanes(mean, lanes);
    store_lanes(mean, load_lanes(mean, lanes) + apart * (m / (n + m)), lanes);
    store_lanes(squares, load_lanes(squares, lanes) + own_squares + apart * apart * (n * m / (n + m)), lanes);
}

template <class T, int S, bool D, class Lanes>
PDN_INLINE void add_block(const Source<T>& s, int64_t pixel, int64_t c, int64_t before, vf shift, float* mean,
                          float* squares, Lanes lanes) {
    vf v[kBlock];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kBlock; ++i) v[i] = kept_point<T, S, D>(s, pixel + i, c, lanes);
    vf part[4] = {v[0], v[1], v[2], v[3]};
#pragma GCC unroll 16
    for (int64_t i = 4; i < kBlock; ++i) part[i & 3] += v[i];
    const vf own = ((part[0] + part[1]) + (part[2] + part[3])) * (1.f / kBlock);
    vf even{}, odd{};
#pragma GCC unroll 16
    for (int64_t i = 0; i < kBlock; i += 2) {
        const vf a = v[i] - own, b = v[i + 1] - own;
        even += a * a;
        odd += b * b;
    }
    join(before, kBlock, own - shift, even + odd, mean, squares, lanes);
}

template <class T, int S, bool D, class Lanes>
PDN_INLINE void add_few(const Source<T>& s, int64_t pixel, int64_t count, int64_t c, int64_t before, vf shift,
                        float* mean, float* squares, Lanes lanes) {
    vf sum{}, square{};
    for (int64_t i = 0; i < count; ++i) sum += kept_point<T, S, D>(s, pixel + i, c, lanes);
    const vf own = sum * (1.f / static_cast<float>(count));
    for (int64_t i = 0; i < count; ++i) {
        const vf d = kept_point<T, S, D>(s, pixel + i, c, lanes) - own;
        square += d * d;
    }
    join(before, count, own - shift, square, mean, squares, lanes);
}

template <class T, int S, bool D>
void combine_part(const Source<T>& s, int64_t channels, Span span, float* mean, float* squares, float* first) {
    vectors_once(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        store_lanes(first + c, point_of<T, S, D>(s, 0, c, lanes), lanes);
    });
    for (int64_t pixel = span.begin; pixel < span.end; pixel += kBlock) {
        const int64_t count = span.end - pixel, before = pixel - span.begin;
        vectors_once(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            const vf shift = load_lanes(first + c, lanes);
            if (count >= kBlock)
                add_block<T, S, D>(s, pixel, c, before, shift, mean + c, squares + c, lanes);
            else
                add_few<T, S, D>(s, pixel, count, c, before, shift, mean + c, squares + c, lanes);
        });
    }
}

template <class T, int S, bool D>
void keep_part(const Source<T>& s, int64_t channels, Span span) {
    for (int64_t pixel = span.begin; pixel < span.end; ++pixel)
        vectors_once(channels, [&](int64_t c, auto lanes)
                                   __attribute__((always_inline)) { kept_point<T, S, D>(s, pixel, c, lanes); });
}

// Whether the point is something else than the state.
PDN_INLINE bool combines(const StageParams& p) {
    return p.slopes > 0 || p.part[0].drift != 0.f || (p.parts > 1 && p.part[1].drift != 0.f);
}

template <class T>
Source<T> source_of(const StageParams& p, int64_t image, const Part& part) {
    Source<T> s{};
    s.state = static_cast<const T*>(p.state) + image * p.pixels * p.channels + part.first;
    s.state_stride = p.channels;
    s.slope_stride = p.slope_channels;
    s.drift_offset = part.channels;
    s.drift = part.drift;
    for (int i = 0; i < p.slopes; ++i) {
        s.slope[i] = static_cast<const T*>(p.slope[i]) + image * p.pixels * p.slope_channels;
        s.weight[i] = part.weight[i];
    }
    s.target_stride = p.point ? p.channels : p.channels + p.has_plane;
    if (combines(p))
        s.target = static_cast<T*>(p.point ? p.point : p.output) + image * p.pixels * s.target_stride + part.first;
    return s;
}

template <class T, int S, bool D>
void combine_typed(const StageParams& p, int64_t image, const Part& part, Span span, float* partial) {
    const Source<T> s = source_of<T>(p, image, part);
    if (partial == nullptr) return keep_part<T, S, D>(s, part.channels, span);
    float* mean = partial + part.first;
    const int64_t size = channel_array(p.channels);
    combine_part<T, S, D>(s, part.channels, span, mean, mean + size, mean + 2 * size);
}

template <class T, bool D>
void combine_slopes(const StageParams& p, int64_t image, const Part& part, Span span, float* partial) {
    switch (p.slopes) {
        case 0:
            return combine_typed<T, 0, D>(p, image, part, span, partial);
        case 1:
            return combine_typed<T, 1, D>(p, image, part, span, partial);
        case 2:
            return combine_typed<T, 2, D>(p, image, part, span, partial);
        case 3:
            return combine_typed<T, 3, D>(p, image, part, span, partial);
        default:
            return combine_typed<T, 4, D>(p, image, part, span, partial);
    }
}

template <class T>
void combine_parts(const StageParams& p, int64_t image, Span span, float* partial) {
    for (int i = 0; i < p.parts; ++i) {
        const Part& part = p.part[i];
        if (part.drift != 0.f)
            combine_slopes<T, true>(p, image, part, span, partial);
        else
            combine_slopes<T, false>(p, image, part, span, partial);
    }
}

void combine(const StageParams& p, int64_t image, int64_t chunk, float* partial) {
    const Span span = span_of(p.pixels, p.channels, chunk);
    if (partial) std::memset(partial, 0, static_cast<size_t>(stage_partial(p.channels)) * sizeof(float));
    switch (p.dtype) {
        case DType::float32:
            return combine_parts<float>(p, image, span, partial);
        case DType::bfloat16:
            return combine_parts<bf16>(p, image, span, partial);
        case DType::float16:
            return combine_parts<fp16>(p, image, span, partial);
    }
}

// --------------------------------------------------------------------------------------------------- coefficients

// Per channel: center, gain, offset; the output is (point - center) * gain + offset. The center is the mean rounded to
// float32, and what that lost is part of the offset.
int64_t stage_coefficients(int64_t channels) { return 3 * channel_array(channels); }

// All chunks of an image into the first one's place.
PDN_INLINE void merge_chunks(const StageParams& p, float* partials) {
    const int64_t size = channel_array(p.channels), chunk = chunk_pixels(p.pixels, p.channels);
    for (int64_t begin = chunk, i = 1; begin < p.pixels; begin += chunk, ++i) {
        const float* other = partials + i * stage_partial(p.channels);
        const int64_t count = begin + chunk < p.pixels ? chunk : p.pixels - begin;
        vectors_once(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            join(begin, count, load_lanes(other + c, lanes), load_lanes(other + size + c, lanes), partials + c,
                 partials + size + c, lanes);
        });
    }
}

void fold(const StageParams& p, int64_t image, float* partials, float* coefficients) {
    const int64_t size = channel_array(p.channels);
    const float* film = p.film ? p.film + image * 2 * p.channels : nullptr;
    float* moments = p.moments + image * 2 * p.channels;
    merge_chunks(p, partials);
    const double share = 1.0 / static_cast<double>(p.pixels);
    for (int64_t c = 0; c < p.channels; ++c) {
        const double mean = static_cast<double>(partials[2 * size + c]) + static_cast<double>(partials[c]);
        const double squares = static_cast<double>(partials[size + c]);
        const float center = static_cast<float>(mean);
        const double gain = 1.0 / __builtin_sqrt(squares * share + p.eps) * (film ? 1.0 + film[c] : 1.0);
        coefficients[c] = center;
        coefficients[size + c] = static_cast<float>(gain);
        coefficients[2 * size + c] =
            static_cast<float>((static_cast<double>(center) - mean) * gain + (film ? film[p.channels + c] : 0.0));
        moments[c] = center;
        moments[p.channels + c] = static_cast<float>(1.0 / __builtin_sqrt(squares * share + p.eps));
    }
}

// ---------------------------------------------------------------------------------------------------- second pass

template <class T>
void normalise_typed(const StageParams& p, int64_t image, Span span, const float* coefficients) {
    const int64_t size = channel_array(p.channels), width = p.channels + p.has_plane;
    T* out = static_cast<T*>(p.output) + image * p.pixels * width;
    const T* in = p.point       ? static_cast<const T*>(p.point) + image * p.pixels * p.channels
                  : combines(p) ? out
                                : static_cast<const T*>(p.state) + image * p.pixels * p.channels;
    const int64_t in_stride = !p.point && combines(p) ? width : p.channels;
    for (int64_t pixel = span.begin; pixel < span.end; ++pixel) {
        const T* x = in + pixel * in_stride;
        T* y = out + pixel * width;
        vectors_once(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            const vf v = load_lanes(x + c, lanes) - load_lanes(coefficients + c, lanes);
            const vf gain = load_lanes(coefficients + size + c, lanes);
            store_lanes(y + c, v * gain + load_lanes(coefficients + 2 * size + c, lanes), lanes);
        });
        if (p.has_plane) put(y + p.channels, p.plane);
    }
}

void normalise(const StageParams& p, int64_t image, int64_t chunk, const float* coefficients) {
    const Span span = span_of(p.pixels, p.channels, chunk);
    switch (p.dtype) {
        case DType::float32:
            return normalise_typed<float>(p, image, span, coefficients);
        case DType::bfloat16:
            return normalise_typed<bf16>(p, image, span, coefficients);
        case DType::float16:
            return normalise_typed<fp16>(p, image, span, coefficients);
    }
}

}  // namespace
}  // namespace ode_stage
}  // namespace pdn
