// What the int8 CUDA kernels share: codes of values, scales of ranges, and loads and stores whose element type is
// chosen at run time (one uniform branch per access: these kernels wait for memory, and one instance serves all types).
#pragma once

#include "cuda_elements.h"
#include "cuda_util.cuh"

namespace pdn {
namespace {

using cuda::Element;

constexpr float kSmallestScale = 1.17549435e-38f;  // below it, a range is too narrow for a normal scale

PDN_HD float divide(float x, float y) {  // correctly rounded, whatever the compiler's flags
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(x, y);
#else
    return x / y;
#endif
}

PDN_HD bool is_nan(float x) { return x != x; }

// sum + the products of four pairs of int8.
PDN_HD int dot4(uint32_t a, uint32_t b, int sum) {
#if defined(__CUDA_ARCH__)
    return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
#else
    for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return sum;
#endif
}

// int8 code of `steps` = value / scale, not yet rounded. NaN becomes the code of 0.
PDN_HD int code_of(float steps, int zero_point, int low) {
    const float rounded = is_nan(steps) ? 0.f : rintf(steps);
    return static_cast<int>(fminf(fmaxf(rounded + static_cast<float>(zero_point), static_cast<float>(low)), 127.f));
}

// One scale and zero point; a null `zero_point` means symmetric codes.
struct Grid {
    float scale;
    int zero_point, low;
};

PDN_HD Grid load_grid(const float* scale, const int32_t* zero_point, int64_t index = 0) {
    return {scale[index], zero_point ? zero_point[index] : 0, zero_point ? -128 : -127};
}

// The grid of the values in low..high, a range that includes 0.
PDN_HD Grid grid_of_range(float low, float high, bool nan, bool symmetric) {
    Grid g{symmetric ? divide(fmaxf(-low, high), 127.f) : divide(high - low, 255.f), 0, symmetric ? -127 : -128};
    if (nan) g.scale = NAN;
    if (g.scale < kSmallestScale) g.scale = 1.f;
    if (!symmetric) g.zero_point = code_of(-128.f - divide(low, g.scale), 0, -128);
    return g;
}

// ------------------------------------------------------------------------------------------- four and eight elements

PDN_HD float load_element(const void* base, Element type, int64_t index) {
    if (type == Element::float32) return load1(static_cast<const float*>(base) + index);
    return type == Element::bfloat16 ? load1(static_cast<const BFloat16*>(base) + index)
                                     : load1(static_cast<const Float16*>(base) + index);
}

template <typename T>
PDN_HD void load8_of(const T* p, Float4 (&x)[2]) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(T) == 2) {
        const uint4 raw = __ldg(reinterpret_cast<const uint4*>(p));
        T v[8];
        memcpy(v, &raw, sizeof raw);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i / 4].v[i % 4] = to_float(v[i]);
        return;
    }
#endif
    x[0] = load4(p), x[1] = load4(p + 4);
}

// `count` of eight elements, the others zero. `vector`: all eight, at an address that is a multiple of eight elements.
PDN_HD void load8(const void* base, Element type, int64_t index, int64_t count, bool vector, Float4 (&x)[2]) {
    if (!vector) {
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i / 4].v[i % 4] = i < count ? load_element(base, type, index + i) : 0.f;
    } else if (type == Element::float32) {
        load8_of(static_cast<const float*>(base) + index, x);
    } else if (type == Element::bfloat16) {
        load8_of(static_cast<const BFloat16*>(base) + index, x);
    } else {
        load8_of(static_cast<const Float16*>(base) + index, x);
    }
}

// `count` of four elements; `vector`: all four, at an address that is a multiple of four elements.
PDN_HD Float4 load4_any(const void* base, Element type, int64_t index, int64_t count, bool vector) {
    if (vector) {
        if (type == Element::float32) return load4(static_cast<const float*>(base) + index);
        return type == Element::bfloat16 ? load4(static_cast<const BFloat16*>(base) + index)
                                         : load4(static_cast<const Float16*>(base) + index);
    }
    Float4 x;
#pragma unroll
    for (int i = 0; i < 4; ++i) x.v[i] = i < count ? load_element(base, type, index + i) : 0.f;
    return x;
}

template <typename T>
PDN_HD void store4_of(T* out, Float4 x, int64_t count, bool vector) {
    if (vector)
        store4(out, x);
    else
        store4_partial(out, x, count);
}

// Floats to `type`, one of the three floating-point ones.
PDN_HD void store4_any(void* base, Element type, int64_t index, Float4 x, int64_t count, bool vector) {
    if (type == Element::float32)
        store4_of(static_cast<float*>(base) + index, x, count, vector);
    else if (type == Element::bfloat16)
        store4_of(static_cast<BFloat16*>(base) + index, x, count, vector);
    else
        store4_of(static_cast<Float16*>(base) + index, x, count, vector);
}

PDN_HD uint32_t pack_codes(const int (&q)[4]) {
    return (q[0] & 0xffu) | (q[1] & 0xffu) << 8 | (q[2] & 0xffu) << 16 | static_cast<uint32_t>(q[3]) << 24;
}

// `count` of four codes; `vector`: all four, at an address that is a multiple of four.
PDN_HD void store4_codes(int8_t* out, const int (&q)[4], int64_t count, bool vector) {
    if (vector) {
        *reinterpret_cast<uint32_t*>(out) = pack_codes(q);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < count) out[i] = static_cast<int8_t>(q[i]);
}

// Codes of eight values, times `inverse` if that is not 0, else divided by the scale. `vector` as in load8.
PDN_HD void store8_codes(int8_t* out, const Float4 (&x)[2], const Grid& g, float inverse, int64_t count, bool vector) {
    int q[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float v = x[i / 4].v[i % 4];
        q[i / 4][i % 4] = code_of(inverse != 0.f ? v * inverse : divide(v, g.scale), g.zero_point, g.low);
    }
    if (vector) {
        struct alignas(8) Two {
            uint32_t v[2];
        };
        *reinterpret_cast<Two*>(out) = Two{{pack_codes(q[0]), pack_codes(q[1])}};
    } else {
        store4_codes(out, q[0], count, false);
        store4_codes(out + 4, q[1], count - 4, false);
    }
}

// The least and greatest of values and 0, and whether one is NaN.
struct Range {
    float low = 0.f, high = 0.f;
    bool nan = false;

    PDN_HD void add(float x) {
        low = fminf(low, x), high = fmaxf(high, x);
        nan = nan || is_nan(x);
    }
    PDN_HD void add8(const Float4 (&x)[2], int64_t count) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) add(x[i / 4].v[i % 4]);
    }
};

#if defined(__CUDACC__) || defined(PDN_EMULATED_CUDA)
// Over a warp; every lane gets the result.
__device__ __forceinline__ Range warp_range(Range r) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        r.low = fminf(r.low, __shfl_xor_sync(kEveryLane, r.low, step));
        r.high = fmaxf(r.high, __shfl_xor_sync(kEveryLane, r.high, step));
    }
    r.nan = __any_sync(kEveryLane, r.nan);
    return r;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kEveryLane, x, step);
    return x;
}
#endif

}  // namespace
}  // namespace pdn
