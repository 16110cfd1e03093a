// CUDA helpers that every op shares: storage types, four-channel loads and stores, the epilogue. No torch, and no
// cuda_fp16.h: its parsing would double the compile time of a file, and three conversions are all that is needed.
//
// What is marked PDN_HD runs on the host as well, so that a kernel's arithmetic is checked on a machine without a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "activation.h"

#define PDN_HD __host__ __device__ __forceinline__
#define PDN_DEVICE __device__ __forceinline__

namespace pdn {
namespace {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

constexpr uint32_t kEveryLane = 0xffffffffu;

struct alignas(16) Float4 {
    float v[4];
};

template <typename To, typename From>
PDN_HD To bit_copy(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// ------------------------------------------------------------------------------------------------------ conversions

PDN_HD float to_float(float x) { return x; }

PDN_HD float to_float(BFloat16 x) { return bit_copy<float>(static_cast<uint32_t>(x.bits) << 16); }

PDN_HD float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
    return f;
#else
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bit_copy<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    const float value = bit_copy<float>(magnitude << 13) * 5.192296858534828e33f;  // 2^112 moves the exponent's bias
    return bit_copy<float>(bit_copy<uint32_t>(value) | sign);
#endif
}

PDN_HD void from_float(float x, float& y) { y = x; }

PDN_HD void from_float(float x, BFloat16& y) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    const uint32_t bits = bit_copy<uint32_t>(x);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    y.bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

PDN_HD void from_float(float x, Float16& y) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    const uint32_t bits = bit_copy<uint32_t>(x), sign = bits >> 16 & 0x8000u;
    const float magnitude = std::fabs(x);
    uint32_t half;
    if (!(magnitude < 65520.f)) {
        half = std::isnan(x) ? 0x7e00u : 0x7c00u;
    } else if (magnitude < 6.103515625e-05f) {  // subnormal: adding 0.5 rounds to a multiple of 2^-24
        half = bit_copy<uint32_t>(magnitude + 0.5f) - 0x3f000000u;
    } else {
        const uint32_t m = bits & 0x7fffffffu;
        half = (m - 0x38000000u + 0xfffu + (m >> 13 & 1u)) >> 13;
    }
    y.bits = static_cast<uint16_t>(half | sign);
#endif
}

// --------------------------------------------------------------------------------------------------- memory accesses

// A read-only scalar from global memory.
template <typename T>
PDN_HD float load1(const T* p) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(T) == 4) {
        return __ldg(p);
    } else {
        T x;
        x.bits = __ldg(&p->bits);
        return to_float(x);
    }
#else
    return to_float(*p);
#endif
}

// Four consecutive read-only elements at an address that is a multiple of four elements.
template <typename T>
PDN_HD Float4 load4(const T* p) {
    Float4 r;
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(T) == 4) {
        const float4 raw = __ldg(reinterpret_cast<const float4*>(p));
        r = {raw.x, raw.y, raw.z, raw.w};
    } else {
        const uint2 raw = __ldg(reinterpret_cast<const uint2*>(p));
        T x[4];
        memcpy(x, &raw, sizeof raw);
#pragma unroll
        for (int i = 0; i < 4; ++i) r.v[i] = to_float(x[i]);
    }
#else
    for (int i = 0; i < 4; ++i) r.v[i] = to_float(p[i]);
#endif
    return r;
}

// `n` of four elements, the others zero; element i lies at p[i / repeat].
template <typename T>
PDN_HD Float4 load4_partial(const T* p, int64_t n, int64_t repeat = 1) {
    Float4 r{};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < n) r.v[i] = load1(p + (repeat == 1 ? i : i / repeat));
    return r;
}

template <typename T>
PDN_HD void store4(T* p, Float4 x) {
    struct alignas(4 * sizeof(T)) Four {
        T v[4];
    } out;
#pragma unroll
    for (int i = 0; i < 4; ++i) from_float(x.v[i], out.v[i]);
    *reinterpret_cast<Four*>(p) = out;
}

template <typename T>
PDN_HD void store4_partial(T* p, Float4 x, int64_t n) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < n) from_float(x.v[i], p[i]);
}

PDN_HD Float4 shared4(const float* p) { return *reinterpret_cast<const Float4*>(p); }

// ---------------------------------------------------------------------------------------------------------- epilogue

PDN_HD float quotient(float x, float y) {  // two roundings at most; y = infinity gives 0
#if defined(__CUDA_ARCH__)
    return __fdividef(x, y);
#else
    return x / y;
#endif
}

// `activation` is the number of an elementwise Activation. SiLU and the tanh form of
// GELU are one function, x * sigmoid(x * (linear + cubic * x^2)).
struct Gate {
    float linear, cubic;
};

PDN_HD Gate gate_of(int activation) {
    return activation == 2 ? Gate{1.f, 0.f} : Gate{1.5957691216057308f, 0.0713548162726f};
}

PDN_HD float gated(float x, Gate gate) {
    const float square = fminf(x * x, 1e30f);  // finite: infinity times a zero would be NaN
    return quotient(x, 1.f + expf(-x * fmaf(gate.cubic, square, gate.linear)));
}

PDN_HD float relu(float x) { return x < 0.f ? 0.f : x; }  // keeps NaN, as torch does

PDN_HD float leaky_relu(float x, float slope) { return fmaxf(x, x * slope); }  // slopes below 1; NaN is both

PDN_HD float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }

template <int N>
PDN_HD void activate(Float4 (&x)[N], int activation) {
    auto each = [&x](auto function) {
#pragma unroll
        for (int i = 0; i < N; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) x[i].v[j] = function(x[i].v[j]);
    };
    if (activation == 0) return;  // the branches are out here, so that a thread takes each once
    if (activation == 1) {
        each([](float v) { return relu(v); });
    } else if (activation == 3) {
        each([](float v) { return gelu(v); });
    } else if (is_leaky_relu(static_cast<Activation>(activation))) {
        const float slope = leaky_slope(static_cast<Activation>(activation));
        each([slope](float v) { return leaky_relu(v, slope); });
    } else {
        const Gate gate = gate_of(activation);
        each([gate](float v) { return gated(v, gate); });
    }
}

PDN_HD float activate(float x, int activation) {
    if (activation == 0) return x;
    if (is_leaky_relu(static_cast<Activation>(activation)))
        return leaky_relu(x, leaky_slope(static_cast<Activation>(activation)));
    return activation == 1 ? relu(x) : activation == 3 ? gelu(x) : gated(x, gate_of(activation));
}

}  // namespace
}  // namespace pdn
