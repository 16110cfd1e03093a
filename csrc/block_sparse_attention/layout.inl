// The workspace of one head of keys, and filling and emptying it. Included once per ISA level.
//
// A matrix is an operand in up to three orders: as rows of cells (tokens whose elements are repeated over a vector), as
// tiles of tokens (pack_keys: a vector holds the same cell of several tokens), and as rows of elements (a vector holds
// elements of one cell of tokens). For cells of one float the first and the third are the same.
#pragma once

#include "../core/attention/pack.inl"
#include "../core/attention/softmax.inl"
#include "../core/attention/types.inl"
#include "params.h"

namespace pdn {
namespace block_sparse_attention {
namespace {

using namespace attention;

struct Layout {
    bool pairs;
    int64_t cells;          // of a token
    int64_t step;           // floats between the cells of tokens
    int64_t values;         // floats between rows of elements
    int64_t queries, keys;  // tokens, padded
    int64_t query_floats, key_floats;

    explicit Layout(const BackwardParams& p) {
        pairs = uses_pairs(p.dtype);
        cells = pairs ? (p.size + 1) / 2 : p.size;
        step = round_up(cells, kWidth);
        values = round_up(p.size, kWidth);
        queries = round_up(p.query.count, 16);
        keys = round_up(p.key.count, 16);
        query_floats = queries * (2 * step + (pairs ? values : 0) + values + 3);
        key_floats = keys * (2 * cells + 2 * values) + (pairs ? keys / 2 : keys) * values;
    }
};

// One head of queries.
struct Queries {
    float *query, *grad;                // rows of cells; for cells of one float the query is scaled, to base 2
    float *query_values, *grad_values;  // rows of elements
    float* sums;                        // [queries][values]: the gradient without its scale
    float *lse, *rest;                  // their sum is the lse to base 2; +inf where nothing is attended to
    float* delta;

    Queries(const Layout& l, void* workspace, int64_t index) {
        float* at = static_cast<float*>(workspace) + l.key_floats + index * l.query_floats;
        const auto take = [&](int64_t floats) {
            float* const begin = at;
            at += floats;
            return begin;
        };
        query = query_values = take(l.queries * l.step);
        grad = grad_values = take(l.queries * l.step);
        if (l.pairs) {
            query_values = take(l.queries / 2 * l.values);
            grad_values = take(l.queries / 2 * l.values);
        }
        sums = take(l.queries * l.values);
        lse = take(l.queries);
        rest = take(l.queries);
        delta = take(l.queries);
    }
};

struct Keys {
    float *key, *value;            // tiles of tokens, block by block
    float* key_values;             // rows of elements
    float *key_sums, *value_sums;  // [keys][values]: the gradients, that of the key without its scale

