// Group norm over channels_last images: statistics of chunks of pixels, coefficients per channel, codes. Included once
// per ISA level.
//
// Per-channel arrays hold the panels one after the other, each starting at a multiple of the vector width.
#pragma once

#include "write_dynamic.inl"

namespace pdn {
namespace norm_quantize {
namespace {

constexpr int64_t kBlock = kWidth == 16 ? 16 : 8;  // pixels whose values of one vector of channels lie in registers
constexpr int64_t kChunkElements = 16384;
constexpr int64_t kMostChunks = 64;  // of an image: what is folded by one thread

int64_t whole_vectors(int64_t channels) { return (channels + kWidth - 1) / kWidth * kWidth; }
int64_t padded(const GroupNormParams& p) {
    return whole_vectors(p.panel[0].channels) + whole_vectors(p.panel[1].channels);
}

int64_t group_chunk(const GroupNormParams& p) {
    int64_t pixels = kChunkElements / p.channels;
    const int64_t least = (p.pixels + kMostChunks - 1) / kMostChunks;
    if (pixels < least) pixels = least;
    return (pixels + kBlock - 1) / kBlock * kBlock;
}

int64_t chunks_of(const GroupNormParams& p) {
    const int64_t chunk = group_chunk(p);
    return (p.pixels + chunk - 1) / chunk;
}

// ----------------------------------------------------------------------------------------------------- statistics

// Per channel: the mean, relative to the image's first pixel, and the sum of squares about the mean.
int64_t group_partial(const GroupNormParams& p) { return 2 * padded(p); }

template <class T, class Lanes>
PDN_INLINE void add_block(const T* x, int64_t stride, int64_t before, int64_t count, vf shift, float* mean,
                          float* squares, Lanes lanes) {
    vf sum{}, square{}, block_mean;
    if (count == kBlock) {
        vf v[kBlock];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kBlock; ++i) v[i] = load_lanes(x + i * stride, lanes);
        vf part[4] = {v[0], v[1], v[2], v[3]};
#pragma GCC unroll 16
        for (int64_t i = 4; i < kBlock; ++i) part[i & 3] += v[i];
        sum = (part[0] + part[1]) + (part[2] + part[3]);
        block_mean = sum * (1.f / kBlock);
        vf odd{};
#pragma GCC unroll 16
        for (int64_t i = 0; i < kBlock; i += 2) {
            const vf a = v[i] - block_mean, b = v[i + 1] - block_mean;
            square += a * a;
            odd += b * b;
        }
        square += odd;
    } else {
        for (int64_t i = 0; i < count; ++i) sum += load_lanes(x + i * stride, lanes);
        block_mean = sum * (1.f / static_cast<float>(count));
        for (int64_t i = 0; i < count; ++i) {
            const vf d = load_lanes(x + i * stride, lanes) - block_mean;
            square += d * d;
        }
    }
    const float n = static_cast<float>(before), m = static_cast<float>(count);
    const vf apart = (block_mean - shift) - load(mean);
    store(mean, load(mean) + apart * (m / (n + m)));
    store(squares, load(squares) + square + apart * apart * (n * m / (n + m)));
}

template <class T>
void panel_statistics(const Panel& panel, int64_t image, int64_t begin, int64_t end, float* mean, float* squares) {
    const T* first = static_cast<const T*>(panel.data) + image * panel.batch_stride;
    for (int64_t pixel = begin; pixel < end; pixel += kBlock) {
        const T* x = first + pixel * panel.row_stride;
        const int64_t before = pixel - begin, count = end - pixel < kBlock ? end - pixel : kBlock;
        int64_t c = 0;
        for (; c + kWidth <= panel.channels; c += kWidth)
            add_block(x + c, panel.row_stride, before, count, load(first + c), mean + c, squares + c, AllLanes{});
        const int rest = static_cast<int>(panel.channels - c);
        if (rest > 0)
            add_block(x + c, panel.row_stride, before, count, load_partial(first + c, rest), mean + c, squares + c,
                      rest);
    }
}

template <class T>
void statistics_typed(const GroupNormParams& p, int64_t image, int64_t chunk, float* partial) {
    const int64_t begin = chunk * group_chunk(p), size = padded(p);
    const int64_t end = begin + group_chunk(p) < p.pixels ? begin + group_chunk(p) : p.pixels;
    std::memset(partial, 0, static_cast<size_t>(2 * size) * sizeof(float));
    panel_statistics<T>(p.panel[0], image, begin, end, partial, partial + size);
    const int64_t second = whole_vectors(p.panel[0].channels);
    panel_statistics<T>(p.panel[1], image, begin, end, partial + second, partial + size + second);
}

void group_statistics(const GroupNormParams& p, int64_t image, int64_t chunk, float* partial) {
    switch (p.dtype) {
        case DType::float32:
            return statistics_typed<float>(p, image, chunk, partial);
        case DType::bfloat16:
            return statistics_typed<bf16>(p, image, chunk, partial);
        case DType::float16:
            return statistics_typed<fp16>(p, image, chunk, partial);
    }
}

// ------------------------------------------------------------------------------------------------- coefficients

// An image's coefficients: arrays of `padded` floats, then one float, nonzero where values need no care: all are
// finite, and over a given scale within kSafeCode. With d = x - center, exact where it matters, since the center is the
// group's mean:
//   folded (a given scale, no care needed): the value over the scale is
//     none: gain d + offset;  silu: (second_gain d + second_offset) / (1 + 2^(gain d + offset));
//     others: activation(gain d + offset) * factor
//   else: the value is activation(gain d + offset) * factor
enum Slot { kCenter, kGain, kOffset, kSecondGain, kSecondOffset, kFactor, kSlots };

int64_t group_coefficients(const GroupNormParams& p) { return kSlots * padded(p) + kWidth; }

// All chunks of an image into the first one's place.
PDN_INLINE void merge_chunks(const GroupNormParams& p, float* partials) {
    const int64_t size = padded(p), chunk = group_chunk(p), chunks = chunks_of(p);
    for (int64_t c = 0; c < size; c += kWidth) {
        vf mean = load(partials + c), squares = load(partials + size + c);
        for (int64_t i = 1; i < chunks; ++i) {
            const float* other = partials + i * 2 * size;
            const float n = static_cast<float>(i * chunk);
            const float m = static_cast<float>((i + 1) * chunk < p.pixels ? chunk : p.pixels - i * chunk);
            const vf apart = load(other + c) - mean;
            mean += apart * (m / (n + m));
            squares += load(other + size + c) + apart * apart * (n * m / (n + m));
        }
        store(partials + c, mean);
        store(partials + size + c, squares);
    }
}

PDN_INLINE float widened(float x) { return x; }
PDN_INLINE float widened(bf16 x) { return from_bf16(x); }
PDN_INLINE float widened(fp16 x) { return from_fp16(x); }

// Mean, what it lost in rounding, and 1 / deviation of every channel's group, in padded order.
template <class T>
PDN_INLINE void group_moments(const GroupNormParams& p, int64_t image, const float* partial, float* mean, float* rest,
                              float* rstd) {
    const int64_t size = padded(p), per_group = p.channels / p.groups, first = p.panel[0].channels;
    const T* pixel[2];
    for (int i = 0; i < 2; ++i) pixel[i] = static_cast<const T*>(p.panel[i].data) + image * p.panel[i].batch_stride;
    const int64_t second = whole_vectors(first);
    const auto place = [&](int64_t c) { return c < first ? c : second + c - first; };
    const auto channel_mean = [&](int64_t c) {
        const float shift = widened(c < first ? pixel[0][c] : pixel[1][c - first]);
        return static_cast<double>(shift) + static_cast<double>(partial[place(c)]);
    };
    const double pixels = static_cast<double>(p.pixels), share = 1.0 / static_cast<double>(per_group);
    const double count_share = share / pixels;
    for (int64_t begin = 0; begin < p.channels; begin += per_group) {
        double sum = 0, squares = 0;
        for (int64_t c = begin; c < begin + per_group; ++c) sum += channel_mean(c);
        const double center = sum * share;
        for (int64_t c = begin; c < begin + per_group; ++c) {
            const double apart = channel_mean(c) - center;
            squares += static_cast<double>(partial[size + place(c)]) + pixels * apart * apart;
        }
        const float scale = static_cast<float>(1.0 / __builtin_sqrt(squares * count_share + p.eps));
        const float high = static_cast<float>(center), low = static_cast<float>(center - static_cast<double>(high));
        for (int64_t c = begin; c < begin + per_group; ++c) {
            mean[place(c)] = high;
            rest[place(c)] = low;
            rstd[place(c)] = scale;
        }
    }
}

// Coefficients of one panel, whose channels start at `channel`; true if values need no care.
PDN_INLINE bool fold_panel(const GroupNormParams& p, int64_t image, int64_t channel, int64_t count, bool folded,
                           float* slots, int64_t size) {
    const float* film = p.film ? p.film + image * 2 * p.channels + channel : nullptr;
    // no value is further from the mean of n than sqrt(n) deviations
    const float furthest = static_cast<float>(__builtin_sqrt(static_cast<double>(p.pixels * p.channels / p.groups)));
    const float limit = folded ? kSafeCode : 3e38f;
    vi safe = ~vi{};
    const auto one = [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const auto given = [&](const float* values, float otherwise) __attribute__((always_inline)) {
            return values ? load_lanes(values + channel + c, lanes) : splat(otherwise);
        };
        float* at = slots + c;
        const vf rstd = load_lanes(at + kFactor * size, lanes), center_rest = load_lanes(at + kOffset * size, lanes);
        vf relative_gain = given(p.weight, 1.f), offset = given(p.bias, 0.f);
        if (film) {
            const vf scale = 1.f + load_lanes(film + c, lanes);
            relative_gain = relative_gain * scale;
            offset = offset * scale + load_lanes(film + p.channels + c, lanes);
        }
        vf gain = rstd * relative_gain;
        offset = offset - center_rest * gain;
        vf factor = given(p.channel_scale, 1.f), second_gain{}, second_offset{};
        if (folded) factor = factor / *p.out.scale;
        const vf largest = (magnitude(relative_gain) * furthest + magnitude(offset)) * magnitude(factor);
        safe &= (largest < limit) & (magnitude(gain) < 3e38f);  // false for NaN
        if (folded && p.activation == Activation::none) {
            gain = gain * factor;
            offset = offset * factor;
        } else if (folded && p.activation == Activation::silu) {
            second_gain = gain * factor;
            second_offset = offset * factor;
            gain = gain * kMinusLog2e;
            offset = offset * kMinusLog2e;
        }
        store_lanes(at + kGain * size, gain, lanes);
        store_lanes(at + kOffset * size, offset, lanes);
        store_lanes(at + kSecondGain * size, second_gain, lanes);
        store_lanes(at + kSecondOffset * size, second_offset, lanes);
        store_lanes(at + kFactor * size, factor, lanes);
    };
    int64_t c = 0;
    for (; c + kWidth <= count; c += kWidth) one(c, AllLanes{});
    if (c < count) one(c, static_cast<int>(count - c));
    return !any(~safe);
}

template <class T>
void fold_typed(const GroupNormParams& p, int64_t image, float* partials, float* slots) {
    const int64_t size = padded(p), second = whole_vectors(p.panel[0].channels);
    merge_chunks(p, partials);
    bool safe = false;
    // with a given scale twice where that is not safe: then values are divided by it with care
    for (bool folded = p.out.scale != nullptr;; folded = false) {
        group_moments<T>(p, image, partials, slots + kCenter * size, slots + kOffset * size, slots + kFactor * size);
        safe = fold_panel(p, image, 0, p.panel[0].channels, folded, slots, size);
        safe &= fold_panel(p, image, p.panel[0].channels, p.panel[1].channels, folded, slots + second, size);
        if (safe || !folded) {
            slots[kSlots * size] = safe && folded == (p.out.scale != nullptr) ? 1.f : 0.f;
            return;
        }
    }
}

void group_fold(const GroupNormParams& p, int64_t image, float* partials, float* coefficients) {
    switch (p.dtype) {
        case DType::float32:
            return fold_typed<float>(p, image, partials, coefficients);
        case DType::bfloat16:
            return fold_typed<bf16>(p, image, partials, coefficients);
        case DType::float16:
            return fold_typed<fp16>(p, image, partials, coefficients);
    }
}

// ---------------------------------------------------------------------------------------------------------- codes

int64_t group_scratch(const GroupNormParams& p) {
    return p.out.scale ? 0 : kTogether * p.channels * static_cast<int64_t>(sizeof(float));
}

// The vector at one channel of `V` pixels `stride` apart, before quantization; over the scale where the coefficients
// are folded. `slope` is of a leaky ReLU: one instance for all of them.
template <class T, Activation A, bool kFolded, int V, class Lanes>
PDN_INLINE void values_of(const T* x, int64_t stride, const float* at, int64_t size, float slope, vf* v, Lanes lanes) {
    const auto slot = [&](Slot s) __attribute__((always_inline)) { return load_lanes(at + s * size, lanes); };
    const vf center = slot(kCenter), gain = slot(kGain), offset = slot(kOffset);
    for (int i = 0; i < V; ++i) v[i] = load_lanes(x + i * stride, lanes) - center;
    if constexpr (kFolded && A == Activation::silu) {
        const vf second_gain = slot(kSecondGain), second_offset = slot(kSecondOffset);
        vf below[V];
        for (int i = 0; i < V; ++i) below[i] = v[i] * gain + offset;
        for (int i = 0; i < V; ++i) v[i] = v[i] * second_gain + second_offset;
        for (int i = 0; i < V; ++i) v[i] = v[i] / one_plus_exp2(below[i]);
        return;
    }
    for (int i = 0; i < V; ++i) v[i] = v[i] * gain + offset;
    if constexpr (kFolded && A == Activation::none) return;
    const vf factor = slot(kFactor);
    for (int i = 0; i < V; ++i)
        v[i] = (is_leaky_relu(A) ? leaky_relu(v[i], slope) : fast_activate(v[i], static_cast<int>(A))) * factor;
}

// `V` pixels of one panel under the given scale.
template <class T, Activation A, int V>
PDN_INLINE void write_given(const T* x, int64_t stride, int64_t count, const float* slots, int64_t size, float slope,
                            bool safe, const Codes& codes, int8_t* y, int64_t step) {
    if (safe) {
        each_vector(count, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            vf v[V];
            vi q[V];
            values_of<T, A, true, V>(x + c, stride, slots + c, size, slope, v, lanes);
            for (int i = 0; i < V; ++i) q[i] = round_even(v[i]) + codes.zero_point;
            for (int i = 0; i < V; ++i) store_codes(y + i * step + c, q[i], codes.lowest, lanes);
        });
    } else {
        each_vector(count, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            vf v[V];
            values_of<T, A, false, V>(x + c, stride, slots + c, size, slope, v, lanes);
            for (int i = 0; i < V; ++i) quantize_lanes(y + i * step + c, v[i], codes, lanes);
        });
    }
}

