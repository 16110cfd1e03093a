// A tile of pixels: logits by a 1x1 convolution, their softmax over the maps, and the weighted sum of the maps, each of
// which is read once. Logits and shares lie in scratch as [maps][kPlaneTile]. Included once per ISA level.
#pragma once

#include "tile.inl"

namespace pdn {
namespace softmax_aggregate {
namespace {

constexpr int64_t kTogether = 4;  // channels of hidden whose products are added up before they join a sum

// Logits of planes: `Steps` channels of hidden at a time, added to all maps.
template <class T, int Steps>
PDN_INLINE void add_planes(const Params& p, const T* hidden, int64_t k, int64_t count, float* logits) {
    const int64_t step = p.hidden_at.channel;
    each_vector(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        vf h[Steps];
        for (int s = 0; s < Steps; ++s) h[s] = load_lanes(hidden + (k + s) * step + i, lanes);
        for (int64_t n = 0; n < p.maps; ++n) {
            const float* w = p.weight + n * p.depth + k;
            float* sum = logits + n * kPlaneTile + i;
            if constexpr (Steps == kTogether)
                store(sum, load(sum) + ((w[0] * h[0] + w[1] * h[1]) + (w[2] * h[2] + w[3] * h[3])));
            else
                store(sum, load(sum) + w[0] * h[0]);
        }
    });
}

template <class T>
PDN_INLINE void logits_of_planes(const Params& p, int64_t batch, int64_t first, int64_t count, float* logits) {
    const T* hidden = at<T>(p.hidden, p.hidden_at, batch, 0, 0, first);
    for (int64_t n = 0; n < p.maps; ++n)
        for (int64_t i = 0; i < count; i += kWidth) store(logits + n * kPlaneTile + i, vf{});
    int64_t k = 0;
    for (; k + kTogether <= p.depth; k += kTogether) add_planes<T, kTogether>(p, hidden, k, count, logits);
    for (; k < p.depth; ++k) add_planes<T, 1>(p, hidden, k, count, logits);
}

// Logits of rows: products along the channels.
template <class T>
PDN_INLINE void logits_of_rows(const Params& p, int64_t batch, int64_t first, int64_t count, float* logits) {
    for (int64_t i = 0; i < count; ++i) {
        const T* hidden = at<T>(p.hidden, p.hidden_at, batch, 0, 0, first + i);
        for (int64_t n = 0; n < p.maps; ++n) {
            const float* w = p.weight + n * p.depth;
            vf sum[2] = {};
            int64_t k = 0;
            for (; k + 2 * kWidth <= p.depth; k += 2 * kWidth)
                for (int v = 0; v < 2; ++v) sum[v] += load(w + k + v * kWidth) * load(hidden + k + v * kWidth);
            for (; k < p.depth; k += kWidth) {
                const int lanes = p.depth - k < kWidth ? static_cast<int>(p.depth - k) : kWidth;
                sum[0] += load_partial(w + k, lanes) * load_partial(hidden + k, lanes);
            }
            logits[n * kPlaneTile + i] = reduce_add(sum[0] + sum[1]);
        }
    }
}

// Logits that are ready.
template <class T>
PDN_INLINE void copy_logits(const Params& p, int64_t batch, int64_t first, int64_t count, float* logits) {
    for (int64_t n = 0; n < p.maps; ++n) {
        const T* from = at<T>(p.hidden, p.hidden_at, batch, 0, n, first);
        float* to = logits + n * kPlaneTile;
        if (p.hidden_at.pixel == 1) {
            each_vector(count, [&](int64_t i, auto lanes)
                                   __attribute__((always_inline)) { store(to + i, load_lanes(from + i, lanes)); });
        } else {
            for (int64_t i = 0; i < count; ++i) to[i] = load_partial(from + i * p.hidden_at.pixel, 1)[0];
        }
    }
}

// Over the maps, in place; also written to `shares`. NaN stays, and is what a pixel with nothing above -inf gives.
PDN_INLINE void softmax(int64_t maps, int64_t pixels, int64_t count, float* logits, float* shares) {
    each_vector(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        vf top = load(logits + i);
        for (int64_t n = 1; n < maps; ++n) top = vmax(top, load(logits + n * kPlaneTile + i));
        vf sum{};
        for (int64_t n = 0; n < maps; ++n) {
            const vf e = vexp(load(logits + n * kPlaneTile + i) - top);
            store(logits + n * kPlaneTile + i, e);
            sum += e;
        }
        for (int64_t n = 0; n < maps; ++n) {
            const vf share = load(logits + n * kPlaneTile + i) / sum;
            store(logits + n * kPlaneTile + i, share);
            store_lanes(shares + n * pixels + i, share, lanes);
        }
    });
}

// `Maps` is their number where it is small, else 0.
template <class T, int Maps, bool Past>
PDN_INLINE void sum_planes(const Params& p, int64_t batch, int64_t first, int64_t count, const float* shares) {
    const int64_t maps = Maps ? Maps : p.maps;
    for (int64_t c = 0; c < p.channels; ++c) {
        const T* from = at<T>(p.features, p.features_at, batch, 0, c, first);
        T* to = at<T>(p.out, p.out_at, batch, 0, c, first);
        each_vector(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
            vf sum = load(shares + i) * load_lanes(from + i, lanes);
            for (int64_t n = 1; n < maps; ++n)
                sum += load(shares + n * kPlaneTile + i) * load_lanes(from + n * p.features_at.map + i, lanes);
            put_lanes<Past>(to + i, sum, lanes);
        });
    }
}

