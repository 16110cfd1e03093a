// Pixels of adjacent channels: vectors along the channels of the four pixels of a block. Included once per ISA level.
#pragma once

#include "blocks.inl"

namespace pdn {
namespace wavelet_gate {
namespace {

constexpr int64_t kStage = 512;  // channels that are worked on at once: their sums stay in the first cache

// step(first channel, count) over `begin` to `end`.
template <class Step>
PDN_INLINE void for_channels(int64_t begin, int64_t end, const Step& step) {
    int64_t c = begin;
    for (; c + kWidth <= end; c += kWidth) step(c, kWidth);
    if (c < end) step(c, static_cast<int>(end - c));
}

// step(begin, end) for parts of the channels. In a part, a kernel may go through the pixels of a block one after the
// other: side by side they come from memory at two thirds of the rate, since processors expect runs of addresses.
template <class Step>
PDN_INLINE void for_parts(int64_t channels, const Step& step) {
    for (int64_t begin = 0; begin < channels; begin += kStage)
        step(begin, begin + kStage < channels ? begin + kStage : channels);
}

// Ask for `count` elements, in order, for kernels that cannot: a block ahead.
template <class T>
PDN_INLINE void prefetch(const T* p, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i);
}

// The pixels a, b, c, d of a block; of what lies beyond the image, null.
template <class T>
struct Block {
    T* pixel[kBands];

    Block(const Params& p, const View& view, int64_t image, int64_t i, int64_t j) {
        T* a = at<T>(view, image, 0, 2 * i) + 2 * j * view.w;
        const bool right = 2 * j + 1 < p.width, below = 2 * i + 1 < p.height;
        pixel[0] = a;
        pixel[1] = right ? a + view.w : nullptr;
        pixel[2] = below ? a + view.h : nullptr;
        pixel[3] = right && below ? a + view.h + view.w : nullptr;
    }
    // Pixels beyond are the last ones again.
    PDN_INLINE void repeat() {
        if (pixel[1] == nullptr) pixel[1] = pixel[0], pixel[3] = pixel[2];
        if (pixel[2] == nullptr) pixel[2] = pixel[0], pixel[3] = pixel[1];
    }
    PDN_INLINE bool whole() const { return pixel[3] != nullptr; }
};

// Sums of four kinds for every channel, in memory: `recent` is added to `all` before it gets long.
struct ChannelSums {
    float *all, *recent;
    int64_t size, length = 0;

    ChannelSums(float* memory, int64_t count) : all(memory), recent(memory + count), size(count) {
        for (int64_t i = 0; i < 2 * size; ++i) memory[i] = 0.f;
    }
    PDN_INLINE void add(int64_t place, vf v, int count) {
        store_some(recent + place, load_some(recent + place, count) + v, count, false);
    }
    void flush() {
        for (int64_t i = 0; i < size; ++i) all[i] += recent[i], recent[i] = 0.f;
        length = 0;
    }
    PDN_INLINE void count() {
        if (++length >= kFlush) flush();
    }
};

template <class T>
void down_pixels(const Params& p, int64_t number, T*) {
    const Item item = item_of(p, number, block_rows(p));
    const float* f = factors_of(p, item);
    alignas(64) float sum[kStage];
    for (int64_t i = item.first; i < item.last; ++i)
        for (int64_t j = 0; j < block_columns(p); ++j) {
            Block<const T> x(p, p.fine, item.image, i, j);
            x.repeat();
            T* y = at<T>(p.out, item.image, 0, i) + j * p.out.w;
            for_parts(p.channels, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
                for (int k = 0; k < kBands; ++k) {
                    const T* pixel = x.pixel[k];
                    const float* factor = f + k * p.channels;
                    for_channels(begin, end, [&](int64_t c, int count) __attribute__((always_inline)) {
                        vf v = load_some(pixel + c, count) * load_some(factor + c, count);
                        if (k > 0) v += load(sum + c - begin);
                        if (k < kBands - 1)
                            store(sum + c - begin, v);
                        else
                            store_some(y + c, v, count, p.past_caches);
                    });
                }
            });
        }
}

// Which pixel takes the gradient of the k-th: that of one beyond the image goes to the last one.
template <class T>
PDN_INLINE int owner(const Block<T>& block, int k) {
    if (k % 2 && block.pixel[1] == nullptr) k -= 1;
    if (k >= 2 && block.pixel[2] == nullptr) k -= 2;
    return k;
}

template <bool NeedsSums, bool NeedsOut, class T>
void down_pixels_backward(const Params& p, int64_t number, T*) {
    const Item item = item_of(p, number, block_rows(p));
    const float* f = factors_of(p, item);
    const float* offset = p.offset ? p.offset + item.image * p.channels : nullptr;
    ChannelSums sums(NeedsSums ? p.partials + number * partial_size(p) : nullptr, NeedsSums ? kBands * p.channels : 0);
    for (int64_t i = item.first; i < item.last; ++i)
        for (int64_t j = 0; j < block_columns(p); ++j) {
            const T* g = at<const T>(p.coarse, item.image, 0, i) + j * p.coarse.w;
            for_parts(p.channels, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
                if constexpr (NeedsSums) {
                    Block<const T> x(p, p.fine, item.image, i, j);
                    x.repeat();
                    for (int k = 0; k < kBands; ++k)
                        for_channels(begin, end, [&](int64_t c, int count) __attribute__((always_inline)) {
                            const vf term = load_some(g + c, count) * load_some(x.pixel[k] + c, count);
                            sums.add(k * p.channels + c, term, count);
                        });
                }
                if constexpr (NeedsOut) {
                    const Block<T> out(p, p.out, item.image, i, j);
                    const bool edge = !out.whole();
                    for (int k = 0; k < kBands; ++k) {
                        T* pixel = out.pixel[k];
                        if (edge && pixel == nullptr) continue;
                        for_channels(begin, end, [&](int64_t c, int count) __attribute__((always_inline)) {
                            vf factor = load_some(f + k * p.channels + c, count);
                            for (int other = k + 1; other < kBands && edge; ++other)
                                if (owner(out, other) == k) factor += load_some(f + other * p.channels + c, count);
                            const vf add = offset ? load_some(offset + c, count) : vf{};
                            store_some(pixel + c, load_some(g + c, count) * factor + add, count, p.past_caches);
                        });
                    }
                }
            });
            if constexpr (NeedsSums) sums.count();
        }
    if constexpr (NeedsSums) sums.flush();
}

