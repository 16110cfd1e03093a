// Rows of floats to int8 codes, under given or own scales, and back. Included once per ISA level.
#pragma once

#include "../core/quantize.inl"
#include "params.h"

namespace pdn {
namespace quantize {
namespace {

// activation(input) * channel_scale of `V` adjacent vectors, the first at channel `c` of a row.
template <class T, Activation A, int V, class Lanes>
PDN_INLINE void transformed(const QuantizeParams& p, const T* x, int64_t c, vf* v, Lanes lanes) {
    for (int i = 0; i < V; ++i) v[i] = load_lanes(x + c + i * kWidth, lanes);
    if constexpr (A == Activation::geglu) {
        for (int i = 0; i < V; ++i) v[i] = v[i] * fast_gelu(load_lanes(x + p.channels + c + i * kWidth, lanes));
    } else if constexpr (is_leaky_relu(A)) {  // one instance for all slopes
        for (int i = 0; i < V; ++i) v[i] = leaky_relu(v[i], leaky_slope(p.activation));
    } else {
        for (int i = 0; i < V; ++i) v[i] = fast_activate(v[i], static_cast<int>(A));
    }
    if (p.channel_scale)
        for (int i = 0; i < V; ++i) v[i] = v[i] * load_lanes(p.channel_scale + c + i * kWidth, lanes);
}

// As each_vector, with kTogether vectors at once as long as there are so many: body(Vectors, first channel, lanes).
template <int V>
struct Vectors {};

template <class Body>
PDN_INLINE void each_stretch(int64_t channels, const Body& body) {
    int64_t c = 0;
    for (; c + kTogether * kWidth <= channels; c += kTogether * kWidth) body(Vectors<kTogether>{}, c, AllLanes{});
    for (; c + kWidth <= channels; c += kWidth) body(Vectors<1>{}, c, AllLanes{});
    if (c == channels) return;
    if (channels < kWidth)
        body(Vectors<1>{}, static_cast<int64_t>(0), static_cast<int>(channels));
    else
        body(Vectors<1>{}, channels - kWidth, AllLanes{});
}

template <class T, Activation A>
void quantize_given(const QuantizeParams& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(p.input) + row * p.row_stride;
        int8_t* y = p.output + row * p.channels;
        const int64_t at = row * p.scale_step;
        const Codes codes = codes_of(p.scale[at], p.zero_point ? p.zero_point + at : nullptr);
        const auto some = [&]<int V>(Vectors<V>, int64_t c, auto lanes) __attribute__((always_inline)) {
            vf v[V];
            transformed<T, A, V>(p, x, c, v, lanes);
            for (int i = 0; i < V; ++i) quantize_lanes(y + c + i * kWidth, v[i], codes, lanes);
        };
        each_stretch(p.channels, some);
    }
}

// Each row twice: the range, then the codes. What is quantized waits in `values` unless it is the input itself.
template <class T, Activation A>
void quantize_dynamic(const QuantizeParams& p, int64_t begin, int64_t end, float* values) {
    const bool plain = A == Activation::none && p.channel_scale == nullptr;
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(p.input) + row * p.row_stride;
        int8_t* y = p.output + row * p.channels;
        Range range;
        const auto add = [&]<int V>(Vectors<V>, int64_t c, auto lanes) __attribute__((always_inline)) {
            vf v[V];
            transformed<T, A, V>(p, x, c, v, lanes);
            for (int i = 0; i < V; ++i) range.add(v[i]);
            if (plain) return;
            for (int i = 0; i < V; ++i) store_lanes(values + c + i * kWidth, v[i], lanes);
        };
        each_stretch(p.channels, add);
        const Codes codes = codes_of(range, p.symmetric);
        p.out_scale[row] = codes.scale;
        p.out_zero_point[row] = codes.zero_point;
        each_vector(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            const vf v = plain ? load_lanes(x + c, lanes) : load_lanes(values + c, lanes);
            quantize_lanes(y + c, v, codes, lanes);
        });
    }
}

template <class T, Activation A>
void quantize_rows(const QuantizeParams& p, int64_t begin, int64_t end, void* scratch) {
    if (p.scale)
        quantize_given<T, A>(p, begin, end);
    else
        quantize_dynamic<T, A>(p, begin, end, static_cast<float*>(scratch));
}

template <class T>
void quantize_typed(const QuantizeParams& p, int64_t begin, int64_t end, void* scratch) {
    switch (p.activation) {
        case Activation::none:
            return quantize_rows<T, Activation::none>(p, begin, end, scratch);
        case Activation::relu:
            return quantize_rows<T, Activation::relu>(p, begin, end, scratch);
        case Activation::silu:
            return quantize_rows<T, Activation::silu>(p, begin, end, scratch);
        case Activation::gelu:
            return quantize_rows<T, Activation::gelu>(p, begin, end, scratch);
        case Activation::gelu_tanh:
            return quantize_rows<T, Activation::gelu_tanh>(p, begin, end, scratch);
        case Activation::leaky_relu_001:
        case Activation::leaky_relu_01:
        case Activation::leaky_relu_02:
            return quantize_rows<T, Activation::leaky_relu_001>(p, begin, end, scratch);
        case Activation::geglu:
            return quantize_rows<T, Activation::geglu>(p, begin, end, scratch);
        case Activation::softplus:  // refused by the bindings
            return;
    }
}

void quantize(const QuantizeParams& p, int64_t begin, int64_t end, void* scratch) {
    switch (p.dtype) {
        case DType::float32:
            return quantize_typed<float>(p, begin, end, scratch);
        case DType::bfloat16:
            return quantize_typed<bf16>(p, begin, end, scratch);
        case DType::float16:
            return quantize_typed<fp16>(p, begin, end, scratch);
    }
}

int64_t quantize_scratch(const QuantizeParams& p) {
    return p.scale ? 0 : p.channels * static_cast<int64_t>(sizeof(float));
}

PDN_INLINE vi load_codes(const int8_t* p, AllLanes) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    vi v;
    for (int i = 0; i < kWidth; ++i) v[i] = p[i];
    return v;
#endif
}

PDN_INLINE vi load_codes(const int8_t* p, int n) {
    int8_t lanes[kWidth] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n));
    return load_codes(lanes, AllLanes{});
}

template <class T>
void dequantize_rows(const DequantizeParams& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const int8_t* x = p.input + row * p.row_stride;
        T* y = static_cast<T*>(p.output) + row * p.channels;
        const float scale = p.scale[row * p.scale_step];
        const int32_t zero_point = p.zero_point ? p.zero_point[row * p.scale_step] : 0;
        each_vector(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            const vf steps = __builtin_convertvector(load_codes(x + c, lanes) - zero_point, vf);
            store_lanes(y + c, steps * scale, lanes);
        });
    }
}

void dequantize(const DequantizeParams& p, int64_t begin, int64_t end) {
    switch (p.dtype) {
        case DType::float32:
            return dequantize_rows<float>(p, begin, end);
        case DType::bfloat16:
            return dequantize_rows<bf16>(p, begin, end);
        case DType::float16:
            return dequantize_rows<fp16>(p, begin, end);
    }
}

}  // namespace
}  // namespace quantize
}  // namespace pdn
