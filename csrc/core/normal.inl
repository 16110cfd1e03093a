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

// sin(x) = x + x^3 S(x^2), to 5e-9 of x, and cos(x) = 1 + x^2 C(x^2), to 5e-8, for |x| <= pi / 2.
constexpr float kSine[4] = {-1.666666046e-1f, 8.333088167e-3f, -1.981111276e-4f, 2.608932673e-6f};
constexpr float kCosine[4] = {-4.999993229e-1f, 4.166398946e-2f, -1.385592719e-3f, 2.319438654e-5f};

// log(1 + t) = t - t^2 / 2 + t^3 P(t) for sqrt(1/2) <= 1 + t <= sqrt(2), to 2.7e-7 of it, of which a root leaves half.
constexpr float kLog[6] = {3.333424576e-1f,  -2.498326737e-1f, 1.992450208e-1f,
                           -1.713711822e-1f, 1.602438761e-1f,  -1.019176944e-1f};

PDN_INLINE vf polynomial(const float (&c)[4], vf s) { return ((c[3] * s + c[2]) * s + c[1]) * s + c[0]; }

// sqrt(-2 log(u)) with u = (word + 1/2) / 2^32. Near 1 the logarithm is taken from 1 - u, which loses no bit.
PDN_INLINE vf normal_radius(vu words) {
    const vi upper = (vi)words >> 31;  // all bits or none
    const vf q = __builtin_convertvector((vi)words ^ upper, vf) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
    const vf u = (vi)words < 0 ? 1.f - q : q;
    const vi power = ((vi)u - kRootHalfBits) >> 23;
    vf t = (vf)((vi)u - (power << 23)) - 1.f;
    t = power == 0 ? -q : t;
    vf p = splat(kLog[5]);
    for (int i = 4; i >= 0; --i) p = p * t + kLog[i];
    const vf half = t * t * (0.5f - t * p) - t;  // -log(1 + t)
    return square_root(__builtin_convertvector(power, vf) * (-2.f * kLn2) + (half + half));
}

// radius times cos and sin of pi word / 2^31, the word signed. A half turn is taken off in integers, so that small
// angles lose no bit.
PDN_INLINE void turn(vf radius, vu words, vf& cosine, vf& sine) {
    const vu half = (words + 0x40000000u) & 0x80000000u;
    const vf x = __builtin_convertvector((vi)(words ^ half), vf) * 1.4629180792671596e-9f;  // pi / 2^31
    const vf s = x * x;
    radius = (vf)((vu)radius ^ half);
    cosine = radius * (polynomial(kCosine, s) * s + 1.f);
    sine = radius * (polynomial(kSine, s) * (s * x) + x);
}

// The normal numbers of `blocks` times kNoiseBlock columns, the first of which is a multiple of it. Classes 0 and 1 of
// a block share a radius and an angle, 2 and 3 too. Several blocks in a call: what the rounds make of the row alone,
// they make once.
__attribute__((noinline)) void normal_blocks(int64_t column, int64_t blocks, const NoiseRow& of, float* z) {
    constexpr int kVectors = kNoiseLanes / kWidth;
    const NoiseRow row = of;
    for (int64_t block = 0; block < blocks; ++block) {
        NoiseWords words;
        noise_words(column + block * kNoiseBlock, row, words);
        float* here = z + block * kNoiseBlock;
        for (int pair = 0; pair < 2; ++pair)
            for (int i = 0; i < kVectors; ++i) {
                const int even = 2 * pair * kVectors + i, odd = even + kVectors;
                vf cosine, sine;
                turn(normal_radius(words.v[even]), words.v[odd], cosine, sine);
                store(here + even * kWidth, cosine);
                store(here + odd * kWidth, sine);
            }
    }
}

}  // namespace
}  // namespace pdn
