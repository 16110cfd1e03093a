// What happens to the sums of a tile on the way to the output: scales, biases, FiLM, activation, residual, and the cast
// or requantization. One function per kind of sum, output dtype and activation, chosen once per call.
#pragma once

#include "../core/epilogue.inl"
#include "../core/fp16.h"
#include "../core/past.inl"
#include "plan.inl"

namespace pdn {
namespace int8_conv2d {
namespace {

enum class Sums : int {
    integer = 0,   // of stored codes: the offset is still in it
    per_row = 1,   // the same, where every pixel has its own scale and zero point
    rescaled = 2,  // float32, scales of the pixels applied
};

// Channel-wise numbers of one block of output channels and one image, padded to kLanes.
struct Channels {
    int32_t correction[kLanes];          // what to add to an integer sum; per_row: minus the sum of the weights
    float scale[kLanes], shift[kLanes];  // y = activation(scale * sum + shift)
};

struct FinishTask {
    const void* sums;  // [pixels][pitch] int32 or float
    int pixels, pitch, lanes;
    const Channels* channels;
    const float* row_scales;   // per_row: of these pixels
    const int32_t* row_zeros;  // per_row
    void* output;              // of the first pixel and channel
    int64_t out_stride;
    const void* residual;
    int64_t residual_stride;
    DType residual_dtype;
    Activation activation;
    bool streamed;  // float32 output past the caches
    float inverse_out_scale;
    int32_t out_zero, out_low;
};

template <class T>
PDN_INLINE vf load_some(const T* p, int lanes) {
    return lanes >= kWidth ? load(p) : load_partial(p, lanes);
}

PDN_INLINE vf residual_vector(const FinishTask& t, int64_t at, int lanes) {
    switch (t.residual_dtype) {
        case DType::bfloat16:
            return load_some(static_cast<const bf16*>(t.residual) + at, lanes);
        case DType::float16:
            return load_some(static_cast<const fp16*>(t.residual) + at, lanes);
        default:
            return load_some(static_cast<const float*>(t.residual) + at, lanes);
    }
}

// Code of a value: half to even, NaN as 0. The product with the scale's reciprocal differs from the quotient in its
// last bit, which moves a code by one beside ties; a division took a tenth of a layer of 64 channels.
PDN_INLINE vi code_of(vf y, float inverse_scale, int32_t zero, int32_t low) {
#if defined(__AVX512F__)
    const __m512 q = (__m512)(y * splat(inverse_scale));
    const __m512 near = _mm512_max_ps(_mm512_min_ps(q, _mm512_set1_ps(1024.f)), _mm512_set1_ps(-1024.f));
    const __m512i rounded = _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(q, q, _CMP_ORD_Q), near);
    const __m512i shifted = _mm512_add_epi32(rounded, _mm512_set1_epi32(zero));
    return (vi)_mm512_min_epi32(_mm512_max_epi32(shifted, _mm512_set1_epi32(low)), _mm512_set1_epi32(127));
#else
    vf q = y * splat(inverse_scale);
    q = select(q > 1024.f, splat(1024.f), select(q < -1024.f, splat(-1024.f), q));
    const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    const vi rounded = (vi)(q + magic) - (vi)magic;
    const vi code = (rounded & (q == q)) + zero;
    const vi above = code > low ? code : splat_lanes(low);
    return above < 127 ? above : splat_lanes(127);
#endif
}

PDN_INLINE void store_codes(int8_t* to, vi code, int lanes) {
#if defined(__AVX512F__)
    const __m128i narrow = _mm512_cvtepi32_epi8((__m512i)code);
    if (lanes >= kWidth) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow);
        return;
    }
#else
    typedef int8_t Narrow __attribute__((vector_size(kWidth)));
    const Narrow narrow = __builtin_convertvector(code, Narrow);
#endif
    std::memcpy(to, &narrow, static_cast<size_t>(lanes < kWidth ? lanes : kWidth));
}

PDN_INLINE void store_value(float* to, vf y, int lanes, const FinishTask& t) {
    if (lanes < kWidth)
        store_partial(to, y, lanes);
    else if (t.streamed)
        store_past(to, y);
    else
        store(to, y);
}
template <class T>
PDN_INLINE void store_value(T* to, vf y, int lanes, const FinishTask&) {
    if (lanes >= kWidth)
        store(to, y);
    else
        store_partial(to, y, lanes);
}
PDN_INLINE void store_value(int8_t* to, vf y, int lanes, const FinishTask& t) {
    store_codes(to, code_of(y, t.inverse_out_scale, t.out_zero, t.out_low), lanes);
}

struct Row {  // per_row: the pixel's own
    vi zero = vi{};
    vf scale = vf{};
};

