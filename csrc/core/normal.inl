// Standard normal numbers in vectors, by Box and Muller from Philox words. Included once per ISA level.
// pydenoise/reference/sampler_step.py says the same in plain torch.
#pragma once

#include "gumbel.inl"

namespace pdn {
namespace {

PDN_INLINE vf square_root(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (vf)_mm_sqrt_ps((__m128)x);
#else
    vf root;
    for (int i = 0; i < kWidth; ++i) root[i] = __builtin_sqrtf(x[i]);
    return root;
#endif
}

// sin(x) = x + x^3 S(x^2), cos(x) = 1 + x^2 C(x^2) for |x| <= pi / 4, fitted to the relative errors: 4e-9 and 4e-8.
constexpr float kSine[3] = {-1.666665460e-1f, 8.332160293e-3f, -1.951521821e-4f};
constexpr float kCosine[3] = {-4.999988467e-1f, 4.165577261e-2f, -1.359179350e-3f};

// sqrt(-2 log(u)) with u = (word + 1/2) / 2^32. Near 1 the logarithm is taken from 1 - u, which loses no bit.
PDN_INLINE vf normal_radius(vu words) {
    const vi upper = (vi)words >> 31;  // all bits or none
    const vf q = __builtin_convertvector((vi)words ^ upper, vf) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
    const vf u = select(upper, 1.f - q, q);
    const vi power = ((vi)u - kRootHalfBits) >> 23;
    vf t = (vf)((vi)u - (power << 23)) - 1.f;
    t = select(power == 0, -q, t);
    vf p = splat(log_coefficient(7));
    for (int i = 6; i >= 0; --i) p = p * t + log_coefficient(i);
    const vf half = t * t * (0.5f - t * p) - t;  // -log(1 + t)
    return square_root(__builtin_convertvector(power, vf) * (-2.f * kLn2) + (half + half));
}

// cos and sin of pi word / 2^31, the word signed. The quarter turn that is nearest is taken off in integers, so small
// angles lose no bit.
PDN_INLINE void cosine_sine(vu words, vf& cosine, vf& sine) {
    const vu quarter = (words + 0x20000000u) >> 30;
    const vf x = __builtin_convertvector((vi)(words - (quarter << 30)), vf) * 1.4629180792671596e-9f;  // pi / 2^31
    const vf s = x * x;
    vf odd = splat(kSine[2]);
    odd = (odd * s + kSine[1]) * s + kSine[0];
    odd = odd * s * x + x;
    vf even = splat(kCosine[2]);
    even = (even * s + kCosine[1]) * s + kCosine[0];
    even = even * s + 1.f;
    const vi swapped = -(vi)(quarter & 1u);
    cosine = (vf)((vu)select(swapped, odd, even) ^ ((quarter + 1u) << 30 & 0x80000000u));
    sine = (vf)((vu)select(swapped, even, odd) ^ (quarter << 30 & 0x80000000u));
}

// The normal numbers of a block of kNoiseBlock columns: classes 0 and 1 share a radius and an angle, 2 and 3 too.
PDN_INLINE void normal_block(int64_t column, const NoiseRow& row, float* z) {
    constexpr int kVectors = kNoiseLanes / kWidth;
    NoiseWords words;
    noise_words(column, row, words);
    for (int pair = 0; pair < 2; ++pair)
        for (int i = 0; i < kVectors; ++i) {
            const int even = 2 * pair * kVectors + i, odd = even + kVectors;
            vf cosine, sine;
            const vf radius = normal_radius(words.v[even]);
            cosine_sine(words.v[odd], cosine, sine);
            store(z + even * kWidth, radius * cosine);
            store(z + odd * kWidth, radius * sine);
        }
}

}  // namespace
}  // namespace pdn