// The values of `V` pixels of one panel, and their ranges.
template <class T, Activation A, int V>
PDN_INLINE void find_ranges(const T* x, int64_t stride, int64_t count, const float* slots, int64_t size, float slope,
                            bool safe, float* values, int64_t step, Range* ranges) {
    each_vector(count, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        vf v[V];
        values_of<T, A, false, V>(x + c, stride, slots + c, size, slope, v, lanes);
        for (int i = 0; i < V; ++i) store_lanes(values + i * step + c, v[i], lanes);
        for (int i = 0; i < V; ++i) ranges[i].add_finite(v[i]);
        if (!safe)
            for (int i = 0; i < V; ++i) ranges[i].add(v[i]);
    });
}

template <class T, Activation A, int V>
PDN_INLINE void write_pixels(const GroupNormParams& p, int64_t image, int64_t pixel, const float* slots,
                             float* values) {
    const int64_t size = padded(p), first = p.panel[0].channels, row = image * p.pixels + pixel;
    const bool safe = slots[kSlots * size] != 0.f;
    const float slope = leaky_slope(p.activation);
    const float* at[2] = {slots, slots + whole_vectors(first)};
    const int64_t channel[2] = {0, first};
    Range ranges[V];
    for (int i = 0; i < 2; ++i) {
        const Panel& panel = p.panel[i];
        if (panel.channels == 0) continue;
        const T* x = static_cast<const T*>(panel.data) + image * panel.batch_stride + pixel * panel.row_stride;
        if (p.out.scale) {
            const Codes codes = codes_of(*p.out.scale, p.out.zero_point);
            write_given<T, A, V>(x, panel.row_stride, panel.channels, at[i], size, slope, safe, codes,
                                 p.out.codes + row * p.channels + channel[i], p.channels);
        } else {
            find_ranges<T, A, V>(x, panel.row_stride, panel.channels, at[i], size, slope, safe, values + channel[i],
                                 p.channels, ranges);
        }
    }
    if (p.out.scale == nullptr) write_dynamic<V>(values, p.channels, ranges, safe, p.out, row);
}