template <class T>
void up_pixels(const Params& p, int64_t number, T*) {
    const Item item = item_of(p, number, block_rows(p));
    const float* f = factors_of(p, item);
    for (int64_t i = item.first; i < item.last; ++i)
        for (int64_t j = 0; j < block_columns(p); ++j) {
            const T* x = at<const T>(p.coarse, item.image, 0, i) + j * p.coarse.w;
            prefetch(x + p.coarse.w, kBands * p.channels);
            const Block<T> out(p, p.out, item.image, i, j);
            const bool whole = out.whole();
            for_channels(0, p.channels, [&](int64_t c, int count) __attribute__((always_inline)) {
                vf v[kBands];
                for (int k = 0; k < kBands; ++k)
                    v[k] = load_some(x + k * p.channels + c, count) * load_some(f + k * p.channels + c, count);
                butterfly(v);
                for (int k = 0; k < kBands; ++k)
                    if (whole || out.pixel[k]) store_some(out.pixel[k] + c, v[k], count, p.past_caches);
            });
        }
}

template <bool NeedsSums, bool NeedsOut, class T>
void up_pixels_backward(const Params& p, int64_t number, T*) {
    const Item item = item_of(p, number, block_rows(p));
    const float* f = factors_of(p, item);
    const float* offset = p.offset ? p.offset + item.image * kBands * p.channels : nullptr;
    ChannelSums sums(NeedsSums ? p.partials + number * partial_size(p) : nullptr, NeedsSums ? kBands * p.channels : 0);
    for (int64_t i = item.first; i < item.last; ++i)
        for (int64_t j = 0; j < block_columns(p); ++j) {
            const Block<const T> g(p, p.fine, item.image, i, j);
            const T* x = NeedsSums ? at<const T>(p.coarse, item.image, 0, i) + j * p.coarse.w : nullptr;
            T* out = NeedsOut ? at<T>(p.out, item.image, 0, i) + j * p.out.w : nullptr;
            for (int k = 0; k < kBands; ++k)
                if (g.pixel[k]) prefetch(g.pixel[k] + 2 * p.fine.w, p.channels);
            if constexpr (NeedsSums) prefetch(x + p.coarse.w, kBands * p.channels);
            const bool whole = g.whole();
            for_channels(0, p.channels, [&](int64_t c, int count) __attribute__((always_inline)) {
                vf v[kBands];
                for (int k = 0; k < kBands; ++k) v[k] = whole || g.pixel[k] ? load_some(g.pixel[k] + c, count) : vf{};
                butterfly(v);
                for (int k = 0; k < kBands; ++k) {
                    const int64_t place = k * p.channels + c;
                    if constexpr (NeedsSums) sums.add(place, load_some(x + place, count) * v[k], count);
                    if constexpr (NeedsOut) {
                        const vf add = offset ? load_some(offset + place, count) : vf{};
                        store_some(out + place, v[k] * load_some(f + place, count) + add, count, p.past_caches);
                    }
                }
            });
            if constexpr (NeedsSums) sums.count();
        }
    if constexpr (NeedsSums) sums.flush();
}

template <class T>
void pool_pixels(const PoolParams& p, int64_t number, T*) {
    const Item item = item_of(p, number, p.height);
    ChannelSums sums(p.partials + number * partial_size(p), p.channels);
    for (int64_t i = item.first; i < item.last; ++i)
        for (int64_t j = 0; j < p.width; ++j) {
            const T* x = at<const T>(p.input, item.image, 0, i) + j * p.input.w;
            for_channels(0, p.channels, [&](int64_t c, int count) __attribute__((always_inline)) {
                sums.add(c, load_some(x + c, count), count);
            });
            sums.count();
        }
    sums.flush();
}

}  // namespace
}  // namespace wavelet_gate
}  // namespace pdn