template <Sums kSums>
PDN_INLINE Row row_at(const FinishTask& t, int m) {
    if constexpr (kSums == Sums::per_row)
        return {splat_lanes(kOffset + (t.row_zeros ? t.row_zeros[m] : 0)), splat(t.row_scales[m])};
    return {};
}

// One vector of outputs. kActivation: 0 none, 1 relu, 2 leaky relu, -1 any.
template <Sums kSums, class T, int kActivation>
PDN_INLINE void finish_vector(const FinishTask& t, const void* sum, vi correction, vf scale, vf shift, const Row& row,
                              int64_t residual_at, T* to, int lanes) {
    vf y;
    if constexpr (kSums == Sums::rescaled) {
        y = load(static_cast<const float*>(sum));
    } else if constexpr (kSums == Sums::per_row) {
        y = __builtin_convertvector(load_lanes(sum) + correction * row.zero, vf) * row.scale;
    } else {
        y = __builtin_convertvector(load_lanes(sum) + correction, vf);
    }
    y = y * scale + shift;
    if constexpr (kActivation == 1) y = relu(y);
    if constexpr (kActivation == 2) y = leaky_relu(y, leaky_slope(t.activation));
    if constexpr (kActivation == -1) y = activate(y, static_cast<int>(t.activation));
    if (t.residual) y += residual_vector(t, residual_at, lanes);
    store_value(to, y, lanes, t);
}

// Pixels of kVectors full vectors: what belongs to the channels stays in registers.
template <Sums kSums, class T, int kActivation, int kVectors>
PDN_INLINE void finish_full(const FinishTask& t) {
    const Channels& c = *t.channels;
    vi correction[kVectors];
    vf scale[kVectors], shift[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
        correction[j] = load_lanes(c.correction + j * kWidth);
        scale[j] = load(c.scale + j * kWidth);
        shift[j] = load(c.shift + j * kWidth);
    }
    const char* sums = static_cast<const char*>(t.sums);
    T* to = static_cast<T*>(t.output);
    int64_t residual_at = 0;
    for (int m = 0; m < t.pixels; ++m) {
        const Row row = row_at<kSums>(t, m);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j)
            finish_vector<kSums, T, kActivation>(t, sums + j * kWidth * 4, correction[j], scale[j], shift[j], row,
                                                 residual_at + j * kWidth, to + j * kWidth, kWidth);
        sums += t.pitch * 4;
        to += t.out_stride;
        residual_at += t.residual_stride;
    }
}

template <Sums kSums, class T, int kActivation>
PDN_INLINE void finish_any(const FinishTask& t) {
    const Channels& c = *t.channels;
    for (int m = 0; m < t.pixels; ++m) {
        const Row row = row_at<kSums>(t, m);
        for (int from = 0; from < t.lanes; from += kWidth)
            finish_vector<kSums, T, kActivation>(t, static_cast<const char*>(t.sums) + (m * t.pitch + from) * 4,
                                                 load_lanes(c.correction + from), load(c.scale + from),
                                                 load(c.shift + from), row, m * t.residual_stride + from,
                                                 static_cast<T*>(t.output) + m * t.out_stride + from, t.lanes - from);
    }
}

template <Sums kSums, class T, int kActivation>
void finish(const FinishTask& given) {
    const FinishTask t = given;        // stores to the output cannot change a copy: what it holds stays in registers
    if constexpr (kActivation >= 0) {  // the others take their time anyway, and are large
        if (t.lanes == kBlock * kWidth) return finish_full<kSums, T, kActivation, kBlock>(t);
        if (t.lanes == kWidth) return finish_full<kSums, T, kActivation, 1>(t);
    }
    finish_any<kSums, T, kActivation>(t);
}

// int32 output: the sums themselves.
void finish_sums(const FinishTask& t) {
    for (int m = 0; m < t.pixels; ++m) {
        for (int from = 0; from < t.lanes; from += kWidth) {
            const vi sum = load_lanes(static_cast<const int32_t*>(t.sums) + m * t.pitch + from) +
                           load_lanes(t.channels->correction + from);
            const int lanes = t.lanes - from < kWidth ? t.lanes - from : kWidth;
            std::memcpy(static_cast<int32_t*>(t.output) + m * t.out_stride + from, &sum,
                        static_cast<size_t>(lanes) * 4);
        }
    }
}

using FinishFunction = void (*)(const FinishTask& t);

template <Sums kSums, class T>
FinishFunction by_activation(Activation activation) {
    if (activation == Activation::none) return finish<kSums, T, 0>;
    if (is_leaky_relu(activation)) return finish<kSums, T, 2>;
    return activation == Activation::relu ? finish<kSums, T, 1> : finish<kSums, T, -1>;
}

