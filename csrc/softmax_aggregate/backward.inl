// The way back of a tile of pixels: each map is read once, for its product with the gradient and beside the gradient of
// its own. Products lie in scratch as [maps][kPlaneTile]. Included once per ISA level.
#pragma once

#include "tile.inl"

namespace pdn {
namespace softmax_aggregate {
namespace {

constexpr int64_t kChannels = 4;  // whose products are added up before they join a sum

// `Steps` channels from `c` on: their products join `dots`, their gradients are written.
template <class T, int Steps, bool Past>
PDN_INLINE void back_planes(const GradParams& p, int64_t batch, int64_t c, int64_t first, int64_t count,
                            const float* shares, float* dots) {
    const T* grad = at<T>(p.grad, p.grad_at, batch, 0, c, first);
    for (int64_t n = 0; n < p.maps; ++n) {
        const T* from = at<T>(p.features, p.features_at, batch, n, c, first);
        T* to = p.grad_features ? at<T>(p.grad_features, p.grad_features_at, batch, n, c, first) : nullptr;
        const float* share = shares + n * p.pixels;
        float* sums = dots + n * kPlaneTile;
        each_vector(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
            vf g[Steps], product[Steps];
            for (int s = 0; s < Steps; ++s) {
                g[s] = load_lanes(grad + s * p.grad_at.channel + i, lanes);
                product[s] = g[s] * load_lanes(from + s * p.features_at.channel + i, lanes);
            }
            if constexpr (Steps == kChannels)
                store(sums + i, load(sums + i) + ((product[0] + product[1]) + (product[2] + product[3])));
            else
                store(sums + i, load(sums + i) + product[0]);
            if (to == nullptr) return;
            const vf by = load_lanes(share + i, lanes);
            for (int s = 0; s < Steps; ++s) put_lanes<Past>(to + s * p.grad_features_at.channel + i, by * g[s], lanes);
        });
    }
}

template <class T, bool Past>
PDN_INLINE void dots_of_planes(const GradParams& p, int64_t batch, int64_t first, int64_t count, const float* shares,
                               float* dots) {
    for (int64_t n = 0; n < p.maps; ++n)
        for (int64_t i = 0; i < count; i += kWidth) store(dots + n * kPlaneTile + i, vf{});
    int64_t c = 0;
    for (; c + kChannels <= p.channels; c += kChannels)
        back_planes<T, kChannels, Past>(p, batch, c, first, count, shares, dots);
    for (; c < p.channels; ++c) back_planes<T, 1, Past>(p, batch, c, first, count, shares, dots);
}

template <class T, bool Past>
PDN_INLINE void dots_of_rows(const GradParams& p, int64_t batch, int64_t first, int64_t count, const float* shares,
                             float* dots) {
    for (int64_t i = 0; i < count; ++i) {
        const T* grad = at<T>(p.grad, p.grad_at, batch, 0, 0, first + i);
        for (int64_t n = 0; n < p.maps; ++n) {
            const T* from = at<T>(p.features, p.features_at, batch, n, 0, first + i);
            T* to = p.grad_features ? at<T>(p.grad_features, p.grad_features_at, batch, n, 0, first + i) : nullptr;
            const float share = shares[n * p.pixels + i];
            vf sum[2] = {};
            int64_t c = 0;
            for (; c + 2 * kWidth <= p.channels; c += 2 * kWidth)
                for (int v = 0; v < 2; ++v) {
                    const vf g = load(grad + c + v * kWidth);
                    sum[v] += g * load(from + c + v * kWidth);
                    if (to != nullptr) put_lanes<Past>(to + c + v * kWidth, share * g, All{});
                }
            each_vector(p.channels - c, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
                const vf g = load_lanes(grad + c + j, lanes);
                sum[0] += g * load_lanes(from + c + j, lanes);
                if (to != nullptr) put_lanes<Past>(to + c + j, share * g, lanes);
            });
            dots[n * kPlaneTile + i] = reduce_add(sum[0] + sum[1]);
        }
    }
}

// The softmax's own way back: shares * (dots - their mean under the shares).
PDN_INLINE void back_softmax(const GradParams& p, int64_t offset, int64_t count, float* dots) {
    const float* shares = p.shares + offset;
    each_vector(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        vf mean{};
        for (int64_t n = 0; n < p.maps; ++n) {
            vf dot = load(dots + n * kPlaneTile + i);
            if (p.grad_shares) dot += load_lanes(p.grad_shares + offset + n * p.pixels + i, lanes);
            store(dots + n * kPlaneTile + i, dot);
            mean += load_lanes(shares + n * p.pixels + i, lanes) * dot;
        }
        for (int64_t n = 0; n < p.maps; ++n) {
            const vf share = load_lanes(shares + n * p.pixels + i, lanes);
            store_lanes(p.grad_logits + offset + n * p.pixels + i, share * (load(dots + n * kPlaneTile + i) - mean),
                        lanes);
        }
    });
}

template <class T, bool Past>
PDN_INLINE void dots_of(const GradParams& p, int64_t batch, int64_t first, int64_t count, const float* shares,
                        float* dots) {
    if (has_planes(p.features_at))
        dots_of_planes<T, Past>(p, batch, first, count, shares, dots);
    else
        dots_of_rows<T, Past>(p, batch, first, count, shares, dots);
}

template <class T>
void backward_of(const GradParams& p, int64_t batch, int64_t first, int64_t count, float* dots) {
    const int64_t offset = batch * p.maps * p.pixels + first;
    if (p.past_caches && all_stream<T>(p.grad_features, p.grad_features_at)) {
        dots_of<T, sizeof(T) == sizeof(float)>(p, batch, first, count, p.shares + offset, dots);
        finish_past();
    } else {
        dots_of<T, false>(p, batch, first, count, p.shares + offset, dots);
    }
    back_softmax(p, offset, count, dots);
}

void backward(const GradParams& p, int64_t batch, int64_t first, int64_t count, float* scratch) {
    switch (p.dtype) {
        case DType::float32:
            return backward_of<float>(p, batch, first, count, scratch);
        case DType::bfloat16:
            return backward_of<bf16>(p, batch, first, count, scratch);
        case DType::float16:
            return backward_of<fp16>(p, batch, first, count, scratch);
    }
}

}  // namespace
}  // namespace softmax_aggregate
}  // namespace pdn
