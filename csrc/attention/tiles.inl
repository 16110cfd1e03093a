// The three steps of a tile: scores of up to kTile vectors of queries and the keys of a chunk, their weights, and the
// weighted sums of values. Queries are in the lanes, so keys and values are read where they lie, one number for all
// lanes, and nothing is added up across lanes. Included once per ISA level.
#pragma once

#include "../core/attention/pack.inl"
#include "../core/attention/softmax.inl"
#include "codes.inl"

namespace pdn {
namespace attention {
namespace {

// The rows that stay in registers are split evenly: body.operator()<Rows>(first, groups) for one or two sizes.
template <int Rows, class Body>
PDN_INLINE void groups_of([[maybe_unused]] int64_t size, int64_t first, int64_t groups, const Body& body) {
    if constexpr (Rows > 0) {
        if (size == Rows)
            body.template operator()<Rows>(first, groups);
        else
            groups_of<Rows - 1>(size, first, groups, body);
    }
}

template <class Body>
PDN_INLINE void each_group(int64_t rows, const Body& body) {
    const int64_t groups = (rows + kRows - 1) / kRows, size = rows / groups, larger_groups = rows % groups;
    if (larger_groups > 0) groups_of<kRows>(size + 1, 0, larger_groups, body);
    groups_of<kRows>(size, larger_groups * (size + 1), groups - larger_groups, body);
}

// ------------------------------------------------------------------------------------------------------------ scores

template <class Cells>
struct Scores {  // sums of products are scores: the queries were scaled
    using Sum = vf;
    static PDN_INLINE vf score(vf sum, float) { return sum; }
};

#if defined(__AVX512BF16__)
template <>
struct Scores<Bf16Pairs> {
    using Sum = vf;
    static PDN_INLINE vf score(vf sum, float factor) { return sum * factor; }
};
#endif

template <>
struct Scores<Int8Cells> {
    using Sum = vi;
    static PDN_INLINE vf score(vi sum, float factor) { return __builtin_convertvector(sum, vf) * factor; }
};

// Keys that lie one after another, and their values as they lie in the tensor.
struct KeyPart {
    const char *keys, *values;
    int64_t count;
    float factor;  // of the sums of products
};

// Fetches rows that will be read soon, one cache line a call, and nothing past their end.
struct Fetch {
    const char* at;
    int64_t step, lines, rows;  // bytes from row to row; cache lines of a row; rows left
    int64_t line = 0;

    PDN_INLINE void next() {
        __builtin_prefetch(at + line * 64, 0, 3);
        if (++line < lines) return;
        line = 0;
        if (rows > 1) --rows, at += step;
    }
};

// What is the same for all parts of a chunk. Steps are bytes from one key to the next.
struct ScoreTask {
    int64_t key_step, key_lines;      // cache lines of one
    int64_t value_step, value_lines;  // 0: keys and values were fetched before
    const float* queries;             // the tile's, packed
    int64_t cells;
    const int32_t* starts;  // what sums of int8 begin with
    float* top;             // [query]: takes in the largest scores
};

// `groups` times Rows keys: scores [key][query]. Ahead: the part's keys and values are fetched meanwhile, bit by bit,
// since it is not foreseen by processors which blocks are read, nor that values are read in columns.
template <class Cells, int Rows, int Vectors, bool Ahead>
__attribute__((noinline)) void score_groups(const ScoreTask& t, const KeyPart& part, int64_t first, int64_t groups,
                                            float* scores) {
    using Sum = typename Scores<Cells>::Sum;
    const char* keys = part.keys + first * t.key_step;
    scores += first * Vectors * kWidth;
    Fetch fetch[2] = {{keys + Rows * t.key_step, t.key_step, t.key_lines, groups * Rows},
                      {part.values + first * t.value_step, t.value_step, t.value_lines, groups * Rows}};
    for (int64_t group = 0; group < groups; ++group) {
        Sum sums[Rows][Vectors];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) {
                sums[r][v] = Sum{};
                if constexpr (kOffset != 0 && __is_same(Cells, Int8Cells))
                    sums[r][v] = load_lanes(t.starts + v * kWidth);
            }
        add_products<Cells, Vectors>(keys, t.key_step, 4, t.queries, t.cells, sums, [&](int64_t k) {
            if constexpr (!Ahead) return;
            fetch[k % 2].next();
            if (Cells::kPerCell == 4) fetch[1].next();  // few steps, many lines
        });
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            vf best = load(t.top + v * kWidth);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) {
                const vf score = Scores<Cells>::score(sums[r][v], part.factor);
                best = larger(score, best);
                store(scores + (r * Vectors + v) * kWidth, score);
            }
            store(t.top + v * kWidth, best);
        }
        keys += Rows * t.key_step;
        scores += Rows * Vectors * kWidth;
    }
}

// ----------------------------------------------------------------------------------------------------------- weights

// What a tile of queries keeps between chunks of keys; all but the sums [queries].
struct State {
    float* reference;  // what exponentials are relative to: no more than kSlack below the largest score so far
    float* totals;     // sums of exponentials
    float* checks;     // NaN where a score was
    float* sums;       // [size][queries]: sums of exponentials times values
};

constexpr float kSlack = 16.f;  // how far scores may exceed the reference: 2^16 per weight harms no sum

PDN_INLINE bool any(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    int32_t found = 0;
    for (int i = 0; i < kWidth; ++i) found |= mask[i];
    return found != 0;
#endif
}

