// Planes of adjacent columns: vectors along a row, its even and odd columns apart. Included once per ISA level.
#pragma once

#include "blocks.inl"

namespace pdn {
namespace wavelet_gate {
namespace {

struct Pair {
    vf even, odd;
};

// The even and the odd elements of 2 kWidth in a row.
PDN_INLINE Pair separate(vf first, vf second) {
    vi even, odd;
#pragma GCC unroll 16
    for (int l = 0; l < kWidth; ++l) even[l] = 2 * l, odd[l] = 2 * l + 1;
    return {__builtin_shuffle(first, second, even), __builtin_shuffle(first, second, odd)};
}

// The two halves of alternating elements.
PDN_INLINE void interleave(const Pair& v, vf& first, vf& second) {
    vi low, high;
#pragma GCC unroll 16
    for (int l = 0; l < kWidth; ++l) {
        low[l] = l / 2 + (l % 2 ? kWidth : 0);
        high[l] = low[l] + kWidth / 2;
    }
    first = __builtin_shuffle(v.even, v.odd, low);
    second = __builtin_shuffle(v.even, v.odd, high);
}

// `count` pairs of neighbours; lanes beyond are zero.
template <class T>
PDN_INLINE Pair load_pairs(const T* p, int count) {
    if (count == kWidth) return separate(load(p), load(p + kWidth));
    if (2 * count <= kWidth) return separate(load_some(p, 2 * count), vf{});
    return separate(load(p), load_partial(p + kWidth, 2 * count - kWidth));
}

template <class T>
PDN_INLINE void store_pairs(T* p, const Pair& v, int count, bool past_caches) {
    vf first, second;
    interleave(v, first, second);
    if (2 * count <= kWidth) {
        store_some(p, first, 2 * count, false);
        return;
    }
    store_some(p, first, kWidth, past_caches);
    store_some(p + kWidth, second, 2 * count - kWidth, past_caches);
}

// step(first block, count) over the blocks of a row that have both columns.
template <class Step>
PDN_INLINE void for_pairs(int64_t width, const Step& step) {
    const int64_t pairs = width / 2;
    int64_t j = 0;
    for (; j + kWidth <= pairs; j += kWidth) step(j, kWidth);
    if (j < pairs) step(j, static_cast<int>(pairs - j));
}

PDN_INLINE int64_t vectors_of(const Params& p) { return ceil_div(block_columns(p), kWidth) + 1; }

template <class T>
PDN_INLINE vf single(const T* p) {
    return load_partial(p, 1);
}

template <class T>
void down_planes(const Params& p, int64_t number, T*) {
    const Item item = item_of(p, number, block_rows(p));
    const float* f = factors_of(p, item);
    const vf a = splat(f[0]), b = splat(f[p.factor_channels]), c = splat(f[2 * p.factor_channels]),
             d = splat(f[3 * p.factor_channels]);
    for (int64_t i = item.first; i < item.last; ++i) {
        const T* upper = at<const T>(p.fine, item.image, item.plane, 2 * i);
        const T* lower = 2 * i + 1 < p.height ? upper + p.fine.h : upper;
        T* y = at<T>(p.out, item.image, item.plane, i);
        for_pairs(p.width, [&](int64_t j, int count) __attribute__((always_inline)) {
            const Pair u = load_pairs(upper + 2 * j, count), l = load_pairs(lower + 2 * j, count);
            store_some(y + j, (u.even * a + u.odd * b) + (l.even * c + l.odd * d), count, p.past_caches);
        });
        if (p.width % 2) {
            const int64_t j = p.width / 2;
            store_partial(y + j, single(upper + 2 * j) * (a + b) + single(lower + 2 * j) * (c + d), 1);
        }
    }
}

template <bool NeedsSums, bool NeedsOut, class T>
void down_planes_backward(const Params& p, int64_t number, T*) {
    const Item item = item_of(p, number, block_rows(p));
    const float* f = factors_of(p, item);
    const float offset = p.offset ? p.offset[item.image * p.channels + item.plane] : 0.f;
    Sums sums;
    for (int64_t i = item.first; i < item.last; ++i) {
        const bool whole = 2 * i + 1 < p.height;  // else the upper row stands for both
        const T* g = at<const T>(p.coarse, item.image, item.plane, i);
        const T *upper = nullptr, *lower = nullptr;
        T *out_upper = nullptr, *out_lower = nullptr;
        if constexpr (NeedsSums) {
            upper = at<const T>(p.fine, item.image, item.plane, 2 * i);
            lower = whole ? upper + p.fine.h : upper;
        }
        if constexpr (NeedsOut) {
            out_upper = at<T>(p.out, item.image, item.plane, 2 * i);
            out_lower = out_upper + p.out.h;
        }
        const float fa = f[0], fb = f[p.factor_channels], fc = f[2 * p.factor_channels], fd = f[3 * p.factor_channels];
        const vf a = splat(whole ? fa : fa + fc), b = splat(whole ? fb : fb + fd), c = splat(fc), d = splat(fd);
        for_pairs(p.width, [&](int64_t j, int count) __attribute__((always_inline)) {
            const vf grad = load_some(g + j, count);
            if constexpr (NeedsSums) {
                const Pair u = load_pairs(upper + 2 * j, count), l = load_pairs(lower + 2 * j, count);
                sums.add(0, grad * u.even), sums.add(1, grad * u.odd);
                sums.add(2, grad * l.even), sums.add(3, grad * l.odd);
            }
            if constexpr (NeedsOut) {
                store_pairs(out_upper + 2 * j, {grad * a + offset, grad * b + offset}, count, p.past_caches);
                if (whole) store_pairs(out_lower + 2 * j, {grad * c + offset, grad * d + offset}, count, p.past_caches);
            }
        });
        if (p.width % 2) {
            const int64_t j = p.width / 2;
            const vf grad = single(g + j);
            if constexpr (NeedsSums) {
                const vf u = single(upper + 2 * j), l = single(lower + 2 * j);
                sums.add(0, grad * u), sums.add(1, grad * u);
                sums.add(2, grad * l), sums.add(3, grad * l);
            }
            if constexpr (NeedsOut) {
                store_partial(out_upper + 2 * j, grad * (a + b) + offset, 1);
                if (whole) store_partial(out_lower + 2 * j, grad * (c + d) + offset, 1);
            }
        }
        if constexpr (NeedsSums) sums.count(vectors_of(p));
    }
    if constexpr (NeedsSums) sums.write(p.partials + number * partial_size(p));
}

template <class T>
void up_planes(const Params& p, int64_t number, T*) {
    const Item item = item_of(p, number, block_rows(p));
    const float* f = factors_of(p, item);
    for (int64_t i = item.first; i < item.last; ++i) {
        const bool whole = 2 * i + 1 < p.height;
        const T* x = at<const T>(p.coarse, item.image, item.plane, i);
        const int64_t band = p.channels * p.coarse.c;
        T *upper = at<T>(p.out, item.image, item.plane, 2 * i), *lower = upper + p.out.h;
        const auto pixels = [&](int64_t j, int count, vf(&v)[kBands]) __attribute__((always_inline)) {
            for (int k = 0; k < kBands; ++k) v[k] = load_some(x + k * band + j, count) * f[k * p.factor_channels];
            butterfly(v);
        };
        for_pairs(p.width, [&](int64_t j, int count) __attribute__((always_inline)) {
            vf v[kBands];
            pixels(j, count, v);
            store_pairs(upper + 2 * j, {v[0], v[1]}, count, p.past_caches);
            if (whole) store_pairs(lower + 2 * j, {v[2], v[3]}, count, p.past_caches);
        });
        if (p.width % 2) {
            const int64_t j = p.width / 2;
            vf v[kBands];
            pixels(j, 1, v);
            store_partial(upper + 2 * j, v[0], 1);
            if (whole) store_partial(lower + 2 * j, v[2], 1);
        }
    }
}

template <bool NeedsSums, bool NeedsOut, class T>
void up_planes_backward(const Params& p, int64_t number, T*) {
    const Item item = item_of(p, number, block_rows(p));
    const float* f = factors_of(p, item);
    float offset[kBands] = {};
    for (int k = 0; k < kBands && p.offset; ++k)
        offset[k] = p.offset[(item.image * kBands + k) * p.channels + item.plane];
    const int64_t band = p.channels * p.coarse.c, out_band = p.channels * p.out.c;
    Sums sums;
    for (int64_t i = item.first; i < item.last; ++i) {
        const bool whole = 2 * i + 1 < p.height;  // else there is no lower row
        const T *upper = at<const T>(p.fine, item.image, item.plane, 2 * i), *lower = upper + p.fine.h;
        const T* x = NeedsSums ? at<const T>(p.coarse, item.image, item.plane, i) : nullptr;
        T* out = NeedsOut ? at<T>(p.out, item.image, item.plane, i) : nullptr;
        const auto finish = [&](int64_t j, int count, vf(&v)[kBands]) __attribute__((always_inline)) {
            butterfly(v);
            for (int k = 0; k < kBands; ++k) {
                if constexpr (NeedsSums) sums.add(k, load_some(x + k * band + j, count) * v[k]);
                if constexpr (NeedsOut)
                    store_some(out + k * out_band + j, v[k] * f[k * p.factor_channels] + offset[k], count,
                               p.past_caches);
            }
        };
        for_pairs(p.width, [&](int64_t j, int count) __attribute__((always_inline)) {
            const Pair u = load_pairs(upper + 2 * j, count);
            const Pair l = whole ? load_pairs(lower + 2 * j, count) : Pair{};
            vf v[kBands] = {u.even, u.odd, l.even, l.odd};
            finish(j, count, v);
        });
        if (p.width % 2) {
            const int64_t j = p.width / 2;
            vf v[kBands] = {single(upper + 2 * j), vf{}, whole ? single(lower + 2 * j) : vf{}, vf{}};
            finish(j, 1, v);
        }
        if constexpr (NeedsSums) sums.count(vectors_of(p));
    }
    if constexpr (NeedsSums) sums.write(p.partials + number * partial_size(p));
}

template <class T>
void pool_planes(const PoolParams& p, int64_t number, T*) {
    const Item item = item_of(p, number, p.height);
    const bool joined = p.input.h == p.width;  // rows that follow each other are one
    const int64_t length = joined ? (item.last - item.first) * p.width : p.width;
    vf all{};
    for (int64_t i = item.first; i < item.last; i += joined ? item.last : 1) {
        const T* x = at<const T>(p.input, item.image, item.plane, i);
        for (int64_t begin = 0; begin < length; begin += 4 * kFlush * kWidth) {
            const int64_t end = begin + 4 * kFlush * kWidth < length ? begin + 4 * kFlush * kWidth : length;
            vf recent[4] = {};
            int64_t j = begin;
            for (; j + 4 * kWidth <= end; j += 4 * kWidth)
                for (int v = 0; v < 4; ++v) recent[v] += load(x + j + v * kWidth);
            for (; j < end; j += kWidth)
                recent[0] += load_some(x + j, static_cast<int>(end - j < kWidth ? end - j : kWidth));
            all += (recent[0] + recent[1]) + (recent[2] + recent[3]);
        }
    }
    p.partials[number * partial_size(p)] = reduce_add(all);
}

}  // namespace
}  // namespace wavelet_gate
}  // namespace pdn
