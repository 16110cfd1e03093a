// Attention mass of blocks of keys for one block of queries, in one pass: every score is computed and exponentiated
// once, in registers, and no score is stored.
//
// Prompt and generated part are two sides with a softmax each. The exponentials of a query are relative to a reference
// of its own per side, the largest score of the side's first tile. Where a later tile exceeds that by so much that sums
// could overflow, which a sum of the tile shows, the reference is raised and the masses so far are scaled down. At the
// end the sums of the sides give both softmaxes' divisors. Included once per ISA level.
#pragma once

#include <cfloat>

#include "../core/attention/pack.inl"
#include "../core/attention/softmax.inl"
#include "../core/attention/types.inl"
#include "params.h"

namespace pdn {
namespace block_importance {
namespace {

using namespace attention;

constexpr int64_t kTileKeys = kTile * kWidth;
constexpr int kLanes = 8;           // kRows queries side by side, then zeros
constexpr float kLimit = 0x1p30f;   // a larger sum of a tile raises the reference
constexpr int64_t kPacked = 16384;  // floats of packed keys that stay in the cache while all queries of a block pass by

struct Layout {
    int64_t cells;         // of a token
    int64_t query_step;    // floats between packed queries
    int64_t chunk;         // keys that all queries pass by before the next ones
    int64_t keys;          // of a head, padded to whole tiles
    int64_t columns;       // blocks of keys
    int64_t first_column;  // of the generated part
    int64_t groups;        // of kRows queries in a block

    explicit Layout(const ImportanceParams& p) {
        cells = uses_pairs(p.dtype) ? (p.size + 1) / 2 : p.size;
        query_step = round_up(cells, kWidth);
        chunk = kPacked / cells / kTileKeys * kTileKeys;
        chunk = chunk < kTileKeys ? kTileKeys : chunk > 1024 ? 1024 : chunk;
        keys = round_up(p.key.count, kTileKeys);
        columns = (p.key.count + p.block - 1) / p.block;
        first_column = p.first_generated;
        groups = (p.block + kRows - 1) / kRows;
    }
};

int64_t chunk(const ImportanceParams& p) { return Layout(p).chunk; }

int64_t packed_bytes(const ImportanceParams& p) {
    const Layout l(p);
    return l.keys * l.cells * 4;
}

PDN_INLINE int64_t valid_keys(const ImportanceParams& p, int64_t image) {
    return p.key_lengths == nullptr ? p.key.count : least(p.key.count, p.key_lengths[image]);
}

// --------------------------------------------------------------------------------------------------------- packing

template <class Cells, class T>
void pack_as(const ImportanceParams& p, int64_t image, int64_t kv_head, int64_t index, float* packed) {
    const Layout l(p);
    const Rows<T> rows(p.key, image, kv_head, valid_keys(p, image), p.size);
    const int64_t end = least(l.keys, (index + 1) * l.chunk);
    for (int64_t key = index * l.chunk; key < end; key += kTileKeys)
        pack_keys<Cells>(rows, l.cells, key, kTileKeys, packed + key * l.cells);
}

// The scale of the scores goes into the queries, unless that would round them once more.
template <class Cells, class T>
PDN_INLINE void pack_queries(const Layout& l, const Rows<T>& rows, int64_t first, int64_t count, float scale,
                             float* packed) {
    for (int64_t i = 0; i < l.groups * kRows; ++i)
        for (int64_t cell = 0; cell < l.query_step; cell += kWidth) {
            vf v = i < count ? Reader<Cells, T>::cells(rows, first + i, cell) : vf{};
            if constexpr (Cells::kPerCell == 1) v *= scale;
            store(packed + i * l.query_step + cell, v);
        }
}

// ----------------------------------------------------------------------------------------------------------- tiles

// What a block of queries keeps while it streams over the keys.
struct State {
    float* query;       // [groups][kRows][query_step]
    float* references;  // [groups][2 sides][kLanes]
    float* masses;      // [groups][columns][kLanes]: sums of exponentials relative to the reference
};

int64_t reference_floats(const Layout& l) { return round_up(l.groups * 2 * kLanes, 16); }

State state_of(const Layout& l, void* scratch) {
    float* const query = static_cast<float*>(scratch);
    float* const references = query + l.groups * kRows * l.query_step;
    return {query, references, references + reference_floats(l)};
}

int64_t scratch_bytes(const ImportanceParams& p) {
    const Layout l(p);
    return (l.groups * (kRows * l.query_step + l.columns * kLanes) + reference_floats(l)) * 4;
}

// A score less the reference, both logarithms to base 2; `scale` where it is not in the queries.
template <class Cells>
PDN_INLINE vf relative(vf product, float scale, float reference) {
    if constexpr (Cells::kPerCell == 1) return product - reference;
    return product * scale - reference;
}

// The sums over the lanes of a vector for each of kRows queries, side by side; lanes past kRows are 0.
struct Sums {
    static constexpr int kVectors = kWidth < kLanes ? kLanes / kWidth : 1;
    vf part[kVectors];

