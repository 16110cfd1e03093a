// One pass over a row of logits: an online softmax, an argmax with noise, and the probability of what was chosen. A row
// is read in chunks that stay in the innermost cache. Included once per ISA level.
#pragma once

#include "../core/attention/softmax.inl"
#include "../core/fp16.h"
#include "../core/gumbel.inl"
#include "params.h"

namespace pdn {
namespace token_confidence {
namespace {

using attention::exp2_negative;
using attention::kLog2E;
using attention::larger;
using attention::largest_lane;

constexpr int64_t kChunk = 2048;  // floats, that stay in the first-level cache beside what is read
constexpr float kImpossible = -__builtin_inff();
static_assert(kChunk % kNoiseBlock == 0 && kPiece % kChunk == 0, "noise comes in whole blocks");

PDN_INLINE bool is_among(const Tokens& tokens, int64_t column) {
    for (int i = 0; i < tokens.count; ++i)
        if (tokens.v[i] == column) return true;
    return false;
}

PDN_INLINE vf guided(const Params& p, vf conditional, vf unconditional) {
    const vf v = unconditional + (p.guidance + 1.f) * (conditional - unconditional);
    return select(conditional == kImpossible, conditional, v);
}

// Logits to `values`, -inf up to a whole block of noise; returns the largest, NaN aside.
template <class T, bool Guided>
PDN_INLINE float read_chunk(const Params& p, const T* x, [[maybe_unused]] const T* u, int64_t count, float* values) {
    vf top[2] = {splat(kImpossible), splat(kImpossible)};
    int64_t i = 0;
    for (; i + 2 * kWidth <= count; i += 2 * kWidth)
        for (int v = 0; v < 2; ++v) {
            vf l = load(x + i + v * kWidth);
            if constexpr (Guided) l = guided(p, l, load(u + i + v * kWidth));
            store(values + i + v * kWidth, l);
            top[v] = larger(l, top[v]);  // the second one where the first is NaN
        }
    for (; i < count; i += kWidth) {
        const int n = count - i < kWidth ? static_cast<int>(count - i) : kWidth;
        vf l = load_partial(x + i, n);
        if constexpr (Guided) l = guided(p, l, load_partial(u + i, n));
        store(values + i, l);
        for (int j = n; j < kWidth; ++j) values[i + j] = kImpossible;
        top[0] = larger(load(values + i), top[0]);
    }
    for (; i % kNoiseBlock != 0; i += kWidth) store(values + i, splat(kImpossible));
    return largest_lane(larger(top[0], top[1]));
}

PDN_INLINE float largest_of(const float* values, int64_t count) {
    vf top = splat(kImpossible);
    for (int64_t i = 0; i < count; i += kWidth) top = larger(load(values + i), top);
    return largest_lane(top);
}

// The first of `values` that equals `wanted`, which is among them.
PDN_INLINE int64_t first_equal(const float* values, float wanted) {
    for (int64_t i = 0;; i += kWidth) {
#if defined(__AVX512F__)
        const unsigned found = _mm512_cmpeq_ps_mask((__m512)load(values + i), _mm512_set1_ps(wanted));
#elif defined(__AVX2__)
        const auto found = static_cast<unsigned>(_mm256_movemask_ps((__m256)(load(values + i) == wanted)));
#elif defined(__SSE2__)
        const auto found = static_cast<unsigned>(_mm_movemask_ps((__m128)(load(values + i) == wanted)));
#else
        unsigned found = 0;
        for (int j = 0; j < kWidth; ++j) found |= static_cast<unsigned>(values[i + j] == wanted) << j;
#endif
        if (found) return i + __builtin_ctz(found);
    }
}

// The sum of exp(value - reference). The reference is not below any value, or 0 where all are -inf.
PDN_INLINE float sum_of_exponentials(const float* values, int64_t count, float reference) {
    vf sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * kWidth <= count; i += 4 * kWidth)
        for (int v = 0; v < 4; ++v) sum[v] += exp2_negative((load(values + i + v * kWidth) - reference) * kLog2E);
    for (; i < count; i += kWidth) sum[0] += exp2_negative((load(values + i) - reference) * kLog2E);
    return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// exp(x) of one number: what the product with log2(e) loses is added again, so that small results are as exact as
// large.
PDN_INLINE float exp_negative(float x) {
    const double power = x * 1.4426950408889634;
    const auto upper = static_cast<float>(power);
    return exp2_negative(splat(upper))[0] * (1.f + static_cast<float>(power - upper) * kLn2);
}

// exp(from - to), where `to` is not below `from`; 0 for -inf, whatever `to` is.
PDN_INLINE float rescale(float from, float to) { return from == kImpossible ? 0.f : exp_negative(from - to); }

// Take the tokens that lie in columns first, first + 1, ... out of `values`. Returns NaN if one of them is, else 0.
PDN_INLINE float take_out(const Tokens& tokens, int64_t first, int64_t count, float* values, bool& any) {
    float nan = 0.f;
    for (int i = 0; i < tokens.count; ++i) {
        const int64_t at = tokens.v[i] - first;
        if (at < 0 || at >= count) continue;
        if (values[at] != values[at]) nan = values[at];
        values[at] = kImpossible;
        any = true;
    }
    return nan;
}

PDN_INLINE bool any(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    int32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= mask[i];
    return bits != 0;
#endif
}

// Half of the least word, as a float, that is too large to give noise above `least` / log2(e). Noise g > n means
// -log(1 - q) < e^-n for q = (word + 1/2) / 2^32, hence q < e^-n: one exponential tells what two logarithms would.
PDN_INLINE vf word_bound(vf least) { return exp2_negative(select(least > 0.f, -least, vf{})) * 2147483648.f; }

// Whether noise from `words` may lift one of a block of values over `best`; `top` is the largest value. The block as a
// whole is asked first. What roundings may make of it is allowed for.
PDN_INLINE bool may_win(const float* values, const NoiseWords& words, float best, float top, float temperature) {
    constexpr int kVectors = kNoiseBlock / kWidth;
    const float slack = (__builtin_fabsf(best) + __builtin_fabsf(top)) * 1e-6f + temperature * 1e-4f;
    const float scale = kLog2E / temperature, reach = best - slack;
    vf halves[kVectors];
    vi found{};
    const vf bound = word_bound(splat((reach - top) * scale));
    for (int i = 0; i < kVectors; ++i) {
        halves[i] = __builtin_convertvector((vi)(words.v[i] >> 1), vf);
        found |= halves[i] < bound;
    }
    if (!any(found)) return false;
    found = vi{};
    for (int i = 0; i < kVectors; ++i) found |= halves[i] < word_bound((reach - load(values + i * kWidth)) * scale);
    return any(found);
}

// As a choice without noise, from `values` plus noise. Most blocks of columns cannot hold the winner: some by their
// largest logit, most others by their words, so that few logarithms are taken.
PDN_INLINE void choose_noised(const Params& p, const NoiseRow& noise, int64_t first, int64_t padded,
                              const float* values, Partial& known) {
    constexpr float kMostNoise = 22.9f;  // gumbel(0) and a little
    for (int64_t block = 0; block < padded; block += kNoiseBlock) {
        const float top = largest_of(values + block, kNoiseBlock);
        if (!(top + p.temperature * kMostNoise > known.best)) continue;
        NoiseWords words;
        noise_words(first + block, noise, words);
        if (!may_win(values + block, words, known.best, top, p.temperature)) continue;
        alignas(64) float noised[kNoiseBlock];
        add_gumbel(values + block, words, p.temperature, noised);
        const float best = largest_of(noised, kNoiseBlock);
        if (!(best > known.best)) continue;
        const int64_t at = block + first_equal(noised, best);
        known.best = best, known.chosen = values[at], known.index = first + at;
    }
}

// Add the chunk in `values`, whose largest is `top`, to what is known.
PDN_INLINE void add_chunk(const Params& p, const NoiseRow& noise, int64_t first, int64_t count, float top,
                          float* values, Partial& known) {
    const int64_t padded = (count + kNoiseBlock - 1) / kNoiseBlock * kNoiseBlock;
    bool changed = false;
    take_out(p.forbidden, first, count, values, changed);
    if (changed) top = largest_of(values, padded);
    if (p.temperature > 0.f) {
        choose_noised(p, noise, first, padded, values, known);
    } else if (top > known.best) {
        const int64_t at = first_equal(values, top);
        known.best = known.chosen = top, known.index = first + at;
    }
    changed = false;
    known.sum += take_out(p.uncounted, first, count, values, changed);
    if (changed) top = largest_of(values, padded);
    if (top > known.top) {
        known.sum *= rescale(known.top, top);
        known.top = top;
    }
    known.sum += sum_of_exponentials(values, padded, known.top == kImpossible ? 0.f : known.top);
}

PDN_INLINE int64_t source_row(const Params& p, int64_t row) {
    const int64_t source = p.index ? p.index[row] : row;
    return source >= 0 && source < p.source_rows ? source : -1;
}

template <class T>
void piece_of(const Params& p, int64_t row, int64_t first, Partial* partial) {
    alignas(64) float values[kChunk];
    *partial = {kImpossible, 0.f, kImpossible, kImpossible, -1};
    const int64_t source = source_row(p, row);
    if (source < 0) {
        partial->sum = __builtin_nanf("");
        return;
    }
    const T* x = static_cast<const T*>(p.logits) + source * p.stride;
    const T* u = p.unconditional ? static_cast<const T*>(p.unconditional) + source * p.unconditional_stride : nullptr;
    const NoiseRow noise =
        p.keys ? noise_row(p.keys[2 * row], p.keys[2 * row + 1], p.step) : noise_row(p.seed, row, p.step);
    const int64_t end = first + kPiece < p.vocabulary ? first + kPiece : p.vocabulary;
    for (int64_t at = first; at < end; at += kChunk) {
        const int64_t count = end - at < kChunk ? end - at : kChunk;
        const float top = u ? read_chunk<T, true>(p, x + at, u + at, count, values)
                            : read_chunk<T, false>(p, x + at, nullptr, count, values);
        add_chunk(p, noise, at, count, top, values, *partial);
    }
}

void piece(const Params& p, int64_t row, int64_t first, Partial* partial) {
    switch (p.dtype) {
        case DType::float32:
            return piece_of<float>(p, row, first, partial);
        case DType::bfloat16:
            return piece_of<bf16>(p, row, first, partial);
        case DType::float16:
            return piece_of<fp16>(p, row, first, partial);
    }
}

// One logit, as the chunks hold it.
template <class T>
float logit_of(const Params& p, int64_t source, int64_t column) {
    const vf l = load_partial(static_cast<const T*>(p.logits) + source * p.stride + column, 1);
    if (!p.unconditional) return l[0];
    const T* u = static_cast<const T*>(p.unconditional) + source * p.unconditional_stride + column;
    return guided(p, l, load_partial(u, 1))[0];
}

float logit_at(const Params& p, int64_t row, int64_t column) {
    const int64_t source = source_row(p, row);
    switch (p.dtype) {
        case DType::bfloat16:
            return logit_of<bf16>(p, source, column);
        case DType::float16:
            return logit_of<fp16>(p, source, column);
        default:
            return logit_of<float>(p, source, column);
    }
}

void finish(const Params& p, int64_t row, const Partial* partials, int64_t count) {
    Partial all = partials[0];
    for (int64_t i = 1; i < count; ++i) {
        const Partial& next = partials[i];
        const float top = next.top > all.top ? next.top : all.top;
        all.sum = all.sum * rescale(all.top, top) + next.sum * rescale(next.top, top);
        all.top = top;
        if (next.best > all.best) all.best = next.best, all.chosen = next.chosen, all.index = next.index;
    }
    const float nan = __builtin_nanf("");
    const bool answer = all.sum == all.sum && all.best < __builtin_inff() && all.index >= 0;
    p.token[row] = answer ? all.index : -1;
    const auto probability = [&](int64_t column, float logit) {
        if (!answer) return nan;
        if (is_among(p.uncounted, column) || is_among(p.forbidden, column) || all.sum == 0.f) return 0.f;
        return rescale(logit, all.top) / all.sum;
    };
    p.confidence[row] = probability(all.index, all.chosen);
    if (p.eos >= 0) p.eos_probability[row] = probability(p.eos, answer ? logit_at(p, row, p.eos) : 0.f);
}

}  // namespace
}  // namespace token_confidence
}  // namespace pdn
