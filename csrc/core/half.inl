// float16 in memory, float32 in registers. Included once per ISA level; without F16C by integer arithmetic.
#pragma once

#include "vec.h"

namespace pdn {
namespace {

struct fp16 {
    uint16_t bits;
};

// Lanes hold a float16 in their low half. Exact, subnormals, infinities and NaN included.
PDN_INLINE vf from_fp16_bits(vi h) {
    const vi magnitude = (h & 0x7fff) << 13;
    const vf scaled = (vf)magnitude * 5.192296858534828e+33f;  // 2^112: from the bias of float16 to that of float32
    const vi infinite = (magnitude >= (0x7c00 << 13)) & 0x7f800000;
    return (vf)((vi)scaled | infinite | ((h & 0x8000) << 16));
}

// To nearest, ties to even; NaN stays a (quiet) NaN.
PDN_INLINE vi to_fp16_bits(vf x) {
    const vi bits = (vi)x, magnitude = bits & 0x7fffffff;
    // adding 0.5 leaves the subnormal float16 in the low bits, rounded by the addition
    const vi tiny = (vi)((vf)magnitude + 0.5f) - 0x3f000000;
    const vi usual = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const vi is_tiny = magnitude < 0x38800000, is_large = magnitude >= 0x477ff000, is_nan = magnitude > 0x7f800000;
    vi h = (is_tiny & tiny) | (~is_tiny & usual);
    h = (is_large & 0x7c00) | (~is_large & h);
    h = (is_nan & 0x7e00) | (~is_nan & h);
    return h | ((bits >> 16) & 0x8000);
}

PDN_INLINE vf load(const fp16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vi h;
    for (int i = 0; i < kWidth; ++i) h[i] = p[i].bits;
    return from_fp16_bits(h);
#endif
}

PDN_INLINE void store(fp16* p, vf v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    const vi h = to_fp16_bits(v);
    for (int i = 0; i < kWidth; ++i) p[i].bits = static_cast<uint16_t>(h[i]);
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