// Move the references of queries whose scores grew; `kept` [queries] becomes the factor for what was added up before.
// Returns whether one moved. Each query by itself: the same bits in every tile.
template <int Vectors>
PDN_INLINE bool move_references(const State& s, const float* top, float* kept) {
    vi moved{};
    for (int v = 0; v < Vectors; ++v) {
        const vf before = load(s.reference + v * kWidth), best = load(top + v * kWidth);
        const vi move = best > before + kSlack;
        const vf after = select(move, best, before);
        const vf factor = select(move, exp2_negative(before - after), splat(1.f));
        store(s.reference + v * kWidth, after);
        store(s.totals + v * kWidth, load(s.totals + v * kWidth) * factor);
        store(kept + v * kWidth, factor);
        moved |= move;
    }
    return any(moved);
}

// ------------------------------------------------------------------------------------------------------------ values

// Values of keys that lie one after another, in cells of keys.
struct ValuePart {
    const char* values;
    int64_t cells;
};

// What becomes of the sums before: nothing, if there are none; added to as they are; or by the factors `kept`.
enum class Before { none, kept, scaled };

template <int Rows, int Vectors>
PDN_INLINE void add_to_sums(vf (&mixed)[Rows][Vectors], Before before, const float* kept, float* sums) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            float* const out = sums + (r * Vectors + v) * kWidth;
            if (before == Before::kept) mixed[r][v] += load(out);
            if (before == Before::scaled) mixed[r][v] += load(out) * load(kept + v * kWidth);
            store(out, mixed[r][v]);
        }
}

// Weights of the keys of one cell: scores [kPerCell][Vectors] become exponentials, the cell's vectors of them.
template <class Cells, int Vectors>
struct Weights {
    vf reference[Vectors], total[Vectors], check[Vectors];

    PDN_INLINE explicit Weights(const State& s) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            const vf at = load(s.reference + v * kWidth);
            reference[v] = select(at == kNothing, vf{}, at);  // no key counts yet: weights 0, not NaN
            total[v] = vf{};
            check[v] = load(s.checks + v * kWidth);
        }
    }
    PDN_INLINE vf of_cell(const float* scores, int v, [[maybe_unused]] bool whole) {
#if defined(__AVX512BF16__)
        if constexpr (Cells::kPerCell == 2) {
            // degree 3: off by a twentieth of what rounding to bfloat16 is
            const vf even = exp2_checked<3>(load(scores + v * kWidth) - reference[v], check[v]);
            vf odd{};  // fills up a cell of one key
            if (whole) odd = exp2_checked<3>(load(scores + (Vectors + v) * kWidth) - reference[v], check[v]);
            total[v] += even + odd;
            vi order{};  // lane i of both, beside each other
            for (int i = 0; i < kWidth; ++i) order[i] = i | (i + kWidth) << 16;
            const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
            return (vf)_mm512_permutexvar_epi16((__m512i)order, pair);
        }
#endif
        const vf weight = exp2_checked<5>(load(scores + v * kWidth) - reference[v], check[v]);
        total[v] += weight;
        return weight;
    }
    PDN_INLINE void keep(const State& s) const {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            store(s.totals + v * kWidth, load(s.totals + v * kWidth) + total[v]);
            store(s.checks + v * kWidth, check[v]);
        }
    }
};

constexpr int kFirstRows = 3;  // the elements that are mixed while weights are made

// The scores of a chunk become weights, in their place; the first Rows elements are mixed on the way, since products
// and exponentials together keep all units busy.
template <class Cells, int Rows, int Vectors>
__attribute__((noinline)) void weigh_and_mix(const State& s, const ValuePart* parts, int64_t part_count,
                                             int64_t value_step, int64_t keys, float* scores, Before before,
                                             const float* kept) {
    constexpr int64_t kStep = Vectors * kWidth;
    Weights<Cells, Vectors> weights(s);
    vf mixed[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) mixed[r][v] = vf{};
    float* out = scores;
    for (int64_t i = 0; i < part_count; ++i) {
        const char* value = parts[i].values;
        for (int64_t cell = 0; cell < parts[i].cells; ++cell) {
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) {
                const vf weight = weights.of_cell(scores, v, keys > 1);
                store(out + v * kWidth, weight);
#pragma GCC unroll 8
                for (int r = 0; r < Rows; ++r)
                    mixed[r][v] = Cells::add_product(mixed[r][v], Cells::repeated(value + 4 * r), weight);
            }
            value += value_step;
            scores += Cells::kPerCell * kStep;
            out += kStep;
            keys -= Cells::kPerCell;
        }
    }
    weights.keep(s);
    add_to_sums(mixed, before, kept, s.sums);
}

// `groups` times Rows elements from `first` on: sums [element][query] of weight times value over all parts.
template <class Cells, int Rows, int Vectors>
__attribute__((noinline)) void mix_groups(const ValuePart* parts, int64_t part_count, int64_t first, int64_t groups,
                                          int64_t value_step, const float* weights, Before before, const float* kept,
                                          float* sums) {
    constexpr int64_t kStep = Vectors * kWidth;
    sums += first * kStep;
    for (int64_t group = 0; group < groups; ++group) {
        vf mixed[Rows][Vectors];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) mixed[r][v] = vf{};
        const float* row = weights;
        for (int64_t i = 0; i < part_count; ++i) {
            const char* values = parts[i].values + (first + group * Rows) * 4;
            add_products<Cells, Vectors>(values, 4, value_step, row, parts[i].cells, mixed);
            row += parts[i].cells * kStep;
        }
        add_to_sums(mixed, before, kept, sums);
        sums += Rows * kStep;
    }
}

}  // namespace
}  // namespace attention
}  // namespace pdn
