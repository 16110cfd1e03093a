// IEEE half precision beside vec.h's float32 and bfloat16: storage only, arithmetic is in float32.
#pragma once

#include "vec.h"

namespace pdn {
namespace {

struct fp16 {
    uint16_t bits;
};

PDN_INLINE float from_fp16(fp16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    uint32_t wide = rest << 13;
    float f;
    if (rest >= 0x7c00u) {  // infinity, NaN
        wide |= 0x7f800000u;
        std::memcpy(&f, &wide, sizeof f);
    } else {  // the exponent is off by 112; subnormal numbers come out right by the same product
        std::memcpy(&f, &wide, sizeof f);
        f *= 5.192296858534828e33f;  // 2^112
    }
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    bits |= sign;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// Round to nearest, ties to even; too large becomes infinity, NaN stays NaN.
PDN_INLINE fp16 to_fp16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    uint32_t half;
    if (bits > 0x7f800000u) {
        half = 0x7e00u;
    } else if (bits >= 0x47800000u) {  // 2^16 and more
        half = 0x7c00u;
    } else if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits at the end
        float f;
        std::memcpy(&f, &bits, sizeof f);
        f += 0.5f;
        std::memcpy(&half, &f, sizeof half);
        half -= 0x3f000000u;
    } else {
        half = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;
    }
    return {static_cast<uint16_t>(sign | half)};
}

PDN_INLINE vf load(const fp16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && defined(__AVX2__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vf v;
    for (int i = 0; i < kWidth; ++i) v[i] = from_fp16(p[i]);
    return v;
#endif
}

PDN_INLINE void store(fp16* p, vf v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kWidth; ++i) p[i] = to_fp16(v[i]);
#endif
}

PDN_INLINE vf load_partial(const fp16* p, int n) {
    fp16 lanes[kWidth] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(fp16));
    return load(lanes);
}

PDN_INLINE void store_partial(fp16* p, vf v, int n) {
    fp16 lanes[kWidth];
    store(lanes, v);
    std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(fp16));
}

}  // namespace
}  // namespace pdn