template <class T, int Maps, bool Past>
PDN_INLINE void sum_rows(const Params& p, int64_t batch, int64_t first, int64_t count, const float* shares) {
    const int64_t maps = Maps ? Maps : p.maps;
    for (int64_t i = 0; i < count; ++i) {
        const T* from = at<T>(p.features, p.features_at, batch, 0, 0, first + i);
        T* to = at<T>(p.out, p.out_at, batch, 0, 0, first + i);
        each_vector(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            vf sum = shares[i] * load_lanes(from + c, lanes);
            for (int64_t n = 1; n < maps; ++n)
                sum += shares[n * kPlaneTile + i] * load_lanes(from + n * p.features_at.map + c, lanes);
            put_lanes<Past>(to + c, sum, lanes);
        });
    }
}

template <class T, int Maps, bool Past>
PDN_INLINE void sum_maps(const Params& p, int64_t batch, int64_t first, int64_t count, const float* shares) {
    if (has_planes(p.features_at))
        sum_planes<T, Maps, Past>(p, batch, first, count, shares);
    else
        sum_rows<T, Maps, Past>(p, batch, first, count, shares);
}

template <class T, bool Past>
PDN_INLINE void sum_all(const Params& p, int64_t batch, int64_t first, int64_t count, const float* shares) {
    switch (p.maps) {
        case 2:
            return sum_maps<T, 2, Past>(p, batch, first, count, shares);
        case 3:
            return sum_maps<T, 3, Past>(p, batch, first, count, shares);
        case 4:
            return sum_maps<T, 4, Past>(p, batch, first, count, shares);
        default:
            return sum_maps<T, 0, Past>(p, batch, first, count, shares);
    }
}

template <class T>
void forward_of(const Params& p, int64_t batch, int64_t first, int64_t count, float* scratch) {
    if (p.weight == nullptr)
        copy_logits<T>(p, batch, first, count, scratch);
    else if (has_planes(p.hidden_at))
        logits_of_planes<T>(p, batch, first, count, scratch);
    else
        logits_of_rows<T>(p, batch, first, count, scratch);
    softmax(p.maps, p.pixels, count, scratch, p.shares + batch * p.maps * p.pixels + first);
    if (p.past_caches && all_stream<T>(p.out, p.out_at)) {
        sum_all<T, sizeof(T) == sizeof(float)>(p, batch, first, count, scratch);
        finish_past();
    } else {
        sum_all<T, false>(p, batch, first, count, scratch);
    }
}

void forward(const Params& p, int64_t batch, int64_t first, int64_t count, float* scratch) {
    switch (p.dtype) {
        case DType::float32:
            return forward_of<float>(p, batch, first, count, scratch);
        case DType::bfloat16:
            return forward_of<bf16>(p, batch, first, count, scratch);
        case DType::float16:
            return forward_of<fp16>(p, batch, first, count, scratch);
    }
}

}  // namespace
}  // namespace softmax_aggregate
}  // namespace pdn