    PDN_INLINE void take(const vf (&rows)[kRows]) {
        if constexpr (kVectors == 1) {
            part[0] = sums_of_lanes<kRows>(rows);
        } else {
            part[0] = sums_of_lanes<kWidth>(rows);
            part[1] = sums_of_lanes<kRows - kWidth>(rows + kWidth);
        }
    }
    PDN_INLINE bool exceed(float limit) const {
#if defined(__AVX512F__)
        return _mm512_cmp_ps_mask((__m512)part[0], _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#else
        bool any = false;
        for (int i = 0; i < kVectors; ++i)
            for (int l = 0; l < kWidth; ++l) any = any || part[i][l] > limit;
        return any;
#endif
    }
    PDN_INLINE void add_to(float* masses) const {
        constexpr int kPart = kLanes < kWidth ? kLanes : kWidth;
        for (int i = 0; i < kVectors; ++i)
            store_partial(masses + i * kPart, load_partial(masses + i * kPart, kPart) + part[i], kPart);
    }
};

// One tile of keys and kRows queries. `queries` and `keys` are packed; `column` is that of the first key.
struct Tile {
    const float *queries, *keys;
    float scale;
    float *references, *masses;  // of these queries
    int64_t column, valid;       // how many keys count
};

PDN_INLINE int side_of(const Layout& l, int64_t column) { return column >= l.first_column; }

// `PerColumn` vectors of a tile are in one block of keys. `Open`: the tile is the first one of its side, which all of
// its columns are on. False if a reference must be raised first: nothing was added, and `careful_tile` has to do it.
template <class Cells, int PerColumn, bool Open>
PDN_INLINE bool whole_tile(const Layout& l, const Tile& t) {
    vf scores[kRows][kTile];
    multiply<Cells, kTile>(t.queries, l.query_step, t.keys, l.cells, scores);
    if constexpr (Open) {
        float* references = t.references + side_of(l, t.column) * kLanes;
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            vf top = splat(-FLT_MAX);
#pragma GCC unroll 4
            for (int v = 0; v < kTile; ++v)  // `top` is the operand that stays where a score is NaN
                top = larger(Cells::kPerCell == 1 ? scores[r][v] : scores[r][v] * t.scale, top);
            references[r] = largest_lane(top);
        }
    }
    constexpr int kColumns = kTile / PerColumn;
    Sums sums[kColumns];
    bool fine = true;
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
        const float* references = t.references + side_of(l, t.column + c) * kLanes;
        vf rows[kRows];
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            rows[r] = exp2_any(relative<Cells>(scores[r][c * PerColumn], t.scale, references[r]));
#pragma GCC unroll 4
            for (int v = 1; v < PerColumn; ++v)
                rows[r] += exp2_any(relative<Cells>(scores[r][c * PerColumn + v], t.scale, references[r]));
        }
        sums[c].take(rows);
        fine = fine && !sums[c].exceed(kLimit);
    }
    if (__builtin_expect(fine, 1))
        for (int c = 0; c < kColumns; ++c) sums[c].add_to(t.masses + (t.column + c) * kLanes);
    return fine;
}

// Make `top` the reference of a query on a side: what was summed up relative to the old one is scaled down.
void raise(const Layout& l, const Tile& t, int row, int side, int64_t last_column, float top) {
    float* reference = t.references + side * kLanes + row;
    const float factor = exp2_any(splat(*reference - top))[0];
    for (int64_t column = side == 0 ? 0 : l.first_column; column <= last_column; ++column)
        t.masses[column * kLanes + row] *= factor;
    *reference = top;
}

// Any tile: keys that do not count, both sides, references that must be raised.
template <class Cells, int PerColumn>
__attribute__((noinline)) void careful_tile(const Layout& l, const Tile& t) {
    vf scores[kRows][kTile];
    multiply<Cells, kTile>(t.queries, l.query_step, t.keys, l.cells, scores);
    constexpr int kColumns = kTile / PerColumn;
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kColumns; ++c) {
            vf column[PerColumn], top = splat(-FLT_MAX);
            for (int v = 0; v < PerColumn; ++v) {
                vf score = scores[r][c * PerColumn + v];
                if constexpr (Cells::kPerCell == 2) score *= t.scale;
                for (int lane = 0; lane < kWidth; ++lane)
                    if ((c * PerColumn + v) * kWidth + lane >= t.valid) score[lane] = kNothing;
                top = larger(score, top);  // `top` is the operand that stays where a score is NaN
                column[v] = score;
            }
            const int side = side_of(l, t.column + c);
            const auto sum = [&] {
                vf sums{};
                for (int v = 0; v < PerColumn; ++v) sums += exp2_any(column[v] - t.references[side * kLanes + r]);
                return reduce_add(sums);
            };
            float mass = sum();
            if (mass > kLimit) {
                raise(l, t, r, side, t.column + c, largest_lane(top));
                mass = sum();
            }
            if (t.column + c < l.columns) t.masses[(t.column + c) * kLanes + r] += mass;
        }
}

