// Floats to int8 codes, and what the ops that write codes share: scales from ranges, lanes at the end of a row, a fast
// sigmoid. Included once per ISA level.
#pragma once

#include "epilogue.inl"
#include "fp16.h"

namespace pdn {
namespace {

// ---------------------------------------------------------------------------------------------------------- rows

// All lanes of a vector; where a row is shorter than a vector, an int takes its place.
struct AllLanes {};

template <class T>
PDN_INLINE vf load_lanes(const T* p, AllLanes) {
    return load(p);
}
template <class T>
PDN_INLINE vf load_lanes(const T* p, int n) {
    return load_partial(p, n);
}
template <class T>
PDN_INLINE void store_lanes(T* p, vf v, AllLanes) {
    store(p, v);
}
template <class T>
PDN_INLINE void store_lanes(T* p, vf v, int n) {
    store_partial(p, v, n);
}

// body(first, lanes) for the vectors of a row. The last one overlaps the one before it where the row does not end with
// a vector: what `body` does must bear being done twice. Lanes past a row shorter than a vector hold zeros.
template <class Body>
PDN_INLINE void each_vector(int64_t count, const Body& body) {
    if (count < kWidth) {
        if (count > 0) body(static_cast<int64_t>(0), static_cast<int>(count));
        return;
    }
    int64_t first = 0;
    for (; first + kWidth <= count; first += kWidth) body(first, AllLanes{});
    if (first < count) body(count - kWidth, AllLanes{});
}

// Vectors that are worked on at once, each step for all of them before the next step: a chain of dependent operations
// is long, and a processor looks ahead only so far.
#if defined(__AVX512F__)
constexpr int kTogether = 4;
#else
constexpr int kTogether = 2;
#endif

// --------------------------------------------------------------------------------------------------------- codes

constexpr float kFarCode = 1024.f;  // beyond every code minus every zero point

// One scale and zero point. `lowest` is -127 where symmetric, -128 where affine.
struct Codes {
    float scale;
    int32_t zero_point, lowest;
};

PDN_INLINE Codes codes_of(float scale, const int32_t* zero_point) {
    if (zero_point == nullptr) return {scale, 0, -127};
    return {scale, *zero_point, -128};
}

// To -kFarCode..kFarCode; NaN becomes 0.
PDN_INLINE vf within_codes(vf v) {
#if defined(__AVX512F__)
    const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
    const __m512 low = _mm512_maskz_max_ps(number, (__m512)v, _mm512_set1_ps(-kFarCode));
    return (vf)_mm512_min_ps(low, _mm512_set1_ps(kFarCode));
#elif defined(__AVX2__)
    const __m256 number = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_ORD_Q);
    const __m256 low = _mm256_max_ps(_mm256_and_ps(number, (__m256)v), _mm256_set1_ps(-kFarCode));
    return (vf)_mm256_min_ps(low, _mm256_set1_ps(kFarCode));
#elif defined(__SSE2__)
    const __m128 number = _mm_cmpord_ps((__m128)v, (__m128)v);
    const __m128 low = _mm_max_ps(_mm_and_ps(number, (__m128)v), _mm_set1_ps(-kFarCode));
    return (vf)_mm_min_ps(low, _mm_set1_ps(kFarCode));
#else
    return vmin(vmax(select(v != v, vf{}, v), splat(-kFarCode)), splat(kFarCode));
#endif
}

// To the nearest integer, ties to even; for |v| < 2^22.
PDN_INLINE vi round_even(vf v) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
    return (vi)_mm_cvtps_epi32((__m128)v);
#else
    const vf magic = splat(12582912.f);
    return (vi)(v + magic) - (vi)magic;
#endif
}

// `n` bytes at p: the codes, clamped to lowest..127.
PDN_INLINE void store_codes(int8_t* p, vi codes, int lowest, AllLanes) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm512_cvtsepi32_epi8((__m512i)codes);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_max_epi8(bytes, _mm_set1_epi8(static_cast<char>(lowest))));
#elif defined(__AVX2__)
    const __m128i low = _mm256_castsi256_si128((__m256i)codes), high = _mm256_extracti128_si256((__m256i)codes, 1);
    const __m128i words = _mm_packs_epi32(low, high);
    const __m128i bytes = _mm_max_epi8(_mm_packs_epi16(words, words), _mm_set1_epi8(static_cast<char>(lowest)));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
