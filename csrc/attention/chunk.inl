// The keys that a block of queries reads, chunk by chunk: where they lie, and copies of those that a tile cannot read
// in place. Included once per ISA level.
#pragma once

#include "tiles.inl"

namespace pdn {
namespace attention {
namespace {

constexpr int64_t kLongestChunk = 256;                  // keys
constexpr int64_t kMostParts = kLongestChunk / 16 + 2;  // blocks have 16 keys or more, but for the cut ones

PDN_INLINE int64_t chunk_keys(const AttentionParams& p) { return p.size <= 64 ? kLongestChunk : kLongestChunk / 2; }

// Walks through the listed keys of a block of queries.
class Keys {
  public:
    // Blocks that adjoin come as one run unless `apart`.
    Keys(const AttentionParams& p, int64_t image, int64_t head, int64_t query, bool apart)
        : valid_(valid_keys(p, image)), size_(p.block_size), apart_(apart) {
        if (p.lists.counts == nullptr) {
            left_ = valid_;
            return;
        }
        const int64_t lists = (p.query.count + size_ - 1) / size_;
        const int64_t list = (image * p.lists.batch_stride + head * p.lists.head_stride) * lists + query / size_;
        count_ = least(p.lists.counts[list], p.lists.longest);
        narrow_ = p.lists.narrow;
        list_ = static_cast<const char*>(p.lists.indices) + list * p.lists.longest * (narrow_ ? 2 : 4);
    }

    // The next keys that adjoin, no more than `room`; false at the end.
    bool next(int64_t room, int64_t& first, int64_t& count) {
        while (left_ <= 0) {
            if (at_ >= count_) return false;
            key_ = block(at_++) * size_;
            int64_t end = key_ + size_;
            while (!apart_ && at_ < count_ && block(at_) * size_ == end) ++at_, end += size_;
            left_ = key_ < 0 ? 0 : least(end, valid_) - key_;
        }
        first = key_;
        count = least(left_, room);
        key_ += count;
        left_ -= count;
        return true;
    }

  private:
    int64_t block(int64_t i) const {
        return narrow_ ? reinterpret_cast<const int16_t*>(list_)[i] : reinterpret_cast<const int32_t*>(list_)[i];
    }
    const char* list_ = nullptr;
    bool narrow_ = false;
    int64_t count_ = 0, at_ = 0, key_ = 0, left_ = 0;
    int64_t valid_, size_;
    bool apart_;
};

struct Chunk {
    int64_t first, keys;  // the first key; keys in all parts
    int64_t key_bytes, value_bytes;
    int64_t key_parts, value_parts;
    KeyPart key[kMostParts];
    ValuePart value[kMostParts];
};

// What a chunk is made from. T are the elements, KeyCells what scores are made of, ValueCells what sums are made of.
template <class KeyCells, class ValueCells, class T>
struct Source {
    static constexpr bool kFromCodes = __is_same(KeyCells, Int8Cells);
    static constexpr bool kFloats = __is_same(T, float);
    Rows<T> keys, values;
    float *key_copies, *value_copies;
    bool keys_in_place;
    KeyCodes codes;
    float factor;
    int64_t block_size, key_cells;

    PDN_INLINE void add(Chunk& c, int64_t first, int64_t count) const {
        const int64_t cells = (count + ValueCells::kPerCell - 1) / ValueCells::kPerCell;
        if constexpr (kFromCodes)
            c.key[c.key_parts++] = {codes.codes + first * key_cells * 4, count,
                                    factor * codes.scales[first / block_size]};
        else if (kFloats || keys_in_place)
            c.key[c.key_parts++] = {reinterpret_cast<const char*>(keys.row(first)), count, factor};
        else
            copy_keys(c, first, count);
        if constexpr (kFloats)
            c.value[c.value_parts++] = {reinterpret_cast<const char*>(values.row(first)), cells};
        else
            copy_values(c, first, count, cells);
        c.keys += count;
    }

    void copy_keys(Chunk& c, int64_t first, int64_t count) const {
        const int64_t step = c.key_bytes / 4;
        for (int64_t i = 0; i < count; ++i)
            for (int64_t cell = 0; cell < step; cell += kWidth)
                store(key_copies + (c.keys + i) * step + cell, Reader<KeyCells, T>::cells(keys, first + i, cell));
        if (c.key_parts == 0) c.key[c.key_parts++] = {reinterpret_cast<const char*>(key_copies), 0, factor};
        c.key[0].count += count;
    }

    void copy_values(Chunk& c, int64_t first, int64_t count, int64_t cells) const {
        Rows<T> rows = values;  // those of this part only: what fills up its last cell is zero
        rows.data = values.row(first);
        rows.count = count;
        const int64_t step = c.value_bytes / 4;
        float* out = value_copies + c.keys / ValueCells::kPerCell * step;  // only the last part's count can be odd
        for (int64_t cell = 0; cell < cells; ++cell)
            for (int64_t d = 0; d < step; d += kWidth)
                store(out + cell * step + d, Reader<ValueCells, T>::values(rows, cell, d));
        if (c.value_parts == 0) c.value[c.value_parts++] = {reinterpret_cast<const char*>(value_copies), 0};
        c.value[0].cells += cells;
    }

    // The next chunk of up to `room` keys; false at the end.
    PDN_INLINE bool next(Keys& from, int64_t room, int64_t size, Chunk& c) const {
        c.keys = c.key_parts = c.value_parts = 0;
        c.key_bytes = kFromCodes                 ? key_cells * 4
                      : kFloats || keys_in_place ? keys.stride * static_cast<int64_t>(sizeof(T))
                                                 : round_up(key_cells, kWidth) * 4;
        c.value_bytes = kFloats ? values.stride * 4 : round_up(size, kWidth) * 4;
        for (int64_t first, count; c.keys < room && from.next(room - c.keys, first, count);) {
            if (c.keys == 0) c.first = first;
            add(c, first, count);
        }
        return c.keys > 0;
    }
};

}  // namespace
}  // namespace attention
}  // namespace pdn
