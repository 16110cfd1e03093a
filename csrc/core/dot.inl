// The product of four bytes, or two 16-bit numbers, per 32-bit lane: what one step of a register tile of int8 kernels
// does. Included once per ISA level.
//
// With VNNI a step takes 4 channels as unsigned bytes (code + 128) against signed weights; without it 2 channels as
// 16-bit numbers, whose pairwise products and sums are exact. Never the saturating or the u8 x s8 -> s16 form.
// The 128 is taken out again through the sum of the weights: `kOffset` says by how much a stored code is too large.
#pragma once

#include "vec.h"

namespace pdn {
namespace {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int kChannels = 4;  // per step
constexpr int kOffset = 128;
typedef uint8_t Code;  // an activation as the tile reads it
typedef int8_t Weight;
#else
constexpr int kChannels = 2;
constexpr int kOffset = 0;
typedef int16_t Code;
typedef int16_t Weight;
#endif
static_assert(kChannels * sizeof(Code) == 4 && kChannels * sizeof(Weight) == 4, "a step fills a 32-bit lane");

typedef int32_t vi_unaligned __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

PDN_INLINE vi load_lanes(const void* p) { return *static_cast<const vi_unaligned*>(p); }
PDN_INLINE void store_lanes(void* p, vi v) { *static_cast<vi_unaligned*>(p) = v; }
PDN_INLINE vi splat_lanes(int32_t x) { return x - vi{}; }

// The step of one pixel, the same in every lane.
PDN_INLINE vi operand(const void* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
#if defined(__AVX512F__)
    return (vi)_mm512_set1_epi32(x);
#elif defined(__AVX2__)
    return (vi)_mm256_set1_epi32(x);
#else
    return splat_lanes(x);
#endif
}

// acc + x . w in every lane, modulo 2^32. In assembly, since GCC 12 copies the accumulators of the intrinsics about.
PDN_INLINE vi dot(vi acc, vi x, vi w) {
#if defined(__AVX512VNNI__)
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
    return acc;
#elif defined(__AVXVNNI__) && defined(PDN_EVEX_VNNI)  // the same instruction for processors that have AVX-512 only
    asm("%{evex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(x), "x"(w));
    return acc;
#elif defined(__AVXVNNI__)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(x), "x"(w));
    return acc;
#elif defined(__AVX512BW__)
    return acc + (vi)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#elif defined(__AVX2__)
    return acc + (vi)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#elif defined(__SSE2__)
    return acc + (vi)_mm_madd_epi16((__m128i)x, (__m128i)w);
#else
    return acc + (x << 16 >> 16) * (w << 16 >> 16) + (x >> 16) * (w >> 16);
#endif
}

}  // namespace
}  // namespace pdn
