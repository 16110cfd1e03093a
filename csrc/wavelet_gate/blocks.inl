// What both memory layouts share: items, vectors of blocks, the butterfly. Included once per ISA level.
#pragma once

#include "../core/fp16.h"
#include "../core/past.inl"
#include "params.h"

namespace pdn {
namespace wavelet_gate {
namespace {

constexpr int kFlush = 128;  // additions in a row, before a sum is added to that of longer ones

// `count` elements, 1 to kWidth. A constant count costs nothing.
template <class T>
PDN_INLINE vf load_some(const T* p, int count) {
    return count == kWidth ? load(p) : load_partial(p, count);
}

template <class T>
PDN_INLINE void store_some(T* p, vf v, int count, [[maybe_unused]] bool past_caches) {
    if (count != kWidth) {
        store_partial(p, v, count);
        return;
    }
    if constexpr (sizeof(T) == sizeof(float)) {
        if (past_caches && streams_to(p)) {
            store_past(p, v);
            return;
        }
    }
    store(p, v);
}

struct Item {
    int64_t image, plane, first, last;  // plane: 0 where channels are adjacent
};

template <class P>
PDN_INLINE Item item_of(const P& p, int64_t number, int64_t rows) {
    const int64_t parts = ceil_div(rows, p.item_rows), plane = number / parts, first = number % parts * p.item_rows;
    const int64_t last = first + p.item_rows < rows ? first + p.item_rows : rows;
    if (p.channels_last) return {plane, 0, first, last};
    return {plane / p.channels, plane % p.channels, first, last};
}

template <class T>
PDN_INLINE T* at(const View& view, int64_t n, int64_t c, int64_t h) {
    return static_cast<T*>(view.data) + n * view.n + c * view.c + h * view.h;
}

PDN_INLINE const float* factors_of(const Params& p, const Item& item) {
    return p.factors + item.image * kBands * p.factor_channels + (p.factor_channels > 1 ? item.plane : 0);
}

// Signs times (a, b, c, d), and times the bands: the matrix is its own transpose.
PDN_INLINE void butterfly(vf (&v)[kBands]) {
    const vf above = v[0] + v[1], below = v[2] + v[3], left = v[0] - v[1], right = v[2] - v[3];
    v[0] = above + below;
    v[1] = left + right;
    v[2] = above - below;
    v[3] = left - right;
}

// Sums of four kinds in pieces of bounded length.
struct Sums {
    vf recent[kBands] = {}, all[kBands] = {};
    int64_t length = 0;

    PDN_INLINE void add(int kind, vf v) { recent[kind] += v; }
    PDN_INLINE void count(int64_t additions) {
        length += additions;
        if (length < kFlush) return;
        for (int i = 0; i < kBands; ++i) all[i] += recent[i], recent[i] = vf{};
        length = 0;
    }
    PDN_INLINE void write(float* result) const {
        for (int i = 0; i < kBands; ++i) result[i] = reduce_add(all[i] + recent[i]);
    }
};

}  // namespace
}  // namespace wavelet_gate
}  // namespace pdn
