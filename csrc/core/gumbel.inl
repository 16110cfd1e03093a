// Gumbel noise in vectors: philox.h, lane by lane. Included once per ISA level.
#pragma once

#include "epilogue.inl"
#include "philox.h"

namespace pdn {
namespace {

typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));
typedef uint64_t vw __attribute__((vector_size(kWidth * 4)));  // a word in the lower half of each lane

// Products of the lanes' lower halves.
PDN_INLINE vw product(vw a, uint32_t by) {
    const vw b = by - vw{};
#if defined(__AVX512F__)
    return (vw)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vw)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (vw)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffu) * b;
#endif
}

// Philox4x32-10 of counters of which each fills a lane of 64 bits; what the upper halves hold does not matter.
template <int Count>
PDN_INLINE void philox_rounds(const NoiseRow& row, vw (&c)[4][Count]) {
    uint32_t k0 = row.key[0], k1 = row.key[1];
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
        for (int i = 0; i < Count; ++i) {
            const vw first = product(c[0][i], kPhiloxFirst), second = product(c[2][i], kPhiloxSecond);
            c[0][i] = (second >> 32) ^ c[1][i] ^ k0;
            c[2][i] = (first >> 32) ^ c[3][i] ^ k1;
            c[1][i] = second, c[3][i] = first;
        }
        k0 += kPhiloxKeyFirst, k1 += kPhiloxKeySecond;
    }
}

// words[j][i]: word j of the counters first + i * kWidth, + 1, ...
template <int Vectors>
PDN_INLINE void philox(uint32_t first, const NoiseRow& row, vu (&words)[4][Vectors]) {
    vu lanes, upper;
    for (int i = 0; i < kWidth; ++i) lanes[i] = static_cast<uint32_t>(i), upper[i] = i % 2 ? 0xffffffffu : 0;
    vw c[4][2 * Vectors];
    for (int i = 0; i < 2 * Vectors; ++i) {
        const vw counter = (vw)(lanes + (first + static_cast<uint32_t>(i / 2 * kWidth)));
        c[0][i] = i % 2 ? counter >> 32 : counter;
        c[1][i] = row.row[0] - vw{}, c[2][i] = row.row[1] - vw{}, c[3][i] = row.step - vw{};
    }
    philox_rounds(row, c);
    for (int j = 0; j < 4; ++j)
        for (int i = 0; i < Vectors; ++i) words[j][i] = ((vu)c[j][2 * i] & ~upper) | (vu)(c[j][2 * i + 1] << 32);
}

PDN_INLINE vf log_of_parts(vf t, vf exponent) {
    vf p = splat(log_coefficient(7));
    for (int i = 6; i >= 0; --i) p = p * t + log_coefficient(i);
    return exponent * kLn2 + (t * t * (t * p - 0.5f) + t);
}

// The parts of positive normal numbers: x = (1 + t) 2^exponent.
PDN_INLINE void split(vf x, vf& t, vf& exponent) {
    const vi power = ((vi)x - kRootHalfBits) >> 23;
    t = (vf)((vi)x - (power << 23)) - 1.f;
    exponent = __builtin_convertvector(power, vf);
}

PDN_INLINE vf gumbel(vu words) {
    const vi upper = (vi)words >> 31;  // all bits or none
    const vf q = (__builtin_convertvector((vi)words ^ upper, vf) + 0.5f) * 2.3283064365386963e-10f;
    const vi half = q > 0.29289322f;
    vf t, exponent;
    split(q, t, exponent);
    t = select(upper, t, select(half, 1.f - 2.f * q, -q));
    exponent = select(upper, exponent, select(half, splat(-1.f), vf{}));
    split(-log_of_parts(t, exponent), t, exponent);
    return -log_of_parts(t, exponent);
}

// The words of a block of kNoiseBlock columns, the first of which is a multiple of it.
struct NoiseWords {
    vu v[kNoiseBlock / kWidth];
};

PDN_INLINE void noise_words(int64_t column, const NoiseRow& row, NoiseWords& block) {
    constexpr int kVectors = kNoiseLanes / kWidth;  // of lanes
#if defined(__AVX512F__)
    constexpr int kTogether = 2;  // as many as there are registers for
#else
    constexpr int kTogether = 1;
#endif
    for (int lane = 0; lane < kVectors; lane += kTogether) {
        vu words[4][kTogether];
        philox(static_cast<uint32_t>(column / 4 + lane * kWidth), row, words);
        for (int j = 0; j < 4; ++j)
            for (int i = 0; i < kTogether; ++i) block.v[j * kVectors + lane + i] = words[j][i];
    }
}

// output[i] = input[i] + scale * noise of the block's column i.
PDN_INLINE void add_gumbel(const float* input, const NoiseWords& block, float scale, float* output) {
    for (int i = 0; i < kNoiseBlock / kWidth; ++i)
        store(output + i * kWidth, load(input + i * kWidth) + scale * gumbel(block.v[i]));
}

}  // namespace
}  // namespace pdn
