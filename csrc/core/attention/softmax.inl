// One pass of a streaming softmax over the scores of a query and a block of keys. Scores are logarithms to base 2.
// Included once per ISA level.
#pragma once

#include "tile.inl"

namespace pdn {
namespace attention {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kNothing = -__builtin_inff();  // the score of a key that does not count

PDN_INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return vmax(a, b);
#endif
}

PDN_INLINE float largest_lane(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float best = v[0];
    for (int i = 1; i < kWidth; ++i) best = v[i] > best ? v[i] : best;
    return best;
#endif
}

// 2^x for x <= 0, within 1.5e-7 of itself: 2^floor(x) times a polynomial in the rest, fitted to the relative error.
// -inf gives 0, results below the normal numbers may; NaN stays NaN.
PDN_INLINE vf exp2_negative(vf x) {
#if defined(__AVX512F__)
    const vf rest = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // 0 where x is -inf
#else
    const vf clamped = select(x < -127.f, splat(-127.f), x);
    const vf shifted = (clamped - 0.5f) + 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
    const vf rest = clamped - (shifted - 12582912.f);
#endif
    vf poly = splat(1.8775766948e-3f);
    poly = poly * rest + 8.9893396944e-3f;
    poly = poly * rest + 5.5826317519e-2f;
    poly = poly * rest + 2.4015361071e-1f;
    poly = poly * rest + 6.9315308332e-1f;
    poly = poly * rest + 9.9999994040e-1f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)poly, (__m512)x);
#else
    const vf result = select(x < -126.f, vf{}, (vf)((vi)poly + ((vi)shifted << 23)));
    return select(x != x, x, result);
#endif
}

// (2^rest - 1) / rest for rest in [-1/2, 1/2], fitted to the relative error of 2^rest: 1e-7, or 1e-4 with Degree 3.
template <int Degree>
PDN_INLINE vf exp2_slope(vf rest) {
    static_assert(Degree == 3 || Degree == 5, "the polynomials there are");
    if constexpr (Degree == 3) {
        const vf poly = 5.5008929223e-2f * rest + 2.4221096933e-1f;
        return poly * rest + 6.9328290224e-1f;
    }
    vf poly = 1.3264727313e-3f * rest + 9.6715129912e-3f;
    poly = poly * rest + 5.5507335812e-2f;
    poly = poly * rest + 2.4022242427e-1f;
    return poly * rest + 6.9314700365e-1f;
}

// 2^x for x <= 100, within 2e-7 of itself (1e-4 with Degree 3); 0 for -inf. Where x is NaN or +inf, the result or else
// `check` becomes NaN. Few of its operations need the units of products, which the kernels keep busy.
template <int Degree>
PDN_INLINE vf exp2_checked(vf x, [[maybe_unused]] vf& check) {
#if defined(__AVX512F__)
    const vf whole = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf rest = x - whole;
    const vf poly = exp2_slope<Degree>(rest) * rest + 1.f;
    return (vf)_mm512_scalef_ps((__m512)poly, (__m512)whole);  // 0 for -inf although `poly` is NaN there
#else
    const vf clamped = larger(splat(-127.f), x);
    const vf shifted = clamped + 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
    const vf rest = clamped - (shifted - 12582912.f);
    check += rest;
    const vf poly = exp2_slope<Degree>(rest) * rest + 1.f;  // exactly 1 at -127, where the bits below add up to 0
    return (vf)((vi)poly + ((vi)shifted << 23));
#endif
}

// log2(x) of normal positive x, within 2e-7 (absolute where |result| < 1).
PDN_INLINE vf log2_positive(vf x) {
    const vi bits = (vi)x, exponent = (bits - 0x3f3504f3) >> 23;  // of x / m for m in [sqrt(1/2), sqrt(2))
    const vf m = (vf)(bits - (exponent << 23));
    const vf s = (m - 1.f) / (m + 1.f), square = s * s;
    vf poly = splat(2.f / 9.f);
    poly = poly * square + 2.f / 7.f;
    poly = poly * square + 2.f / 5.f;
    poly = poly * square + 2.f / 3.f;
    poly = poly * square + 2.f;
    return __builtin_convertvector(exponent, vf) + poly * s * kLog2E;
}

// 2^x for any x. Too large a result is infinite or larger than 2^126.
PDN_INLINE vf exp2_any(vf x) {
#if defined(__AVX512F__)
    return exp2_negative(x);
#else
    return exp2_negative(select(x > 127.f, splat(127.f), x));
#endif
}

PDN_INLINE float largest_score(const float* scores, int64_t count) {
    vf best[2] = {splat(kNothing), splat(kNothing)};
    int64_t i = 0;
    for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
        best[0] = larger(best[0], load(scores + i));
        best[1] = larger(best[1], load(scores + i + kWidth));
    }
    if (i < count) best[0] = larger(best[0], load(scores + i));
    return largest_lane(larger(best[0], best[1]));
}

// Replace scores by 2^(score - reference), as cells, and return the sums over the lanes' own.
template <class Cells>
PDN_INLINE vf exponentials(float* scores, int64_t count, float reference) {
    vf sum{};
#if defined(__AVX512BF16__)
    if constexpr (Cells::kPerCell == 2) {
        for (int64_t i = 0; i < count; i += 2 * kWidth) {
            const vf low = exp2_negative(load(scores + i) - reference);
            const vf high = exp2_negative(load(scores + i + kWidth) - reference);
            sum += low + high;
            store(scores + i / 2, (vf)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
        }
        return sum;
    }
#endif
    for (int64_t i = 0; i < count; i += kWidth) {
        const vf weight = exp2_negative(load(scores + i) - reference);
        sum += weight;
        store(scores + i, weight);
    }
    return sum;
}

}  // namespace
}  // namespace attention
}  // namespace pdn
