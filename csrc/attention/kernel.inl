// Attention of a block of queries of one head, with a softmax that streams over blocks of keys: no matrix of all
// scores. Included once per ISA level.
#pragma once

#include "layout.inl"
#include "mask.inl"

namespace pdn {
namespace attention {
namespace {

constexpr int kScoreStep = kLongestBlock + 16;  // floats between the scores of neighbouring queries

// What a block of queries keeps between blocks of keys; `weights` belongs to the kRows queries at hand.
struct State {
    float* query;      // [kQueryBlock][query_step]
    float* weights;    // [kRows][kScoreStep]: scores, then exponentials
    float* reference;  // [kQueryBlock]: the largest score so far; what exponentials are relative to
    float* totals;     // [kQueryBlock][kWidth]: sums of exponentials
    float* sums;       // [kQueryBlock][values]: sums of exponentials times values
};

State state_of(const Layout& l, void* scratch) {
    float* at = static_cast<float*>(scratch);
    const auto take = [&](int64_t floats) {
        float* const begin = at;
        at += round_up(floats, 16);
        return begin;
    };
    State s;
    s.query = take(kQueryBlock * l.query_step);
    s.weights = take(kRows * kScoreStep);
    s.reference = take(kQueryBlock);
    s.totals = take(kQueryBlock * kWidth);
    s.sums = take(kQueryBlock * l.values);
    return s;
}

int64_t scratch_bytes(const AttentionParams& p) {
    const Layout l(p);
    const int64_t floats = kQueryBlock * (l.query_step + 1 + kWidth + l.values) + kRows * kScoreStep;
    return (floats + 5 * 16) * 4;
}

// The scale of the scores goes into the queries, unless that would round them once more.
template <class Cells, class T>
PDN_INLINE void pack_queries(const Layout& l, const Rows<T>& rows, int64_t first, int64_t last, float scale,
                             float* packed) {
    for (int64_t i = 0; i < round_up(last - first, kRows); ++i) {
        for (int64_t cell = 0; cell < l.cells; cell += kWidth) {
            vf v = first + i < last ? Reader<Cells, T>::cells(rows, first + i, cell) : vf{};
            if constexpr (Cells::kPerCell == 1) v *= scale;
            store(packed + i * l.query_step + cell, v);
        }
    }
}

template <class Cells, int Vectors>
PDN_INLINE void score_tile(const Layout& l, const float* query, const float* keys, float scale, float* scores) {
    vf sums[kRows][Vectors];
    multiply<Cells, Vectors>(query, l.query_step, keys, l.cells, sums);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v)
            store(scores + r * kScoreStep + v * kWidth, Cells::kPerCell == 1 ? sums[r][v] : sums[r][v] * scale);
}

PDN_INLINE void add_sums(float* sums, vf value, float kept, bool begun) {
    store(sums, begun ? load(sums) * kept + value : value);
}

// weights * values, added to `sums`; `kept` are the factors for what `sums` holds.
template <class Cells>
PDN_INLINE void mix_tiles(const Layout& l, const float* weights, const float* values, int64_t cells, const float* kept,
                          bool begun, float* sums) {
    each_tile(l.values, [&]<int Vectors>(int64_t first) {
        vf products[kRows][Vectors];
        multiply<Cells, Vectors>(weights, kScoreStep, values + first * cells, cells, products);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v)
                add_sums(sums + r * l.values + first + v * kWidth, products[r][v], kept[r], begun);
    });
}

template <class Cells>
PDN_INLINE void mix_lanes(const Layout& l, const float* weights, const float* values, int64_t cells, const float* kept,
                          bool begun, float* sums) {
    for (int64_t first = 0; first < l.values; first += kLaneSums)
        for (int row = 0; row < kRows; row += kLaneRows) {
            vf products[kLaneRows];
            multiply_lanes<Cells, kScoreStep>(weights + row * kScoreStep, values + first * cells, cells, products);
            for (int r = 0; r < kLaneRows; ++r) {
                float* out = sums + (row + r) * l.values + first;
                const vf old = begun ? load_partial(out, kLaneSums) * kept[row + r] : vf{};
                store_partial(out, old + products[r], kLaneSums);
            }
        }
}

// The exponentials of `live` queries in place of their scores; kept[r] becomes the factor for the sums before.
template <class Cells>
PDN_INLINE void weigh(const State& s, int64_t row, int64_t live, int64_t keys, int64_t padded, bool begun,
                      float* kept) {
    for (int64_t r = 0; r < live; ++r)
        for (int64_t i = keys; i < padded; ++i) s.weights[r * kScoreStep + i] = kNothing;
    float top[kRows];
    for (int64_t r = 0; r < live; ++r) {
        top[r] = largest_score(s.weights + r * kScoreStep, padded);
        if (begun && !(top[r] > s.reference[row + r])) top[r] = s.reference[row + r];
    }
    for (int64_t r = 0; r < live; ++r) {
        const float reference = top[r] == kNothing ? 0.f : top[r];  // no key counts yet: all weights are 0, not NaN
        vf total = exponentials<Cells>(s.weights + r * kScoreStep, padded, reference);
        if (begun) {
            kept[r] = exp2_negative(splat(s.reference[row + r] - reference))[0];
            total += load(s.totals + (row + r) * kWidth) * kept[r];
        }
        s.reference[row + r] = top[r];
        store(s.totals + (row + r) * kWidth, total);
    }
}

// Sums over totals, 0 where no key counts.
template <class T>
PDN_INLINE void write_rows(const AttentionParams& p, const Layout& l, const State& s, int64_t image, int64_t head,
                           int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const float total = reduce_add(load(s.totals + i * kWidth)), divisor = total == 0.f ? 1.f : total;
        T* out = static_cast<T*>(p.output) + ((image * p.query.count + first + i) * p.heads + head) * p.size;
        for (int64_t d = 0; d < p.size; d += kWidth) {
            const int64_t n = least(kWidth, p.size - d);
            const vf quotient = load_some(s.sums + i * l.values + d, n) / divisor;
            n == kWidth ? store(out + d, quotient) : store_partial(out + d, quotient, static_cast<int>(n));
        }
    }
}

