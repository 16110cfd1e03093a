// Gradients of attention over listed blocks, in one pass of five products over every pair of blocks: scores, gradients
// of the weights, and what each gives to value, key and query. The weights of a span of queries and a block of keys lie
// in scratch memory. Included once per ISA level.
#pragma once

#include "layout.inl"

namespace pdn {
namespace block_sparse_attention {
namespace {

constexpr int64_t kSpan = 96;         // the most queries at a time
constexpr int64_t kWeightStep = 144;  // floats between rows of weights: the longest block, and off powers of 2
constexpr int64_t kPairStep = 80;     // the same for rows of pairs of keys

// What a span of queries and a block of keys have: weights, and the gradients of scores. Cells of one float are one
// matrix of rows by query, which is read both ways; cells of pairs need those of queries and those of keys.
struct Scratch {
    float *weights, *inner;  // [queries, or pairs of them][kWeightStep]
    float* inner_rows;       // [queries][kWeightStep], or pairs of keys [queries][kPairStep]
    int64_t inner_step;

    Scratch(const Layout& l, void* memory) {
        weights = static_cast<float*>(memory);
        inner = weights + (l.pairs ? kSpan / 2 : kSpan) * kWeightStep;
        inner_rows = l.pairs ? inner + kSpan / 2 * kWeightStep : inner;
        inner_step = l.pairs ? kPairStep : kWeightStep;
    }
};

int64_t scratch_bytes(const BackwardParams& p) {
    return 4 * (uses_pairs(p.dtype) ? kSpan * (kWeightStep + kPairStep) : 2 * kSpan * kWeightStep);
}

// ------------------------------------------------------------------------------------------------------- products

// sums[r][v] = sum over k < count of a[r * row_step + k * step] * (b[k * b_step + v * kWidth] and further), in cells.
template <class Cells, int Rows, int Vectors>
PDN_INLINE void products(const float* a, int64_t row_step, int64_t step, const float* b, int64_t b_step, int64_t count,
                         vf (&sums)[Rows][Vectors]) {
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sums[r][v] = vf{};
    for (int64_t k = 0; k < count; ++k) {
        vf row[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) row[v] = load(b + v * kWidth);
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r) {
            const vf factor = Cells::repeated(reinterpret_cast<const char*>(a + r * row_step));
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) sums[r][v] = Cells::add_product(sums[r][v], factor, row[v]);
        }
        a += step;
        b += b_step;
    }
}

// body.operator()<Rows>(first) for `count` rows, an even number.
template <class Body>
PDN_INLINE void each_rows(int64_t count, const Body& body) {
    int64_t first = 0;
    for (; first + kRows <= count; first += kRows) body.template operator()<kRows>(first);
    for (; first < count; first += 2) body.template operator()<2>(first);
}

// sums[rows][values] += a * b, where `a` is by rows (step 1 between the terms) or, if Transposed, by terms.
template <class Cells, bool Transposed>
PDN_INLINE void add_matrix(const Layout& l, const float* a, int64_t a_step, const float* b, int64_t rows, int64_t terms,
                           float* sums) {
    each_tile(l.values, [&]<int Vectors>(int64_t tile) {
        each_rows(rows, [&]<int Rows>(int64_t row) {
            vf tiles[Rows][Vectors];
            if constexpr (Transposed)
                products<Cells>(a + row, 1, a_step, b + tile, l.values, terms, tiles);
            else
                products<Cells>(a + row * a_step, a_step, 1, b + tile, l.values, terms, tiles);
            float* out = sums + row * l.values + tile;
#pragma GCC unroll 6
            for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; ++v) {
                    float* at = out + r * l.values + v * kWidth;
                    store(at, load(at) + tiles[r][v]);
                }
        });
    });
}

// --------------------------------------------------------------------------------------------- weights of one tile

#if defined(__AVX512BF16__)
// Lane l: bfloat16 of even[l] in the low half, of odd[l] in the high one.
PDN_INLINE vf paired(vf even, vf odd) {
    typedef int16_t words __attribute__((vector_size(64)));
    words order;
#pragma GCC unroll 32
    for (int i = 0; i < 32; ++i) order[i] = static_cast<int16_t>(i / 2 + (i % 2 ? 16 : 0));
    return (vf)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}
#endif