#elif defined(__SSE2__)
    const __m128i least = _mm_set1_epi16(static_cast<short>(lowest));
    const __m128i words = _mm_max_epi16(_mm_packs_epi32((__m128i)codes, (__m128i)codes), least);
    const int bytes = _mm_cvtsi128_si32(_mm_packs_epi16(words, words));
    std::memcpy(p, &bytes, sizeof bytes);
#else
    for (int i = 0; i < kWidth; ++i)
        p[i] = static_cast<int8_t>(codes[i] < lowest ? lowest : codes[i] > 127 ? 127 : codes[i]);
#endif
}

PDN_INLINE void store_codes(int8_t* p, vi codes, int lowest, int n) {
    int8_t lanes[kWidth];
    store_codes(lanes, codes, lowest, AllLanes{});
    std::memcpy(p, lanes, static_cast<size_t>(n));
}

// rint(v / scale) + zero_point with a true division: exact once clamped.
PDN_INLINE vi exact_codes(vf v, const Codes& codes) {
    return round_even(within_codes(v / codes.scale)) + codes.zero_point;
}

template <class Lanes>
PDN_INLINE void quantize_lanes(int8_t* p, vf v, const Codes& codes, Lanes lanes) {
    store_codes(p, exact_codes(v, codes), codes.lowest, lanes);
}

// The bound of values that round_even takes as they are.
constexpr float kSafeCode = 4194304.f;

// -------------------------------------------------------------------------------------------------- dynamic scales

// Smallest and largest of zero and the values seen, and whether one was NaN.
struct Range {
    vf low{}, high{};
    vi nan{};

    PDN_INLINE void add_finite(vf v) {
#if defined(__AVX512F__)
        low = (vf)_mm512_min_ps((__m512)v, (__m512)low);  // the second operand where one is NaN
        high = (vf)_mm512_max_ps((__m512)v, (__m512)high);
#elif defined(__AVX2__)
        low = (vf)_mm256_min_ps((__m256)v, (__m256)low);
        high = (vf)_mm256_max_ps((__m256)v, (__m256)high);
#elif defined(__SSE2__)
        low = (vf)_mm_min_ps((__m128)v, (__m128)low);
        high = (vf)_mm_max_ps((__m128)v, (__m128)high);
#else
        low = vmin(v, low);
        high = vmax(v, high);
#endif
    }

    PDN_INLINE void add(vf v) {
        add_finite(v);
#if defined(__AVX512F__)
        const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
        nan = (vi)_mm512_mask_set1_epi32((__m512i)nan, is_nan, -1);
#else
        nan |= v != v;
#endif
    }
};

PDN_INLINE float lowest_of(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_min_ps((__m512)v);
#endif
    float least = v[0];
    for (int i = 1; i < kWidth; ++i) least = v[i] < least ? v[i] : least;
    return least;
}

PDN_INLINE bool any(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#endif
    int32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= mask[i];
    return bits != 0;
}

// Affine: scale = (high - low) / 255 over a range that includes zero; symmetric: amax / 127, zero point 0. A scale too
// small for a normal float becomes 1; NaN among the values makes the scale NaN.
PDN_INLINE Codes codes_of(const Range& range, bool symmetric) {
    const float low = lowest_of(range.low), high = -lowest_of(-range.high);
    float scale = symmetric ? (-low > high ? -low : high) / 127.f : (high - low) / 255.f;
    if (any(range.nan)) scale = __builtin_nanf("");
    if (scale < 1.17549435e-38f) scale = 1.f;
    if (symmetric) return {scale, 0, -127};
    const float zero_point = __builtin_rintf(-128.f - low / scale);
    const float within = zero_point < -128.f ? -128.f : zero_point > 127.f ? 127.f : zero_point;
    return {scale, within == within ? static_cast<int32_t>(within) : 0, -128};
}

// ----------------------------------------------------------------------------------------------------- activation

constexpr float kMinusLog2e = -1.44269504088896341f;

