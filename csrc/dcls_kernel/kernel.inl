// DCLS kernels and their gradients. A vector holds the same thing of as many pairs of channels as it has lanes, so that
// no lane is idle whatever the kernel's size. Factors are made for a few components at a time and stay in the innermost
// cache: a kernel costs one exponential per component, axis and tap of that axis, and one product per component and
// tap. Included once per ISA level.
#pragma once

#include "../core/attention/softmax.inl"
#include "params.h"
#include "product.inl"

namespace pdn {
namespace dcls_kernel {
namespace {

using attention::exp2_negative;
using attention::kLog2E;

constexpr int64_t kChunk = 8;        // components whose factors are held at once
constexpr float kLeastMass = 1e-7f;  // as in pydenoise/reference/dcls_kernel.py
constexpr int64_t kVector = kWidth;  // floats of a vector, in strides

PDN_INLINE vf magnitude(vf v) { return (vf)((vi)v & 0x7fffffff); }
PDN_INLINE vf sign(vf v) { return select(v > 0.f, splat(1.f), select(v < 0.f, splat(-1.f), vf{})); }

// Where things lie in scratch memory.
struct Scratch {
    float *weight, *position[3], *width[3];  // [components]; gradients take the place of values that are done with
    float* factor[3];                        // [kChunk, size]
    float* rows;                             // [kChunk, outer taps]: products of the factors of the outer axes
    float *rows_grad, *columns_grad;         // likewise, and [kChunk, size of axis 2]
    float* outer_grad;                       // [larger size of the outer axes]
    float* taps;                             // the kernel, or its gradient
    int64_t outer, inner, end;