// Rows of a matrix by pairs of rows.
template <class Cells, int Rows, int Vectors>
PDN_INLINE void store_weights(const vf (&tile)[Rows][Vectors], float* out) {
    if constexpr (Cells::kPerCell == 1) {
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) store(out + r * kWeightStep + v * kWidth, tile[r][v]);
    }
#if defined(__AVX512BF16__)
    if constexpr (Cells::kPerCell == 2) {
#pragma GCC unroll 3
        for (int r = 0; r < Rows; r += 2)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v)
                store(out + r / 2 * kWeightStep + v * kWidth, paired(tile[r][v], tile[r + 1][v]));
    }
#endif
}

// The same matrix by pairs of keys; cells of one float need no second copy.
template <class Cells, int Rows, int Vectors>
PDN_INLINE void store_rows([[maybe_unused]] const vf (&tile)[Rows][Vectors], [[maybe_unused]] float* out) {
#if defined(__AVX512BF16__)
    if constexpr (Cells::kPerCell == 2) {
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < Vectors; v += 2) {
                const vf next = v + 1 < Vectors ? tile[r][v + 1 < Vectors ? v + 1 : v] : vf{};
                store(out + r * kPairStep + v / 2 * kWidth, (vf)_mm512_cvtne2ps_pbh((__m512)next, (__m512)tile[r][v]));
            }
    }
#endif
}

// A span of queries and a block of keys; pointers are to the first of each.
struct Pair {
    const float *query, *grad, *lse, *rest, *delta;  // rows of cells
    const float *key, *value;                        // tiles of tokens
    float scale;                                     // of products of pairs, to base 2
    int64_t queries, keys;                           // how many count
};

PDN_INLINE vf lanes_below(vf x, int64_t count) {
    vi lane;
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return select(lane < static_cast<int32_t>(count), x, vf{});
}

// The same sums in the same order as the scores of the forward: their rounding is in the lse too, and cancels.
template <class Cells>
PDN_INLINE vf score(vf sum, float scale) {
    return Cells::kPerCell == 1 ? sum : sum * scale;
}

template <class Cells, int Rows, int Vectors>
PDN_INLINE void weigh_tile(const Layout& l, const Pair& p, const Scratch& s, int64_t row, int64_t tile) {
    vf weights[Rows][Vectors], inner[Rows][Vectors];
    products<Cells>(p.query + row * l.step, l.step, 1, p.key + tile * l.cells, Vectors * kWidth, l.cells, weights);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v)
            weights[r][v] = exp2_any(score<Cells>(weights[r][v], p.scale) - p.lse[row + r] - p.rest[row + r]);
    if (__builtin_expect(tile + Vectors * kWidth > p.keys || row + Rows > p.queries, 0))
        for (int r = 0; r < Rows; ++r)
            for (int v = 0; v < Vectors; ++v)
                weights[r][v] = lanes_below(weights[r][v], row + r < p.queries ? p.keys - tile - v * kWidth : 0);
    store_weights<Cells>(weights, s.weights + row / Cells::kPerCell * kWeightStep + tile);
    products<Cells>(p.grad + row * l.step, l.step, 1, p.value + tile * l.cells, Vectors * kWidth, l.cells, inner);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) inner[r][v] = weights[r][v] * (inner[r][v] - p.delta[row + r]);
    store_weights<Cells>(inner, s.inner + row / Cells::kPerCell * kWeightStep + tile);
    store_rows<Cells>(inner, s.inner_rows + row * kPairStep + tile / 2);
}

// ------------------------------------------------------------------------------------------------- spans and blocks

