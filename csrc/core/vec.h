// Width-generic float vectors for the files that are compiled once per ISA level. GCC/Clang vector extensions: the same
// source becomes SSE2, AVX2 or AVX-512 code, and plain scalar code elsewhere. Everything lives in an anonymous
// namespace: a shared inline symbol would let the linker keep the copy of the wrong ISA level.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define PDN_INLINE inline __attribute__((always_inline))

namespace pdn {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats per vector
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef float vf_unaligned __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef uint16_t bf16;  // the upper half of a float32

PDN_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
PDN_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
PDN_INLINE vf splat(float x) { return x - vf{}; }

// The first `n` lanes (0 <= n <= kWidth); the others read as zero and are not touched in memory.
PDN_INLINE vf load_partial(const float* p, int n) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
#else
    vf v{};
    std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
    return v;
#endif
}

PDN_INLINE void store_partial(float* p, vf v, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), (__m512)v);
#else
    std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
#endif
}

PDN_INLINE float from_bf16(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// Round to nearest, ties to even; NaN stays NaN.
PDN_INLINE bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40u);
    return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

PDN_INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return (vf)_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return (vf)_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
#else
    vf v;
    for (int i = 0; i < kWidth; ++i) v[i] = from_bf16(p[i]);
    return v;
#endif
}

PDN_INLINE void store(bf16* p, vf v) {
#if defined(__AVX512F__)
    const __m512i bits = _mm512_castps_si512((__m512)v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
#else
    for (int i = 0; i < kWidth; ++i) p[i] = to_bf16(v[i]);
#endif
}

PDN_INLINE vf load_partial(const bf16* p, int n) {
    bf16 lanes[kWidth] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(bf16));
    return load(lanes);
}

PDN_INLINE void store_partial(bf16* p, vf v, int n) {
    bf16 lanes[kWidth];
    store(lanes, v);
    std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(bf16));
}

PDN_INLINE float reduce_add(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sum = 0.f;
    for (int i = 0; i < kWidth; ++i) sum += v[i];
    return sum;
#endif
}

}  // namespace
}  // namespace pdn
