// Scores from int8: keys less their mean, a scale for each block of keys and of queries. Codes are stored as the dot
// product of the level reads them. Included once per ISA level.
#pragma once

#include <cfloat>

#include "../core/attention/pack.inl"
#include "../core/attention/types.inl"
#include "../core/dot.inl"
#include "params.h"

namespace pdn {
namespace attention {
namespace {

struct Int8Cells {
    static constexpr int kPerCell = kChannels;
    static PDN_INLINE vi repeated(const char* cell) { return operand(cell); }
    static PDN_INLINE vi add_product(vi sum, vi key, vi query) { return dot(sum, key, query); }
};

PDN_INLINE int64_t code_cells(const AttentionParams& p) { return (p.size + kChannels - 1) / kChannels; }
PDN_INLINE int64_t padded_size(const AttentionParams& p) { return round_up(p.size, kWidth); }

PDN_INLINE int64_t code_floats(const AttentionParams& p) {  // in front of a head's codes
    return padded_size(p) + round_up((p.key.count + p.block_size - 1) / p.block_size, 16);
}

// Of one head of keys.
int64_t code_bytes(const AttentionParams& p) {
    return round_up((code_floats(p) + p.key.count * code_cells(p)) * 4, 64);
}

// The same, in the memory of all heads.
struct KeyCodes {
    float* mean = nullptr;    // [padded_size]
    float* scales = nullptr;  // [blocks]
    char* codes = nullptr;    // [keys][code_cells] cells of 32 bits

