// How keys and values are packed, and packing them. Included once per ISA level.
//
// Blocks of keys follow one another. Keys of a block: tiles of up to kTile vectors of keys, in each [cell of the
// head][key], so that a vector holds the same element of kWidth keys. Values of a block: either such tiles of elements,
// in each [cell of keys][element]; or, where a head is no longer than a vector ("lanes"), [kLaneSums elements][vector
// of keys][element][key]. What pads a tile is zero.
#pragma once

#include "../core/fp16.h"
#include "params.h"
#include "tile.inl"

namespace pdn {
namespace attention {
namespace {

constexpr int64_t kLongestBlock = 512;  // keys

PDN_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
PDN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Vectors of the next tile where `left` remain: not four and one, which would leave the last tile short of work.
PDN_INLINE int64_t tile_vectors(int64_t left) { return left == kTile + 1 ? (left + 1) / 2 : least(left, kTile); }

PDN_INLINE bool uses_pairs([[maybe_unused]] const AttentionParams& p) {
#if defined(__AVX512BF16__)
    return p.dtype == DType::bfloat16;
#else
    return false;
#endif
}

PDN_INLINE bool in_lanes(const AttentionParams& p) { return p.size <= kWidth; }

// Keys and values of a block stay in the L2 cache (in L1 for small heads) while all queries pass by.
int64_t key_block(const AttentionParams& p) {
    if (p.size <= 8) return kLongestBlock;
    return p.size <= 64 ? 256 : p.size <= 160 ? 128 : 64;
}

struct Layout {
    int64_t block;           // keys of a whole block
    int64_t per_cell, unit;  // keys to a cell of the values; what the keys of a block are padded to
    int64_t cells, values;   // cells of a key; elements of a value, padded
    int64_t query_step;      // floats between packed queries
    int64_t keys_floats;     // of the head's packed keys; the values follow

    explicit Layout(const AttentionParams& p) {
        block = key_block(p);
        per_cell = uses_pairs(p) ? 2 : 1;
        unit = per_cell * kWidth;
        cells = (p.size + per_cell - 1) / per_cell;
        query_step = round_up(cells, kWidth);
        values = round_up(p.size, in_lanes(p) ? kLaneSums : kWidth);
        keys_floats = round_up(p.key.count, unit) * cells;
    }
    int64_t floats(const AttentionParams& p) const {
        return keys_floats + round_up(p.key.count, unit) / per_cell * values;
    }
    int64_t keys_at(int64_t index) const { return index * block * cells; }
    int64_t values_at(int64_t index) const { return keys_floats + index * block / per_cell * values; }
};

int64_t packed_bytes(const AttentionParams& p) { return Layout(p).floats(p) * 4; }

// -------------------------------------------------------------------------------------------------------- reading

#if defined(__AVX512F__)
PDN_INLINE vf widen(__m256i x, const bf16*) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
PDN_INLINE vf widen(__m256i x, const fp16*) { return (vf)_mm512_cvtph_ps(x); }
#endif

// Up to kWidth elements, the others zero.
template <class T>
PDN_INLINE vf load_some(const T* p, int64_t n) {
    if (n >= kWidth) return load(p);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 2) {  // quicker than by way of memory
        const __m256i some = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p);
        return widen(some, p);
    }
#endif
    return load_partial(p, static_cast<int>(n));
}

// Rows of one head: `row(i)` is the first element of token i.
template <class T>
struct Rows {
    const T* data;
    int64_t stride, count, size;

    Rows(const AttentionParams& p, const Tokens& tokens, int64_t image, int64_t head)
        : data(static_cast<const T*>(tokens.data) + image * tokens.batch_stride + head * p.size),
          stride(tokens.row_stride),
          count(tokens.count),
          size(p.size) {}
    PDN_INLINE const T* row(int64_t i) const { return data + i * stride; }