template <Sums kSums>
FinishFunction by_dtype(const ConvParams& p) {
    switch (p.out_dtype) {
        case DType::bfloat16:
            return by_activation<kSums, bf16>(p.activation);
        case DType::float16:
            return by_activation<kSums, fp16>(p.activation);
        case DType::int8:
            return by_activation<kSums, int8_t>(p.activation);
        case DType::int32:
            return finish_sums;
        default:
            return by_activation<kSums, float>(p.activation);
    }
}

FinishFunction finish_function(const ConvParams& p, Sums sums) {
    if (sums == Sums::integer) return by_dtype<Sums::integer>(p);
    return sums == Sums::per_row ? by_dtype<Sums::per_row>(p) : by_dtype<Sums::rescaled>(p);
}

PDN_INLINE int64_t bytes_of(DType dtype) {
    return dtype == DType::int8 ? 1 : dtype == DType::bfloat16 || dtype == DType::float16 ? 2 : 4;
}

// An output that the caches cannot hold until somebody reads it is written past them, where that is whole lines.
constexpr int64_t kStreamBytes = 8 << 20;

bool is_streamed(const ConvParams& p) {
    const auto whole = [](int64_t elements) { return elements * 4 % 64 == 0; };
    const int64_t elements = p.batch * p.rows.out_size * p.columns.out_size * p.groups * p.out_channels;
    return p.out_dtype == DType::float32 && elements * 4 >= kStreamBytes &&
           reinterpret_cast<uintptr_t>(p.output) % 64 == 0 && whole(p.out_channels) && whole(p.out_batch_stride) &&
           whole(p.rows.out_stride) && whole(p.columns.out_stride);
}

// Finishes tiles of a call: knows the tensors, `at` moves it to pixels.
struct Finisher {
    const ConvParams& p;
    Sums sums;
    FinishFunction function;
    FinishTask task{};
    Channels channels;
    int64_t first_channel = 0;

    Finisher(const ConvParams& params, Sums kind) : p(params), sums(kind), function(finish_function(params, kind)) {
        task.channels = &channels;
        task.residual_dtype = p.residual_dtype;
        task.activation = p.activation;
        task.residual = p.residual;
        task.out_stride = p.columns.out_stride;
        task.streamed = is_streamed(p);
        task.residual_stride = p.columns.residual_stride;
        if (p.out_dtype != DType::int8) return;
        task.inverse_out_scale = 1.f / *p.out_scale;
        task.out_zero = p.out_zero_point ? *p.out_zero_point : 0;
        task.out_low = p.out_zero_point ? -128 : -127;
    }

    // `count` output channels of image n from `first` (of all groups); weight_sums: of these channels, over all taps.
    void prepare(int64_t n, int64_t first, int count, const int32_t* weight_sums) {
        const int64_t all = p.groups * p.out_channels;
        const int32_t zero = !p.per_pixel && p.input_zero_point ? *p.input_zero_point : 0;
        const float input_scale = p.per_pixel || !p.input_scale ? 1.f : *p.input_scale;
        first_channel = first;
        task.lanes = count;
        for (int i = 0; i < kLanes; ++i) {
            const int64_t o = first + i;
            const bool exists = i < count;
            float scale = exists && p.weight_scale ? input_scale * p.weight_scale[o] : 0.f;
            float shift = exists && p.bias ? p.bias[o] : 0.f;
            if (exists && p.channel_bias) shift += p.channel_bias[n * all + o];
            if (exists && p.film) {
                const float gain = 1.f + p.film[n * 2 * all + o];
                scale *= gain;
                shift = shift * gain + p.film[n * 2 * all + all + o];
            }
            const int32_t factor = sums == Sums::integer ? kOffset + zero : 1;
            const uint32_t sum = exists && weight_sums ? static_cast<uint32_t>(weight_sums[i]) : 0;
            channels.correction[i] = static_cast<int32_t>(0u - sum * static_cast<uint32_t>(factor));
            channels.scale[i] = scale;
            channels.shift[i] = shift;
        }
    }

    // Move to the outputs of image n from (row, column).
    PDN_INLINE void move_to(int64_t n, int64_t row, int64_t column) {
        const int64_t at = n * p.out_batch_stride + row * p.rows.out_stride + column * p.columns.out_stride;
        task.output = static_cast<char*>(p.output) + (at + first_channel) * bytes_of(p.out_dtype);
        if (p.residual) {
            const int64_t from = n * p.residual_batch_stride + row * p.rows.residual_stride +
                                 column * p.columns.residual_stride + first_channel;
            task.residual = static_cast<const char*>(p.residual) + from * bytes_of(p.residual_dtype);
        }
    }

    // `count` adjoining outputs from there; their sums lie `pitch` apart.
    PDN_INLINE void pixels(const void* values, int count, int pitch) {
        task.sums = values;
        task.pixels = count;
        task.pitch = pitch;
        function(task);
    }
};

}  // namespace
}  // namespace int8_conv2d
}  // namespace pdn