// -------------------------------------------------------------------------------------------------------- one block

// Which columns begin a side in this tile: one that both sides share, or with keys that do not count, needs care.
template <class Cells, int PerColumn>
PDN_INLINE void one_tile(const Layout& l, const Tile& t, int64_t block, int64_t first_key) {
    const int64_t begin = l.first_column * block;  // the first key of the generated part
    const bool plain = t.valid >= kTileKeys && (begin <= first_key || begin >= first_key + kTileKeys);
    if (plain) {
        const bool opens = first_key == 0 || first_key == begin;
        if (opens ? whole_tile<Cells, PerColumn, true>(l, t) : whole_tile<Cells, PerColumn, false>(l, t)) return;
    }
    careful_tile<Cells, PerColumn>(l, t);
}

template <class Cells, int PerColumn>
PDN_INLINE void stream(const Layout& l, const ImportanceParams& p, const State& s, int64_t live_groups, int64_t valid,
                       float scale, const float* packed) {
    for (int64_t begin = 0; begin < valid; begin += l.chunk)
        for (int64_t group = 0; group < live_groups; ++group)
            for (int64_t key = begin; key < least(valid, begin + l.chunk); key += kTileKeys) {
                const Tile t = {s.query + group * kRows * l.query_step,
                                packed + key * l.cells,
                                scale,
                                s.references + group * 2 * kLanes,
                                s.masses + group * l.columns * kLanes,
                                key / p.block,
                                valid - key};
                one_tile<Cells, PerColumn>(l, t, p.block, key);
            }
}

// What the masses of kRows queries are multiplied by: on both sides for the softmax over all keys, and for the
// generated part by itself.
struct Factors {
    float all[2][kLanes], generated[kLanes];
};

PDN_INLINE float exp2_of(float x) { return exp2_any(splat(x))[0]; }

Factors factors_of(const Layout& l, const ImportanceParams& p, const float* references, const float* masses,
                   const float* lse, int64_t live) {
    Factors f = {};
    float totals[2][kLanes] = {};
    for (int64_t column = 0; column < l.columns; ++column)
        for (int i = 0; i < kLanes; ++i) totals[side_of(l, column)][i] += masses[column * kLanes + i];
    const float mean = 1.f / static_cast<float>(p.block * p.block);
    for (int64_t i = 0; i < live; ++i) {
        const float prompt = references[i], generated = references[kLanes + i];
        const float total = totals[1][i];
        f.generated[i] = total == 0.f ? 0.f : mean / total;
        if (lse != nullptr) {
            const float given = lse[i] == kNothing ? 0.f : lse[i] * kLog2E;
            f.all[0][i] = mean * exp2_of(prompt - given), f.all[1][i] = mean * exp2_of(generated - given);
            continue;
        }
        const float top = prompt > generated ? prompt : generated;
        const float share[2] = {exp2_of(prompt - top), exp2_of(generated - top)};
        const float both = totals[0][i] * share[0] + totals[1][i] * share[1];
        for (int side = 0; side < 2; ++side) f.all[side][i] = both == 0.f ? 0.f : mean * share[side] / both;
    }
    return f;
}