    Keys(const Layout& l, void* workspace) {
        float* at = static_cast<float*>(workspace);
        key = at;
        value = key + l.keys * l.cells;
        key_values = value + l.keys * l.cells;
        key_sums = key_values + (l.pairs ? l.keys / 2 : l.keys) * l.values;
        value_sums = key_sums + l.keys * l.values;
    }
};

int64_t workspace_bytes(const BackwardParams& p) {
    const Layout l(p);
    return 4 * (l.key_floats + p.heads / p.kv_heads * l.query_floats);
}

PDN_INLINE int64_t valid_keys(const BackwardParams& p, int64_t image) {
    return p.key_lengths == nullptr ? p.key.count : least(p.key.count, p.key_lengths[image]);
}

// ----------------------------------------------------------------------------------------------------------- begin

template <class Cells, class T>
PDN_INLINE void cell_rows(const Layout& l, const Rows<T>& rows, int64_t first, int64_t last, float scale,
                          float* packed) {
    for (int64_t i = first; i < last; ++i)
        for (int64_t cell = 0; cell < l.step; cell += kWidth) {
            const vf v = Reader<Cells, T>::cells(rows, i, cell);
            store(packed + i * l.step + cell, Cells::kPerCell == 1 ? v * scale : v);
        }
}

template <class Cells, class T>
PDN_INLINE void element_rows(const Layout& l, const Rows<T>& rows, int64_t first, int64_t last, float* packed) {
    for (int64_t cell = first / Cells::kPerCell; cell < last / Cells::kPerCell; ++cell)
        for (int64_t d = 0; d < l.values; d += kWidth)
            store(packed + cell * l.values + d, Reader<Cells, T>::values(rows, cell, d));
}

PDN_INLINE void clear(const Layout& l, int64_t first, int64_t last, float* sums) {
    for (int64_t i = first * l.values; i < last * l.values; i += kWidth) store(sums + i, vf{});
}

template <class Cells, class T>
void begin_keys_as(const BackwardParams& p, int64_t image, int64_t kv_head, int64_t piece, void* workspace) {
    const Layout l(p);
    const Keys k(l, workspace);
    const int64_t valid = valid_keys(p, image), first = piece * kPiece, last = least(l.keys, first + kPiece);
    const Rows<T> key(p.key, image, kv_head, valid, p.size), value(p.value, image, kv_head, valid, p.size);
    for (int64_t block = first; block < last; block += p.block) {
        const int64_t count = least(p.block, last - block);
        pack_keys<Cells>(key, l.cells, block, count, k.key + block * l.cells);
        pack_keys<Cells>(value, l.cells, block, count, k.value + block * l.cells);
    }
    element_rows<Cells>(l, key, first, last, k.key_values);
    clear(l, first, last, k.key_sums), clear(l, first, last, k.value_sums);
}

template <class Cells, class T>
void begin_queries_as(const BackwardParams& p, int64_t image, int64_t head, int64_t piece, void* workspace) {
    const Layout l(p);
    const Queries q(l, workspace, head % (p.heads / p.kv_heads));
    const int64_t first = piece * kPiece, last = least(l.queries, first + kPiece);
    const Rows<T> query(p.query, image, head, p.query.count, p.size), grad(p.grad, image, head, p.query.count, p.size);
    cell_rows<Cells>(l, query, first, last, p.scale * kLog2E, q.query);
    cell_rows<Cells>(l, grad, first, last, 1.f, q.grad);
    if constexpr (Cells::kPerCell == 2) {
        element_rows<Cells>(l, query, first, last, q.query_values);
        element_rows<Cells>(l, grad, first, last, q.grad_values);
    }
    clear(l, first, last, q.sums);
    const float* lse = p.lse + (image * p.heads + head) * p.query.count;
    const float* delta = p.delta + (image * p.heads + head) * p.query.count;
    for (int64_t i = first; i < last; ++i) {
        const bool attends = i < p.query.count && lse[i] != kNothing;
        const double base2 = attends ? static_cast<double>(lse[i]) * 1.4426950408889634 : -kNothing;
        q.lse[i] = static_cast<float>(base2);
        q.rest[i] = attends ? static_cast<float>(base2 - q.lse[i]) : 0.f;
        q.delta[i] = i < p.query.count ? delta[i] : 0.f;
    }
}

// ------------------------------------------------------------------------------------------------------------- end

// sums * scale as rows of `out`, zeros from row `valid` on.
template <class T>
PDN_INLINE void write_rows(const Layout& l, const float* sums, int64_t size, int64_t first, int64_t last, int64_t valid,
                           float scale, T* out) {
    for (int64_t i = first; i < last; ++i)
        for (int64_t d = 0; d < size; d += kWidth)
            store_some(out + i * size + d, i < valid ? load(sums + i * l.values + d) * scale : vf{}, size - d);
}

template <class T>
void end_keys_as(const BackwardParams& p, int64_t image, int64_t kv_head, int64_t piece, void* workspace) {
    const Layout l(p);
    const Keys k(l, workspace);
    const int64_t first = piece * kPiece, last = least(p.key.count, first + kPiece), valid = valid_keys(p, image);
    const int64_t at = (image * p.kv_heads + kv_head) * p.key.count * p.size;
    const float scale = l.pairs ? p.scale : 1 / kLog2E;  // else the queries had the rest of it
    write_rows(l, k.key_sums, p.size, first, last, valid, scale, static_cast<T*>(p.grad_key) + at);
    write_rows(l, k.value_sums, p.size, first, last, valid, 1.f, static_cast<T*>(p.grad_value) + at);
}

template <class T>
void end_queries_as(const BackwardParams& p, int64_t image, int64_t head, int64_t piece, void* workspace) {
    const Layout l(p);
    const Queries q(l, workspace, head % (p.heads / p.kv_heads));
    const int64_t first = piece * kPiece, last = least(p.query.count, first + kPiece);
    write_rows(l, q.sums, p.size, first, last, last, p.scale,
               static_cast<T*>(p.grad_query) + (image * p.heads + head) * p.query.count * p.size);
}

}  // namespace
}  // namespace block_sparse_attention
}  // namespace pdn