    // kWidth elements of token i from `first` on, as floats; zeros past the end of tokens and of the head.
    PDN_INLINE vf elements(int64_t i, int64_t first) const {
        return i < count && first < size ? load_some(row(i) + first, size - first) : vf{};
    }
};

template <class Cells, class T>
struct Reader {
    // kWidth cells of token i from cell `first` on.
    static PDN_INLINE vf cells(const Rows<T>& rows, int64_t i, int64_t first) { return rows.elements(i, first); }
    // kWidth cells of keys: element `first` and further of the tokens that share the cell `cell`.
    static PDN_INLINE vf values(const Rows<T>& rows, int64_t cell, int64_t first) { return rows.elements(cell, first); }
};

#if defined(__AVX512BF16__)
template <>
struct Reader<Bf16Pairs, bf16> {
    static PDN_INLINE vf cells(const Rows<bf16>& rows, int64_t i, int64_t first) {
        const int64_t left = rows.size - 2 * first;
        if (i >= rows.count || left <= 0) return vf{};
        const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1u;
        return (vf)_mm512_maskz_loadu_epi16(mask, rows.row(i) + 2 * first);
    }
    static PDN_INLINE vf values(const Rows<bf16>& rows, int64_t cell, int64_t first) {
        const __m512i even = (__m512i)rows.elements(2 * cell, first), odd = (__m512i)rows.elements(2 * cell + 1, first);
        return (vf)_mm512_or_si512(_mm512_srli_epi32(even, 16), odd);  // widened bfloat16 end with 16 zeros
    }
};
#endif

// -------------------------------------------------------------------------------------------------------- packing

template <class Cells, class T>
PDN_INLINE void pack_keys(const Layout& l, const Rows<T>& rows, int64_t first, int64_t keys, float* packed) {
    int64_t tile = 0, width = tile_vectors(keys / kWidth) * kWidth;
    for (int64_t key = 0; key < keys; key += kWidth) {
        if (key == tile + width) {
            tile = key;
            width = tile_vectors((keys - key) / kWidth) * kWidth;
        }
        float* out = packed + tile * l.cells + (key - tile);
        for (int64_t cell = 0; cell < l.cells; cell += kWidth) {
            vf block[kWidth];
            for (int i = 0; i < kWidth; ++i) block[i] = Reader<Cells, T>::cells(rows, first + key + i, cell);
            transpose(block);
            const int64_t n = least(kWidth, l.cells - cell);
            for (int64_t i = 0; i < n; ++i) store(out + (cell + i) * width, block[i]);
        }
    }
}

template <class Cells, class T>
PDN_INLINE void pack_values(const Layout& l, const Rows<T>& rows, int64_t first, int64_t keys, float* packed) {
    const int64_t cells = keys / Cells::kPerCell, first_cell = first / Cells::kPerCell;
    for (int64_t tile = 0, width; tile < l.values; tile += width) {
        width = tile_vectors((l.values - tile) / kWidth) * kWidth;
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

template <class Cells, class T>
PDN_INLINE void pack_lanes(const Layout& l, const Rows<T>& rows, int64_t first, int64_t keys, float* packed) {
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
        for (int64_t i = 0; i < l.values; ++i)
            store(packed + i / kLaneSums * kLaneSums * cells + cell * kLaneSums + i % kLaneSums * kWidth, block[i]);
    }
}

template <class Cells, class T>
void pack_as(const AttentionParams& p, int64_t image, int64_t head, int64_t block, float* packed) {
    const Layout l(p);
    const int64_t first = block * l.block, keys = round_up(least(l.block, p.key.count - first), l.unit);
    const Rows<T> key(p, p.key, image, head), value(p, p.value, image, head);
    pack_keys<Cells>(l, key, first, keys, packed + l.keys_at(block));
    if (in_lanes(p))
        pack_lanes<Cells>(l, value, first, keys, packed + l.values_at(block));
    else
        pack_values<Cells>(l, value, first, keys, packed + l.values_at(block));
}

void pack(const AttentionParams& p, int64_t image, int64_t head, int64_t block, void* packed) {
    float* out = static_cast<float*>(packed);
    if (p.dtype == DType::float32) return pack_as<Floats, float>(p, image, head, block, out);
    if (p.dtype == DType::float16) return pack_as<Floats, fp16>(p, image, head, block, out);
#if defined(__AVX512BF16__)
    pack_as<Bf16Pairs, bf16>(p, image, head, block, out);
#else
    pack_as<Floats, bf16>(p, image, head, block, out);
#endif
}

}  // namespace
}  // namespace attention
}  // namespace pdn
