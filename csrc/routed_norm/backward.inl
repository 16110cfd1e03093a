// The way back of a chunk of tokens: gradients of input and update token by token, those of the coefficients added up
// over the chunk. Included once per ISA level.
#pragma once

#include "row.inl"

namespace pdn {
namespace routed_norm {
namespace {

struct Sums {
    float plain, normed;  // of the normed values' gradients, and of their products with the normed values
};

// Normed values and their gradients to scratch; gradients of shift and scale join `partials`.
template <class T>
PDN_INLINE Sums first_pass(const Params& p, const Sample& s, const T* x, const T* u, const T* grad, float constant,
                           float rstd, float* normed, float* pushed, float* partials) {
    vf plain{}, product{};
    each_vector(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        vf v = load_lanes(x + c, lanes);
        if (s.mask != nullptr) {
            const vf mask = load_lanes(s.mask + c, lanes);
            v = select(mask == 0.f, vf{}, v * mask);
        }
        if (u != nullptr) v += load_lanes(s.gate + c, lanes) * load_lanes(u + c, lanes);
        const vf g = load_lanes(grad + c, lanes), hat = v * rstd + constant;
        store_lanes(partials + c, load_lanes(partials + c, lanes) + g, lanes);
        float* scales = partials + p.channels + c;
        store_lanes(scales, load_lanes(scales, lanes) + g * hat, lanes);
        const vf d = g * (1.f + load_lanes(s.scale + c, lanes));  // 0 in the lanes that do not count, as g is
        store(normed + c, hat);
        store(pushed + c, d);
        plain += d;
        product += d * hat;
    });
    return {reduce_add(plain), reduce_add(product)};
}

template <class T>
PDN_INLINE void second_pass(const GradParams& p, const Sample& s, const T* u, const T* carried, Sums mean, float rstd,
                            const float* normed, const float* pushed, int64_t row, float* partials) {
    const int64_t channels = p.forward.channels;
    T* to = static_cast<T*>(p.grad_input) + row * channels;
    T* to_update = u == nullptr ? nullptr : static_cast<T*>(p.grad_update) + row * channels;
    each_vector(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const vf d = rstd * (load(pushed + c) - mean.plain - load(normed + c) * mean.normed);
        const vf more = carried == nullptr ? vf{} : load_lanes(carried + c, lanes);
        vf own = d;
        if (s.mask != nullptr) own = d * load_lanes(s.mask + c, lanes);
        store_lanes(to + c, own + more, lanes);
        if (u == nullptr) return;
        const vf both = d + more;
        store_lanes(to_update + c, load_lanes(s.gate + c, lanes) * both, lanes);
        float* gates = partials + 2 * channels + c;
        store_lanes(gates, load_lanes(gates, lanes) + load_lanes(u + c, lanes) * both, lanes);
    });
}

template <class T>
void backward_of(const GradParams& p, int64_t batch, int64_t chunk, float* scratch) {
    const Params& f = p.forward;
    const Sample s = sample_of(f, batch);
    const float share = 1.f / static_cast<float>(f.total);
    float* partials = p.partials + (batch * chunks_of(f.tokens) + chunk) * 3 * f.channels;
    float *normed = scratch, *pushed = scratch + (f.channels + kWidth - 1) / kWidth * kWidth;
    for (int64_t i = 0; i < 3 * f.channels; ++i) partials[i] = 0.f;
    const int64_t last = (chunk + 1) * kChunk < f.tokens ? (chunk + 1) * kChunk : f.tokens;
    for (int64_t t = chunk * kChunk; t < last; ++t) {
        const int64_t row = batch * f.tokens + t;
        const T* x = token_at<T>(f.input, batch, t, f.input_batch, f.input_token);
        const T* u = f.update == nullptr ? nullptr : token_at<T>(f.update, batch, t, f.update_batch, f.update_token);
        const T* grad = static_cast<const T*>(p.grad) + row * f.channels;
        const T* carried = p.carried == nullptr ? nullptr : static_cast<const T*>(p.carried) + row * f.channels;
        const float constant = f.stats[2 * row], rstd = f.stats[2 * row + 1];
        Sums sums = first_pass<T>(f, s, x, u, grad, constant, rstd, normed, pushed, partials);
        if (p.constant != nullptr) {  // the constant is what one more channel, a 0, would become
            sums.plain += p.constant[row];
            sums.normed += p.constant[row] * constant;
        }
        second_pass<T>(p, s, u, carried, {sums.plain * share, sums.normed * share}, rstd, normed, pushed, row,
                       partials);
    }
}

void backward(const GradParams& p, int64_t batch, int64_t chunk, float* scratch) {
    switch (p.forward.dtype) {
        case DType::float32:
            return backward_of<float>(p, batch, chunk, scratch);
        case DType::bfloat16:
            return backward_of<bf16>(p, batch, chunk, scratch);
        case DType::float16:
            return backward_of<fp16>(p, batch, chunk, scratch);
    }
}

}  // namespace
}  // namespace routed_norm
}  // namespace pdn
