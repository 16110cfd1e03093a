// Pixels of adjacent channels: vectors along the channels of the four pixels of a block. Included once per ISA level.
#pragma once

#include "blocks.inl"

namespace pdn {
namespace wavelet_gate {
namespace {

// step(first channel, count).
template <class Step>
PDN_INLINE void for_channels(int64_t channels, const Step& step) {
    int64_t c = 0;
    for (; c + kWidth <= channels; c += kWidth) step(c, kWidth);
    if (c < channels) step(c, static_cast<int>(channels - c));
}

// Ask for `count` elements, in order. Kernels read four pixels, or bands, side by side: from memory, processors follow
// that badly, while one run after the other, asked for a block ahead, comes at nearly the full rate.
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
    // Ask for the block to the right; what lies beyond the image does no harm.
    PDN_INLINE void prefetch_next(const Params& p, const View& view) const {
        for (int k = 0; k < kBands; ++k)
            if (pixel[k]) prefetch(pixel[k] + 2 * view.w, p.channels);
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
    for (int64_t i = item.first; i < item.last; ++i)
        for (int64_t j = 0; j < block_columns(p); ++j) {
            Block<const T> x(p, p.fine, item.image, i, j);
            x.prefetch_next(p, p.fine);
            x.repeat();
            T* y = at<T>(p.out, item.image, 0, i) + j * p.out.w;
            for_channels(p.channels, [&](int64_t c, int count) __attribute__((always_inline)) {
                vf v[kBands];
                for (int k = 0; k < kBands; ++k)
                    v[k] = load_some(x.pixel[k] + c, count) * load_some(f + k * p.channels + c, count);
                store_some(y + c, (v[0] + v[1]) + (v[2] + v[3]), count, p.past_caches);
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
            if constexpr (NeedsSums) {
                Block<const T> x(p, p.fine, item.image, i, j);
                x.prefetch_next(p, p.fine);
                x.repeat();
                for_channels(p.channels, [&](int64_t c, int count) __attribute__((always_inline)) {
                    const vf grad = load_some(g + c, count);
                    for (int k = 0; k < kBands; ++k)
                        sums.add(k * p.channels + c, grad * load_some(x.pixel[k] + c, count), count);
                });
                sums.count();
            }
            if constexpr (NeedsOut) {
                const Block<T> out(p, p.out, item.image, i, j);
                const bool edge = !out.whole();
                for_channels(p.channels, [&](int64_t c, int count) __attribute__((always_inline)) {
                    const vf grad = load_some(g + c, count), add = offset ? load_some(offset + c, count) : vf{};
                    vf factor[kBands];
                    for (int k = 0; k < kBands; ++k) factor[k] = load_some(f + k * p.channels + c, count);
                    for (int k = kBands - 1; k > 0 && edge; --k)
                        if (const int to = owner(out, k); to != k) factor[to] += factor[k], factor[k] = vf{};
                    for (int k = 0; k < kBands; ++k)
                        if (!edge || out.pixel[k])
                            store_some(out.pixel[k] + c, grad * factor[k] + add, count, p.past_caches);
                });
            }
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
            for_channels(p.channels, [&](int64_t c, int count) __attribute__((always_inline)) {
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
            g.prefetch_next(p, p.fine);
            if constexpr (NeedsSums) prefetch(x + p.coarse.w, kBands * p.channels);
            const bool whole = g.whole();
            for_channels(p.channels, [&](int64_t c, int count) __attribute__((always_inline)) {
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
            for_channels(p.channels, [&](int64_t c, int count) __attribute__((always_inline)) {
                sums.add(c, load_some(x + c, count), count);
            });
            sums.count();
        }
    sums.flush();
}

}  // namespace
}  // namespace wavelet_gate
}  // namespace pdn