    KeyCodes() = default;
    KeyCodes(const AttentionParams& p, int64_t image, int64_t kv_head, void* memory) {
        char* const at = static_cast<char*>(memory) + (image * (p.heads / p.group) + kv_head) * code_bytes(p);
        mean = reinterpret_cast<float*>(at);
        scales = mean + padded_size(p);
        codes = at + code_floats(p) * 4;
    }
};

PDN_INLINE int64_t valid_keys(const AttentionParams& p, int64_t image) {
    if (p.key_lengths == nullptr) return p.key.count;
    const int64_t length = p.key_lengths[image];
    return length < 0 ? 0 : least(length, p.key.count);
}

// The mean of the keys that count.
void average_keys(const AttentionParams& p, int64_t image, int64_t kv_head, void* memory) {
    constexpr int64_t kPiece = 64;  // keys whose sum is taken by itself: long chains of additions lose digits
    const KeyCodes to(p, image, kv_head, memory);
    const int64_t keys = valid_keys(p, image);
    with_types(p.dtype, [&]<class, class T>() {
        const Rows<T> rows(p.key, image, kv_head, keys, p.size);
        for (int64_t d = 0; d < p.size; d += kWidth) {
            vf total{};
            for (int64_t first = 0; first < keys; first += kPiece) {
                vf sum{};
                for (int64_t i = first; i < least(first + kPiece, keys); ++i) sum += rows.elements(i, d);
                total += sum;
            }
            store(to.mean + d, total / (keys > 0 ? static_cast<float>(keys) : 1.f));
        }
    });
}

// The scale of values whose largest magnitude is `largest`: NaN stays.
PDN_INLINE float code_scale(float largest) {
    const float scale = largest / 127.f;
    return scale < FLT_MIN ? 1.f : scale;
}

// Magnitudes as integers, of which NaN is the largest.
PDN_INLINE vi larger_magnitude(vi a, vf x) {
    const vi m = (vi)x & 0x7fffffff;
    return m > a ? m : a;
}

PDN_INLINE float largest_of(vi magnitudes) {
    int32_t best = 0;
    for (int i = 0; i < kWidth; ++i) best = magnitudes[i] > best ? magnitudes[i] : best;
    float value;
    std::memcpy(&value, &best, sizeof value);
    return value;
}

// x / scale rounded to even, as 32-bit integers from -127 to 127; any such integer for what is no number.
PDN_INLINE vi codes_of(vf x, float scale) {
    const vf quotient = x / scale;
    const vf low = select(quotient > -127.f, quotient, splat(-127.f));
    const vf clamped = select(low < 127.f, low, splat(127.f));
    return (vi)(clamped + 12582912.f) - (vi)splat(12582912.f);
}

// The first `n` lanes.
template <class T>
PDN_INLINE void store_codes(T* p, vi codes, int64_t n) {
#if defined(__AVX512F__)
    const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1u);
    if constexpr (sizeof(T) == 1)
        _mm512_mask_cvtepi32_storeu_epi8(p, mask, (__m512i)codes);
    else
        _mm512_mask_cvtepi32_storeu_epi16(p, mask, (__m512i)codes);
#else
    for (int64_t i = 0; i < n; ++i) p[i] = static_cast<T>(codes[i]);
#endif
}

// One block of keys.
void encode_keys(const AttentionParams& p, int64_t image, int64_t kv_head, int64_t block, void* memory) {
    const KeyCodes to(p, image, kv_head, memory);
    const int64_t first = block * p.block_size, last = least(first + p.block_size, valid_keys(p, image));
    with_types(p.dtype, [&]<class, class T>() {
        const Rows<T> rows(p.key, image, kv_head, p.key.count, p.size);
        vi largest{};
        for (int64_t i = first; i < last; ++i)
            for (int64_t d = 0; d < p.size; d += kWidth)
                largest = larger_magnitude(largest, rows.elements(i, d) - load(to.mean + d));
        const float scale = code_scale(largest_of(largest));
        to.scales[block] = scale;
        for (int64_t i = first; i < last; ++i) {
            Code* out = reinterpret_cast<Code*>(to.codes + i * code_cells(p) * 4);
            for (int64_t d = 0; d < p.size; d += kWidth) {
                const vi codes = codes_of(rows.elements(i, d) - load(to.mean + d), scale) + kOffset;
                store_codes(out + d, codes, least(kWidth, code_cells(p) * kChannels - d));
            }
        }
    });
}

// The queries [first, last), one block: codes in tiles as pack_keys has them, [cell][query]; `starts` [queries] is what
// a sum begins with so that it ends as the product of the codes. `row` holds kWidth rows of cells. Returns the scale.
template <class T>
float encode_queries(const AttentionParams& p, const Rows<T>& rows, int64_t first, int64_t last, float* row,
                     float* packed, int32_t* starts) {
    vi largest{};
    for (int64_t i = first; i < last; ++i)
        for (int64_t d = 0; d < p.size; d += kWidth) largest = larger_magnitude(largest, rows.elements(i, d));
    const float scale = code_scale(largest_of(largest));
    const int64_t padded = round_up(last - first, kWidth), cells = code_cells(p), step = round_up(cells, kWidth);
    int64_t tile = 0, width = tile_vectors(padded / kWidth) * kWidth;
    for (int64_t query = 0; query < padded; query += kWidth) {
        if (query == tile + width) {
            tile = query;
            width = tile_vectors((padded - query) / kWidth) * kWidth;
        }
        for (int64_t i = 0; i < kWidth; ++i) {
            Weight* out = reinterpret_cast<Weight*>(row + i * step);
            vi sums{};
            for (int64_t d = 0; d < step * kChannels; d += kWidth) {
                const bool there = first + query + i < last;
                const vi codes = codes_of(there ? rows.elements(first + query + i, d) : vf{}, scale);
                sums += codes;
                store_codes(out + d, codes, kWidth);
            }
            int32_t sum = 0;
            for (int j = 0; j < kWidth; ++j) sum += sums[j];
            starts[query + i] = -kOffset * sum;
        }
        for (int64_t cell = 0; cell < cells; cell += kWidth) {
            vf block[kWidth];
            for (int i = 0; i < kWidth; ++i) block[i] = load(row + i * step + cell);
            transpose(block);
            for (int64_t i = 0; i < least(kWidth, cells - cell); ++i)
                store(packed + tile * cells + (query - tile) + (cell + i) * width, block[i]);
        }
    }
    return scale;
}

}  // namespace
}  // namespace attention
}  // namespace pdn