// The masses of all queries of a block, added up.
void write_row(const Layout& l, const State& s, const Factors* factors, int64_t groups, float* all, float* generated) {
    for (int64_t column = 0; column < l.columns; ++column) {
        const int side = side_of(l, column);
        float sums[kLanes] = {}, own[kLanes] = {};
        for (int64_t group = 0; group < groups; ++group) {
            const float* masses = s.masses + (group * l.columns + column) * kLanes;
            for (int i = 0; i < kLanes; ++i) sums[i] += masses[i] * factors[group].all[side][i];
            for (int i = 0; side == 1 && i < kLanes; ++i) own[i] += masses[i] * factors[group].generated[i];
        }
        for (int i = 1; i < kRows; ++i) sums[0] += sums[i], own[0] += own[i];
        all[column] = sums[0];
        if (side == 1) generated[column - l.first_column] = own[0];
    }
}

template <class Cells, class T>
void measure_as(const ImportanceParams& p, int64_t image, int64_t head, int64_t row, const float* packed,
                void* scratch) {
    const Layout l(p);
    const State s = state_of(l, scratch);
    const int64_t first = row * p.block, count = least(p.block, p.query.count - first);
    const int64_t groups = (count + kRows - 1) / kRows, rows = (p.query.count + p.block - 1) / p.block;
    const float scale = p.scale * kLog2E;
    pack_queries<Cells>(l, Rows<T>(p.query, image, head, p.query.count, p.size), first, count, scale, s.query);
    for (int64_t i = 0; i < groups * 2 * kLanes; ++i) s.references[i] = -FLT_MAX;
    for (int64_t i = 0; i < groups * l.columns * kLanes; ++i) s.masses[i] = 0.f;
    const int64_t valid = valid_keys(p, image);
    if (p.block >= kTileKeys) {
        stream<Cells, kTile>(l, p, s, groups, valid, scale, packed);
    } else if constexpr (kTile == 4) {
        p.block == 16 ? stream<Cells, 1>(l, p, s, groups, valid, scale, packed)
                      : stream<Cells, 2>(l, p, s, groups, valid, scale, packed);
    }
    Factors factors[(128 + kRows - 1) / kRows];
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t live = least(kRows, count - group * kRows);
        float* masses = s.masses + group * l.columns * kLanes;
        for (int64_t column = 0; column < l.columns; ++column)  // queries past the end read NaN from keys that hold it
            for (int64_t i = live; i < kRows; ++i) masses[column * kLanes + i] = 0.f;
        const float* lse = p.lse == nullptr ? nullptr : p.lse + (image * p.heads + head) * p.query.count + first;
        factors[group] = factors_of(l, p, s.references + group * 2 * kLanes, masses,
                                    lse == nullptr ? nullptr : lse + group * kRows, live);
    }
    const int64_t at = (image * p.heads + head) * rows + row;
    write_row(l, s, factors, groups, p.over_all + at * l.columns, p.over_generated + at * (l.columns - l.first_column));
}

// ---------------------------------------------------------------------------------------------------------- dtypes

void pack(const ImportanceParams& p, int64_t image, int64_t kv_head, int64_t index, void* packed) {
    with_types(p.dtype, [&]<class Cells, class T>() {
        pack_as<Cells, T>(p, image, kv_head, index, static_cast<float*>(packed));
    });
}

void measure(const ImportanceParams& p, int64_t image, int64_t head, int64_t row, const void* packed, void* scratch) {
    with_types(p.dtype, [&]<class Cells, class T>() {
        measure_as<Cells, T>(p, image, head, row, static_cast<const float*>(packed), scratch);
    });
}

}  // namespace
}  // namespace block_importance
}  // namespace pdn