template <class Cells, class T>
void attend_as(const AttentionParams& p, int64_t image, int64_t head, int64_t first, int64_t last, const float* packed,
               void* scratch) {
    const Layout l(p);
    const State s = state_of(l, scratch);
    const float scale = p.scale * kLog2E;
    pack_queries<Cells>(l, Rows<T>(p.query, image, head, p.query.count, p.size), first, last, scale, s.query);
    for (int64_t begin = 0; begin < p.key.count; begin += l.block) {
        const int64_t keys = least(l.block, p.key.count - begin), padded = round_up(keys, l.unit);
        const float* block_keys = packed + l.keys_at(begin / l.block);
        const float* block_values = packed + l.values_at(begin / l.block);
        for (int64_t row = 0; row < last - first; row += kRows) {
            const int64_t live = least(kRows, last - first - row);
            each_tile(padded, [&]<int Vectors>(int64_t tile) {
                score_tile<Cells, Vectors>(l, s.query + row * l.query_step, block_keys + tile * l.cells, scale,
                                           s.weights + tile);
            });
            for (int64_t r = 0; p.mask.data != nullptr && r < live; ++r)
                add_mask(p.mask, image, head, first + row + r, begin, keys, s.weights + r * kScoreStep);
            float kept[kRows] = {};
            weigh<Cells>(s, row, live, keys, padded, begin > 0, kept);
            const int64_t cells = padded / Cells::kPerCell;
            float* sums = s.sums + row * l.values;
            if (in_lanes(p))
                mix_lanes<Cells>(l, s.weights, block_values, cells, kept, begin > 0, sums);
            else
                mix_tiles<Cells>(l, s.weights, block_values, cells, kept, begin > 0, sums);
        }
    }
    write_rows<T>(p, l, s, image, head, first, last - first);
}

void attend(const AttentionParams& p, int64_t image, int64_t head, int64_t first, int64_t last, const void* packed,
            void* scratch) {
    const float* in = static_cast<const float*>(packed);
    if (p.dtype == DType::float32) return attend_as<Floats, float>(p, image, head, first, last, in, scratch);
    if (p.dtype == DType::float16) return attend_as<Floats, fp16>(p, image, head, first, last, in, scratch);
#if defined(__AVX512BF16__)
    attend_as<Bf16Pairs, bf16>(p, image, head, first, last, in, scratch);
#else
    attend_as<Floats, bf16>(p, image, head, first, last, in, scratch);
#endif
}

}  // namespace
}  // namespace attention
}  // namespace pdn