// Queries [first, last) and the block of keys that begins at `key`, of which `keys` count.
template <class Cells>
void add_pair(const BackwardParams& p, const Layout& l, const Queries& q, const Keys& k, const Scratch& s,
              int64_t first, int64_t last, int64_t key, int64_t keys) {
    const Pair pair = {
        q.query + first * l.step, q.grad + first * l.step, q.lse + first,    q.rest + first, q.delta + first,
        k.key + key * l.cells,    k.value + key * l.cells, p.scale * kLog2E, last - first,   keys};
    const int64_t rows = round_up(last - first, 2), padded = round_up(keys, kWidth);
    const int64_t packed = round_up(least(p.block, p.key.count - key), 16);
    each_tile(packed, [&]<int Vectors>(int64_t tile) {
        if (tile >= padded) return;
        each_rows(rows, [&]<int Rows>(int64_t row) { weigh_tile<Cells, Rows, Vectors>(l, pair, s, row, tile); });
    });
    constexpr int64_t kPer = Cells::kPerCell;
    const int64_t key_rows = round_up(keys, 2), query_terms = (last - first + kPer - 1) / kPer;
    const int64_t key_terms = (keys + kPer - 1) / kPer;
    add_matrix<Cells, true>(l, s.weights, kWeightStep, q.grad_values + first / kPer * l.values, key_rows, query_terms,
                            k.value_sums + key * l.values);
    add_matrix<Cells, true>(l, s.inner, kWeightStep, q.query_values + first / kPer * l.values, key_rows, query_terms,
                            k.key_sums + key * l.values);
    add_matrix<Cells, false>(l, s.inner_rows, s.inner_step, k.key_values + key / kPer * l.values, rows, key_terms,
                             q.sums + first * l.values);
}

PDN_INLINE int64_t reader(const Readers& readers, int64_t list, int64_t i) {
    const int64_t at = list * readers.longest + i;
    return readers.narrow ? static_cast<const int16_t*>(readers.indices)[at]
                          : static_cast<const int32_t*>(readers.indices)[at];
}

template <class Cells>
void accumulate_as(const BackwardParams& p, int64_t image, int64_t kv_head, int64_t key_begin, int64_t key_end,
                   int64_t query_begin, int64_t query_end, void* workspace, void* scratch) {
    const Layout l(p);
    const Keys k(l, workspace);
    const Scratch s(l, scratch);
    const int64_t group = p.heads / p.kv_heads, valid = valid_keys(p, image);
    for (int64_t member = 0; member < group; ++member) {
        const Queries q(l, workspace, member);
        const int64_t head = kv_head * group + member;
        for (int64_t block = key_begin; block < key_end && block * p.block < valid; ++block) {
            const int64_t list = image * p.readers.batch_stride + head * p.readers.head_stride + block;
            const int64_t count = p.readers.counts[list], key = block * p.block;
            int64_t i = 0;
            while (i < count && reader(p.readers, list, i) < query_begin) ++i;
            while (i < count && reader(p.readers, list, i) < query_end) {  // neighbouring blocks are one run of queries
                const int64_t first = reader(p.readers, list, i);
                int64_t last = first + 1;
                while (++i < count && last < query_end && reader(p.readers, list, i) == last) ++last;
                const int64_t end = least(p.query.count, last * p.block);
                for (int64_t at = first * p.block; at < end; at += kSpan)
                    add_pair<Cells>(p, l, q, k, s, at, least(end, at + kSpan), key, least(p.block, valid - key));
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- dtypes

void begin_keys(const BackwardParams& p, int64_t image, int64_t kv_head, int64_t piece, void* workspace) {
    with_types(p.dtype, [&]<class Cells, class T>() { begin_keys_as<Cells, T>(p, image, kv_head, piece, workspace); });
}

void begin_queries(const BackwardParams& p, int64_t image, int64_t head, int64_t piece, void* workspace) {
    with_types(p.dtype, [&]<class Cells, class T>() { begin_queries_as<Cells, T>(p, image, head, piece, workspace); });
}

void accumulate(const BackwardParams& p, int64_t image, int64_t kv_head, int64_t key_begin, int64_t key_end,
                int64_t query_begin, int64_t query_end, void* workspace, void* scratch) {
#if defined(__AVX512BF16__)
    if (uses_pairs(p.dtype))
        return accumulate_as<Bf16Pairs>(p, image, kv_head, key_begin, key_end, query_begin, query_end, workspace,
                                        scratch);
#endif
    accumulate_as<Floats>(p, image, kv_head, key_begin, key_end, query_begin, query_end, workspace, scratch);
}

void end_keys(const BackwardParams& p, int64_t image, int64_t kv_head, int64_t piece, void* workspace) {
    with_types(p.dtype, [&]<class Cells, class T>() { end_keys_as<T>(p, image, kv_head, piece, workspace); });
}

void end_queries(const BackwardParams& p, int64_t image, int64_t head, int64_t piece, void* workspace) {
    with_types(p.dtype, [&]<class Cells, class T>() { end_queries_as<T>(p, image, head, piece, workspace); });
}

}  // namespace
}  // namespace block_sparse_attention
}  // namespace pdn
