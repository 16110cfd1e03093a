// Packing tokens of one head into the order in which the register tile reads them. What is past the end of the tokens
// or of the head is zero. Included once per ISA level.
#pragma once

#include "rows.inl"

namespace pdn {
namespace attention {
namespace {

// Vectors of the next tile where `left` remain: not four and one, which would leave the last tile short of work.
PDN_INLINE int64_t tile_vectors(int64_t left) { return left == kTile + 1 ? (left + 1) / 2 : least(left, kTile); }

// body.operator()<Vectors>(first) for every tile of `count` floats.
template <class Body>
PDN_INLINE void each_tile(int64_t count, const Body& body) {
    for (int64_t first = 0, vectors; first < count; first += vectors * kWidth) {
        vectors = tile_vectors((count - first) / kWidth);
        if (vectors == kTile) {
            body.template operator()<kTile>(first);
        } else if (vectors == 1) {
            body.template operator()<1>(first);
        } else if constexpr (kTile == 4) {
            vectors == 2 ? body.template operator()<2>(first) : body.template operator()<3>(first);
        }
    }
}

// Tokens [first, first + keys) as tiles of up to kTile vectors of tokens, in each [cell of the head][token]: a vector
// holds the same cell of kWidth tokens. `keys` is a multiple of kWidth, `cells` those of a token; [keys * cells]
// floats.
template <class Cells, class T>
PDN_INLINE void pack_keys(const Rows<T>& rows, int64_t cells, int64_t first, int64_t keys, float* packed) {
    int64_t tile = 0, width = tile_vectors(keys / kWidth) * kWidth;
    for (int64_t key = 0; key < keys; key += kWidth) {
        if (key == tile + width) {
            tile = key;
            width = tile_vectors((keys - key) / kWidth) * kWidth;
        }
        float* out = packed + tile * cells + (key - tile);
        for (int64_t cell = 0; cell < cells; cell += kWidth) {
            vf block[kWidth];
            for (int i = 0; i < kWidth; ++i) block[i] = Reader<Cells, T>::cells(rows, first + key + i, cell);
            transpose(block);
            const int64_t n = least(kWidth, cells - cell);
            for (int64_t i = 0; i < n; ++i) store(out + (cell + i) * width, block[i]);
        }
    }
}

// The same tokens as tiles of up to kTile vectors of elements, in each [cell of tokens][element]. `values` are the
// elements, a multiple of kWidth; [keys / kPerCell * values] floats.
template <class Cells, class T>
PDN_INLINE void pack_values(const Rows<T>& rows, int64_t values, int64_t first, int64_t keys, float* packed) {
    const int64_t cells = keys / Cells::kPerCell, first_cell = first / Cells::kPerCell;
    for (int64_t tile = 0, width; tile < values; tile += width) {
        width = tile_vectors((values - tile) / kWidth) * kWidth;
        for (int64_t cell = 0; cell < cells; ++cell)
            for (int64_t i = 0; i < width; i += kWidth)
                store(packed + tile * cells + cell * width + i,
                      Reader<Cells, T>::values(rows, first_cell + cell, tile + i));
    }
}

// Up to kWidth elements of kWidth tokens, one vector an element.
template <class T>
PDN_INLINE void transposed_values(const Rows<T>& rows, int64_t first, vf (&block)[kWidth]) {
    for (int i = 0; i < kWidth; ++i) block[i] = rows.elements(first + i, 0);
    transpose(block);
}

// For heads no longer than a vector: [kLaneSums elements][vector of tokens][element][token]. `values` are the elements,
// a multiple of kLaneSums.
template <class Cells, class T>
PDN_INLINE void pack_lanes(const Rows<T>& rows, int64_t values, int64_t first, int64_t keys, float* packed) {
    const int64_t cells = keys / Cells::kPerCell;
    for (int64_t cell = 0; cell < cells; cell += kWidth) {
        vf block[kWidth];
        transposed_values(rows, first + cell * Cells::kPerCell, block);
#if defined(__AVX512BF16__)
        if constexpr (Cells::kPerCell == 2) {
            vf next[kWidth];
            transposed_values(rows, first + cell * 2 + kWidth, next);
            for (int i = 0; i < kWidth; ++i)  // exact: they are bfloat16 already
                block[i] = (vf)_mm512_cvtne2ps_pbh((__m512)next[i], (__m512)block[i]);
        }
#endif
        for (int64_t i = 0; i < values; ++i)
            store(packed + i / kLaneSums * kLaneSums * cells + cell * kLaneSums + i % kLaneSums * kWidth, block[i]);
    }
}

}  // namespace
}  // namespace attention
}  // namespace pdn