// v to -bound..bound; NaN becomes anything therein.
PDN_INLINE vf within(vf v, float bound) {
#if defined(__AVX512F__)
    return (vf)_mm512_range_ps((__m512)v, _mm512_set1_ps(bound), 2);  // the smaller magnitude, the sign of v
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps(_mm256_min_ps((__m256)v, _mm256_set1_ps(bound)), _mm256_set1_ps(-bound));
#elif defined(__SSE2__)
    return (vf)_mm_max_ps(_mm_min_ps((__m128)v, _mm_set1_ps(bound)), _mm_set1_ps(-bound));
#else
    return vmax(vmin(v, splat(bound)), splat(-bound));
#endif
}

// plus + 2^t for a number `plus`, to about 5e-7 relative; t counts as at least -120 and at most 120, and NaN as either.
PDN_INLINE vf plus_exp2(float plus, vf t) {
    const vf bounded = within(t, 120.f);
#if defined(__AVX512F__)
    // t = k / 16 + r: 2^(k mod 16 / 16) from a table (less k mod 16 in the place to which k is shifted), 2^r - 1 by a
    // polynomial, fitted to 4e-7.
    const __m512i table = _mm512_setr_epi32(0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                                            0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                                            0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d);
    const vf magic = splat(786432.f);  // adding it rounds to 1 / 16
    const vf shifted = bounded + magic;
    const vf r = bounded - (shifted - magic);
    const vf power = (vf)((vi)_mm512_permutexvar_epi32((__m512i)shifted, table) + ((vi)shifted << 19));
    const vf part = (r * 0.240226477f + 0.693187714f) * r;
    return power * part + (power + plus);
#else
    const vf magic = splat(12582912.f);  // adding it rounds to an integer
    const vf shifted = bounded + magic;
    const vf r = bounded - (shifted - magic);
    vf e = splat(1.32764713e-3f);  // 2^r, fitted to 8e-8
    e = e * r + 9.67554096e-3f;
    e = e * r + 5.55071309e-2f;
    e = e * r + 2.40221202e-1f;
    e = e * r + 6.93146944e-1f;
    e = e * r + 1.00000012f;
    return plus + e * (vf)(((vi)shifted - (vi)magic + 127) << 23);
#endif
}

PDN_INLINE vf one_plus_exp2(vf t) { return plus_exp2(1.f, t); }

// The larger of x and a number; NaN stays NaN.
PDN_INLINE vf at_least(vf x, float least) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps(_mm512_set1_ps(least), (__m512)x);  // the second operand where one is NaN
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps(_mm256_set1_ps(least), (__m256)x);
#elif defined(__SSE2__)
    return (vf)_mm_max_ps(_mm_set1_ps(least), (__m128)x);
#else
    return select(x < least, splat(least), x);
#endif
}

// x * logistic(x); 0 for minus infinity, NaN stays NaN.
PDN_INLINE vf fast_silu(vf x) { return at_least(x, -120.f) / one_plus_exp2(x * kMinusLog2e); }

// As fast_silu.
PDN_INLINE vf fast_gelu_tanh(vf x) {
    const vf twice_inner = x * (x * x * 0.0713548162726f + 1.5957691216057308f);
    return at_least(x, -60.f) / one_plus_exp2(twice_inner * kMinusLog2e);
}

// max(x, 0) - |x| Q(|x|) with the normal distribution's tail Q(a) = exp(-a^2 / 2) * polynomial(1 / (1 + 0.28 a)), to
// about 1e-7; 0 for minus infinity, NaN stays NaN.
PDN_INLINE vf fast_gelu(vf x) {
    const vf a = (vf)((vi)within(x, 16.f) & 0x7fffffff);
    const vf t = 1.f / (1.f + 0.28f * a);
    vf tail = splat(-0.107555062f);
    tail = tail * t + 0.396990687f;
    tail = tail * t - 0.248519033f;
    tail = tail * t + 0.278183192f;
    tail = tail * t + 0.0637911186f;
    tail = tail * t + 0.117109053f;
    return at_least(x, 0.f) - (a * t) * tail * plus_exp2(0.f, a * a * (0.5f * kMinusLog2e));
}

// `activation` numbers as in epilogue.inl, errors about 1e-7 of max(1, |x|).
PDN_INLINE vf fast_activate(vf x, int activation) {
    switch (activation) {
        case 2:
            return fast_silu(x);
        case 3:
            return fast_gelu(x);
        case 4:
            return fast_gelu_tanh(x);
        default:
            return activate(x, activation);
    }
}

}  // namespace
}  // namespace pdn