template <class T, Activation A>
void write_activated(const GroupNormParams& p, int64_t image, int64_t begin, int64_t end, const float* slots,
                     void* scratch) {
    float* values = static_cast<float*>(scratch);
    int64_t pixel = begin;
    for (; pixel + kTogether <= end; pixel += kTogether) write_pixels<T, A, kTogether>(p, image, pixel, slots, values);
    for (; pixel < end; ++pixel) write_pixels<T, A, 1>(p, image, pixel, slots, values);
}

template <class T>
void write_typed(const GroupNormParams& p, int64_t image, int64_t chunk, const float* slots, void* scratch) {
    const int64_t begin = chunk * group_chunk(p);
    const int64_t end = begin + group_chunk(p) < p.pixels ? begin + group_chunk(p) : p.pixels;
    switch (p.activation) {
        case Activation::none:
            return write_activated<T, Activation::none>(p, image, begin, end, slots, scratch);
        case Activation::relu:
            return write_activated<T, Activation::relu>(p, image, begin, end, slots, scratch);
        case Activation::silu:
            return write_activated<T, Activation::silu>(p, image, begin, end, slots, scratch);
        case Activation::gelu:
            return write_activated<T, Activation::gelu>(p, image, begin, end, slots, scratch);
        case Activation::gelu_tanh:
            return write_activated<T, Activation::gelu_tanh>(p, image, begin, end, slots, scratch);
        case Activation::leaky_relu_001:
        case Activation::leaky_relu_01:
        case Activation::leaky_relu_02:
            return write_activated<T, Activation::leaky_relu_001>(p, image, begin, end, slots, scratch);
        case Activation::geglu:  // refused by the bindings
        case Activation::softplus:
            return;
    }
}

void group_write(const GroupNormParams& p, int64_t image, int64_t chunk, const float* coefficients, void* scratch) {
    switch (p.dtype) {
        case DType::float32:
            return write_typed<float>(p, image, chunk, coefficients, scratch);
        case DType::bfloat16:
            return write_typed<bf16>(p, image, chunk, coefficients, scratch);
        case DType::float16:
            return write_typed<fp16>(p, image, chunk, coefficients, scratch);
    }
}

}  // namespace
}  // namespace norm_quantize
}  // namespace pdn
