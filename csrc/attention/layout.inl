// Where the packed keys and values of a head lie. Included once per ISA level.
//
// Blocks of keys follow one another; each is packed by ../core/attention/pack.inl, the values in lanes where a head is
// no longer than a vector.
#pragma once

#include "../core/attention/pack.inl"
#include "params.h"

namespace pdn {
namespace attention {
namespace {

constexpr int64_t kLongestBlock = 512;  // keys

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

template <class Cells, class T>
void pack_as(const AttentionParams& p, int64_t image, int64_t head, int64_t block, float* packed) {
    const Layout l(p);
    const int64_t first = block * l.block, keys = round_up(least(l.block, p.key.count - first), l.unit);
    const Rows<T> key(p.key, image, head, p.key.count, p.size), value(p.value, image, head, p.key.count, p.size);
    pack_keys<Cells>(key, l.cells, first, keys, packed + l.keys_at(block));
    if (in_lanes(p))
        pack_lanes<Cells>(value, l.values, first, keys, packed + l.values_at(block));
    else
        pack_values<Cells>(value, l.values, first, keys, packed + l.values_at(block));
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