    Scratch(const Params& p, float* memory) {
        const int64_t components = padded(p.components);
        outer = p.axis[0].size * p.axis[1].size, inner = p.axis[2].size, end = 0;
        const auto take = [&](int64_t vectors) {
            float* here = memory ? memory + end : nullptr;
            end += vectors * kVector;
            return here;
        };
        weight = take(components);
        for (int a = 0; a < 3; ++a) {
            position[a] = take(p.axis[a].position ? components : 0);
            width[a] = take(p.axis[a].width ? components : 0);
            factor[a] = take(kChunk * p.axis[a].size);
        }
        rows = p.axis[0].position ? take(kChunk * outer) : factor[1];
        rows_grad = take(kChunk * outer), columns_grad = take(kChunk * inner);
        outer_grad = take(p.axis[0].size > p.axis[1].size ? p.axis[0].size : p.axis[1].size);
        taps = take(padded(outer * inner));
    }
};

int64_t scratch_bytes(const Params& p) { return Scratch(p, nullptr).end * static_cast<int64_t>(sizeof(float)); }

void read_parameters(const Params& p, int64_t first, const Scratch& s) {
    to_lanes(p.weight, p.pairs, p.components, first, s.weight);
    for (int a = 0; a < 3; ++a) {
        if (p.axis[a].position) to_lanes(p.axis[a].position, p.pairs, p.components, first, s.position[a]);
        if (p.axis[a].width) to_lanes(p.axis[a].width, p.pairs, p.components, first, s.width[a]);
    }
}

// |width| + spread of component c.
PDN_INLINE vf width_of(const Params& p, const Scratch& s, int a, int64_t c) {
    return p.axis[a].width ? magnitude(load(s.width[a] + c * kVector)) + p.spread : splat(p.spread);
}

// The factors of component c along axis a to `out`; returns their sum.
template <bool Gauss>
PDN_INLINE vf make_factors(const Params& p, const Scratch& s, int a, int64_t c, float* out) {
    const Axis& axis = p.axis[a];
    if (axis.position == nullptr) {
        store(out, splat(1.f));
        return splat(1.f);
    }
    const vf position = load(s.position[a] + c * kVector), width = width_of(p, s, a, c);
    [[maybe_unused]] const vf inverse = 1.f / width;
    vf sum{};
    for (int64_t i = 0; i < axis.size; ++i) {
        const vf distance = static_cast<float>(i - axis.centre) - position;
        vf u;
        if constexpr (Gauss) {
            const vf t = distance * inverse;
            u = exp2_negative(t * t * (-0.5f * kLog2E));
        } else {
            u = width - magnitude(distance);
            u = select(u < 0.f, vf{}, u);  // a NaN stays
        }
        store(out + i * kVector, u);
        sum += u;
    }
    return sum;
}

// Sums of the factors of component c along each axis.
struct Masses {
    vf axis[3];
    PDN_INLINE vf divisor(const Params& p) const {
        return p.normalized ? axis[0] * axis[1] * axis[2] + kLeastMass : splat(1.f);
    }
};

// All factors of component c to place i of the chunk.
template <bool Gauss>
PDN_INLINE Masses make_component(const Params& p, const Scratch& s, int64_t c, int64_t i) {
    Masses masses;
    for (int a = 0; a < 3; ++a)
        masses.axis[a] = make_factors<Gauss>(p, s, a, c, s.factor[a] + i * p.axis[a].size * kVector);
    if (p.axis[0].position) {
        const float* u = s.factor[0] + i * p.axis[0].size * kVector;
        const float* v = s.factor[1] + i * p.axis[1].size * kVector;
        float* out = s.rows + i * s.outer * kVector;
        for (int64_t z = 0; z < p.axis[0].size; ++z)
            for (int64_t y = 0; y < p.axis[1].size; ++y, out += kVector)
                store(out, load(u + z * kVector) * load(v + y * kVector));
    }
    return masses;
}

template <bool Gauss>
void forward_item(const Params& p, int64_t item, float* scratch) {
    const Scratch s(p, scratch);
    read_parameters(p, item * kWidth, s);
    for (int64_t begin = 0; begin < p.components; begin += kChunk) {
        const int64_t count = p.components - begin < kChunk ? p.components - begin : kChunk;
        for (int64_t i = 0; i < count; ++i) {
            const Masses masses = make_component<Gauss>(p, s, begin + i, i);
            const vf scale = load(s.weight + (begin + i) * kVector) / masses.divisor(p);
            float* columns = s.factor[2] + i * s.inner * kVector;
            for (int64_t x = 0; x < s.inner; ++x) store(columns + x * kVector, load(columns + x * kVector) * scale);
        }
        const Operand rows = {s.rows, kVector, s.outer * kVector};
        const Operand columns = {s.factor[2], kVector, s.inner * kVector};
        begin == 0 ? product<false>(rows, s.outer, columns, s.inner, count, s.taps)
                   : product<true>(rows, s.outer, columns, s.inner, count, s.taps);
    }
    from_lanes(s.taps, p.pairs, s.outer * s.inner, item * kWidth, p.kernel);
}

// Gradients of position and width along axis a, over those of the factors: scale * grad[i] + shift.
template <bool Gauss>
PDN_INLINE void axis_gradient(const Params& p, const Scratch& s, int a, int64_t c, const float* factor,
                              const float* grad, vf scale, vf shift) {
    const Axis& axis = p.axis[a];
    float *at = s.position[a] + c * kVector, *width_at = s.width[a] + c * kVector;
    const vf position = load(at), width = width_of(p, s, a, c);
    vf first{}, second{};
    for (int64_t i = 0; i < axis.size; ++i) {
        const vf distance = static_cast<float>(i - axis.centre) - position, u = load(factor + i * kVector);
        vf du = scale * load(grad + i * kVector) + shift;
        if constexpr (Gauss) {
            du *= u * distance;
            first += du;
            second += du * distance;
        } else {
            du = select(u > 0.f, du, vf{});
            first += du * sign(distance);
            second += du;
        }
    }
    if constexpr (Gauss) {
        const vf inverse = 1.f / width;
        first *= inverse * inverse;
        second *= inverse * inverse * inverse;
    }
    store(at, first);
    if (axis.width) store(width_at, second * sign(load(width_at)));
}

// The gradient of the factors of the outer axis Along: rows_grad times the factors of the other one.
template <int Along>
PDN_INLINE const float* outer_gradient(const Params& p, const Scratch& s, int64_t i) {
    const float* grad = s.rows_grad + i * s.outer * kVector;
    if (p.axis[0].position == nullptr) return grad;
    const int64_t height = p.axis[1].size;
    const float* other = s.factor[1 - Along] + i * p.axis[1 - Along].size * kVector;
    for (int64_t j = 0; j < p.axis[Along].size; ++j) {
        vf sum{};
        for (int64_t k = 0; k < p.axis[1 - Along].size; ++k) {
            const int64_t row = Along == 0 ? j * height + k : k * height + j;
            sum += load(grad + row * kVector) * load(other + k * kVector);
        }
        store(s.outer_grad + j * kVector, sum);
    }
    return s.outer_grad;
}

// Gradients of the parameters of component c, which is at place i of the chunk.
template <bool Gauss>
PDN_INLINE void finish_component(const Params& p, const Scratch& s, int64_t c, int64_t i, const Masses& masses) {
    const float* columns = s.factor[2] + i * s.inner * kVector;
    const float* columns_grad = s.columns_grad + i * s.inner * kVector;
    vf product{};  // of the kernel's gradient and the component's shape, over all taps
    for (int64_t x = 0; x < s.inner; ++x) product += load(columns_grad + x * kVector) * load(columns + x * kVector);
    const vf inverse = 1.f / masses.divisor(p);
    float* weight = s.weight + c * kVector;
    const vf scale = load(weight) * inverse, mass_grad = p.normalized ? -scale * (product * inverse) : vf{};
    store(weight, product * inverse);
    axis_gradient<Gauss>(p, s, 2, c, columns, columns_grad, scale, mass_grad * (masses.axis[0] * masses.axis[1]));
    if (p.axis[1].position) {
        const float* grad = outer_gradient<1>(p, s, i);
        axis_gradient<Gauss>(p, s, 1, c, s.factor[1] + i * p.axis[1].size * kVector, grad, scale,
                             mass_grad * (masses.axis[0] * masses.axis[2]));
    }
    if (p.axis[0].position) {
        const float* grad = outer_gradient<0>(p, s, i);
        axis_gradient<Gauss>(p, s, 0, c, s.factor[0] + i * p.axis[0].size * kVector, grad, scale,
                             mass_grad * (masses.axis[1] * masses.axis[2]));
    }
}

template <bool Gauss>
void backward_item(const Params& p, int64_t item, float* scratch) {
    const Scratch s(p, scratch);
    const int64_t first = item * kWidth;
    read_parameters(p, first, s);
    to_lanes(p.grad, p.pairs, s.outer * s.inner, first, s.taps);
    for (int64_t begin = 0; begin < p.components; begin += kChunk) {
        const int64_t count = p.components - begin < kChunk ? p.components - begin : kChunk;
        Masses masses[kChunk];
        for (int64_t i = 0; i < count; ++i) masses[i] = make_component<Gauss>(p, s, begin + i, i);
        const Operand columns = {s.factor[2], s.inner * kVector, kVector}, rows = {s.rows, s.outer * kVector, kVector};
        product<false>(columns, count, {s.taps, s.inner * kVector, kVector}, s.outer, s.inner, s.rows_grad);
        product<false>(rows, count, {s.taps, kVector, s.inner * kVector}, s.inner, s.outer, s.columns_grad);
        for (int64_t i = 0; i < count; ++i) finish_component<Gauss>(p, s, begin + i, i, masses[i]);
    }
    from_lanes(s.weight, p.pairs, p.components, first, p.weight_grad);
    for (int a = 0; a < 3; ++a) {
        if (p.axis[a].position) from_lanes(s.position[a], p.pairs, p.components, first, p.axis[a].position_grad);
        if (p.axis[a].width) from_lanes(s.width[a], p.pairs, p.components, first, p.axis[a].width_grad);
    }
}

void forward(const Params& p, int64_t item, float* scratch) {
    p.gauss ? forward_item<true>(p, item, scratch) : forward_item<false>(p, item, scratch);
}

void backward(const Params& p, int64_t item, float* scratch) {
    p.gauss ? backward_item<true>(p, item, scratch) : backward_item<false>(p, item, scratch);
}

}  // namespace
}  // namespace dcls_kernel
}  // namespace pdn
