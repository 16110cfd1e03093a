// Tokens: the masked sum goes to scratch, which stays in the innermost cache; its moments; the result. Memory is read
// and written once. Included once per ISA level.
#pragma once

#include "row.inl"

namespace pdn {
namespace routed_norm {
namespace {

// r to scratch, carried to memory; returns the sum of r.
template <class T, bool Masked, bool Updated>
PDN_INLINE float sum_row(const Params& p, const Sample& s, const T* x, [[maybe_unused]] const T* u,
                         [[maybe_unused]] T* carried, float* r) {
    vf sum{};
    each_vector(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const vf own = load_lanes(x + c, lanes);
        vf v = own;
        if constexpr (Masked) {
            // not a product: what the mask leaves out may be anything
            const vf mask = load_lanes(s.mask + c, lanes);
            v = select(mask == 0.f, vf{}, own * mask);
        }
        if constexpr (Updated) {
            const vf more = load_lanes(s.gate + c, lanes) * load_lanes(u + c, lanes);
            store_lanes(carried + c, own + more, lanes);
            v += more;
        }
        store(r + c, v);  // scratch is a whole number of vectors; lanes that do not count are 0
        sum += v;
    });
    return reduce_add(sum);
}

// Moments of `total` channels, the last of which are 0.
struct Moments {
    float mean, rstd, constant;  // constant = -mean * rstd: what the norm makes of 0
};

PDN_INLINE Moments moments_of(const Params& p, const float* r, float sum) {
    const auto total = static_cast<float>(p.total), rest = static_cast<float>(p.total - p.channels);
    const float share = 1.f / total, rough = sum * share;
    vf apart[2] = {}, square[2] = {};
    const auto add = [&](int64_t c, int i, auto lanes) __attribute__((always_inline)) {
        const vf d = counted(load(r + c) - rough, lanes);
        apart[i] += d;
        square[i] += d * d;
    };
    int64_t c = 0;
    for (; c + 2 * kWidth <= p.channels; c += 2 * kWidth) add(c, 0, All{}), add(c + kWidth, 1, All{});
    each_vector(p.channels - c, [&](int64_t i, auto lanes) __attribute__((always_inline)) { add(c + i, 0, lanes); });
    // the digits that the mean lost in rounding
    const float off = (reduce_add(apart[0] + apart[1]) - rest * rough) * share;
    const float variance = (reduce_add(square[0] + square[1]) + rest * rough * rough) * share - off * off;
    Moments m;
    m.mean = rough + off;
    m.rstd = 1.f / __builtin_sqrtf((variance < 0.f ? 0.f : variance) + static_cast<float>(p.eps));
    m.constant = -m.mean * m.rstd;
    return m;
}

template <class T, bool Masked, bool Updated>
void forward_of(const Params& p, int64_t begin, int64_t end, float* scratch) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / p.tokens, t = row % p.tokens;
        const Sample s = sample_of(p, b);
        const T* x = token_at<T>(p.input, b, t, p.input_batch, p.input_token);
        const T* u = Updated ? token_at<T>(p.update, b, t, p.update_batch, p.update_token) : nullptr;
        T* carried = Updated ? static_cast<T*>(p.carried) + row * p.channels : nullptr;
        const Moments m = moments_of(p, scratch, sum_row<T, Masked, Updated>(p, s, x, u, carried, scratch));
        T* y = static_cast<T*>(p.output) + row * p.channels;
        each_vector(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            const vf normed = (load(scratch + c) - m.mean) * m.rstd;
            store_lanes(y + c, normed * (1.f + load_lanes(s.scale + c, lanes)) + load_lanes(s.shift + c, lanes), lanes);
        });
        p.stats[2 * row] = m.constant, p.stats[2 * row + 1] = m.rstd;
    }
}

template <class T>
void forward_typed(const Params& p, int64_t begin, int64_t end, float* scratch) {
    if (p.mask.data != nullptr && p.update != nullptr) return forward_of<T, true, true>(p, begin, end, scratch);
    if (p.mask.data != nullptr) return forward_of<T, true, false>(p, begin, end, scratch);
    if (p.update != nullptr) return forward_of<T, false, true>(p, begin, end, scratch);
    forward_of<T, false, false>(p, begin, end, scratch);
}

void forward(const Params& p, int64_t begin, int64_t end, float* scratch) {
    switch (p.dtype) {
        case DType::float32:
            return forward_typed<float>(p, begin, end, scratch);
        case DType::bfloat16:
            return forward_typed<bf16>(p, begin, end, scratch);
        case DType::float16:
            return forward_typed<fp16>(p, begin, end, scratch);
    }
}

}  // namespace
}  // namespace routed_norm
}  // namespace pdn
