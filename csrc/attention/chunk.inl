// The keys that a block of queries reads, chunk by chunk: where they lie, and copies of those that a tile cannot read
// in place. Included once per ISA level.
#pragma once

#include "tiles.inl"

namespace pdn {
namespace attention {
namespace {

constexpr int64_t kLongestChunk = 256;                  // keys
constexpr int64_t kMostParts = kLongestChunk / 16 + 2;  // blocks have 16 keys or more, but for the cut ones

PDN_INLINE int64_t chunk_keys(const AttentionParams& p) {
    return p.size <= 64 ? kLongestChunk : p.size <= 256 ? kLongestChunk / 2 : kLongestChunk / 4;
}

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
    int64_t key_parts, value_parts;
    KeyPart key[kMostParts];
    ValuePart value[kMostParts];
};

// What chunks are made from. T are the elements, KeyCells what scores are made of, ValueCells what sums are made of.
template <class KeyCells, class ValueCells, class T>
struct Source {
    static constexpr bool kFromCodes = __is_same(KeyCells, Int8Cells);
    static constexpr bool kFloats = __is_same(T, float);
    Rows<T> keys, values;
    float *key_copies, *value_copies;
    KeyCodes codes;
    float factor;
    int64_t block_size, cells;  // cells of a key

    // Whether tiles read keys where the tensor, or the codes, are: pairs of bfloat16 must not end in the middle.
    PDN_INLINE bool keys_in_place() const {
        return kFromCodes || kFloats || (KeyCells::kPerCell == 2 && keys.size % 2 == 0);
    }
    PDN_INLINE int64_t key_step() const {
        if (kFromCodes) return cells * 4;
        return keys_in_place() ? keys.stride * static_cast<int64_t>(sizeof(T)) : round_up(cells, kWidth) * 4;
    }
    PDN_INLINE int64_t value_step() const { return kFloats ? values.stride * 4 : round_up(values.size, kWidth) * 4; }

    // The next chunk of up to `room` keys; false at the end. Its values may have to be copied yet.
    PDN_INLINE bool next(Keys& from, int64_t room, Chunk& c) const {
        c.keys = c.key_parts = c.value_parts = 0;
        for (int64_t first, count; c.keys < room && from.next(room - c.keys, first, count); c.keys += count) {
            if (c.keys == 0) c.first = first;
            c.key[c.key_parts++] = {keys_of(c, first, count), reinterpret_cast<const char*>(values.row(first)), count,
                                    kFromCodes ? factor * codes.scales[first / block_size] : factor};
        }
        return c.keys > 0;
    }

    PDN_INLINE const char* keys_of(const Chunk& c, int64_t first, int64_t count) const {
        if constexpr (kFromCodes) return codes.codes + first * key_step();
        if (keys_in_place()) return reinterpret_cast<const char*>(keys.row(first));
        if constexpr (!kFromCodes) {
            const int64_t step = key_step() / 4;
            float* const out = key_copies + c.keys * step;
            for (int64_t i = 0; i < count; ++i)
                for (int64_t cell = 0; cell < step; cell += kWidth)
                    store(out + i * step + cell, Reader<KeyCells, T>::cells(keys, first + i, cell));
            return reinterpret_cast<const char*>(out);
        }
    }

    // Where the values of a chunk are: in the tensor, or in copies made now.
    PDN_INLINE void find_values(Chunk& c) const {
        if constexpr (kFloats) {
            for (; c.value_parts < c.key_parts; ++c.value_parts)
                c.value[c.value_parts] = {c.key[c.value_parts].values, c.key[c.value_parts].count};
        } else {
            const int64_t step = value_step() / 4;
            float* out = value_copies;
            for (int64_t i = 0; i < c.key_parts; ++i) {
                Rows<T> rows = values;  // those of this part only: what fills up its last cell is zero
                rows.data = reinterpret_cast<const T*>(c.key[i].values);
                rows.count = c.key[i].count;  // only that of the last part can be odd
                for (int64_t cell = 0; cell * ValueCells::kPerCell < rows.count; ++cell, out += step)
                    for (int64_t d = 0; d < step; d += kWidth)
                        store(out + d, Reader<ValueCells, T>::values(rows, cell, d));
            }
            c.value_parts = 1;
            c.value[0] = {reinterpret_cast<const char*>(value_copies), (out - value_copies) / step};
        }
    }
};

}  // namespace
}  // namespace attention
}  // namespace pdn
