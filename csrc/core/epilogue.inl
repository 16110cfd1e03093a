// Epilogue of one output vector: bias is in `x` already; activation, then residual. Included once per ISA level.
#pragma once

#include "activation.h"
#include "vec.h"

namespace pdn {
namespace {

PDN_INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
PDN_INLINE vf vmin(vf a, vf b) { return select(a < b, a, b); }
PDN_INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }
PDN_INLINE vf relu(vf x) { return select(x < 0.f, vf{}, x); }  // keeps NaN, as torch does

// exp(x), about one rounding of error: x = n ln 2 + r with |r| <= ln 2 / 2, a degree-6 polynomial in r, scaled by 2^n
// in two halves so that subnormal results and overflow to infinity come out right. NaN stays NaN.
PDN_INLINE vf vexp(vf x) {
    const vf clamped = select(x < -104.f, splat(-104.f), select(x > 89.f, splat(89.f), x));
    const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf shifted = clamped * 1.44269504088896341f + magic;
    const vf n = shifted - magic;
    vf r = clamped - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf poly = splat(1.3748823063e-3f);
    poly = poly * r + 8.3696283727e-3f;
    poly = poly * r + 4.1669646259e-2f;
    poly = poly * r + 1.6666512483e-1f;
    poly = poly * r + 4.9999987907e-1f;
    poly = poly * r * r + r + 1.f;
    const vi k = (vi)shifted - (vi)magic;
    const vi half = k >> 1;
    const vf low = (vf)((half + 127) << 23), high = (vf)((k - half + 127) << 23);
    const vf result = poly * low * high;
    return select(x != x, x, result);
}

PDN_INLINE vf silu(vf x) { return x / (1.f + vexp(-x)); }

PDN_INLINE vf vtanh(vf x) {
    const vf magnitude = (vf)((vi)x & 0x7fffffff);
    const vf e = vexp(-2.f * magnitude);
    const vf large = (1.f - e) / (1.f + e);
    const vf s = x * x;  // small arguments: the quotient above would cancel
    vf poly = splat(-5.6811220646e-3f);
    poly = poly * s + 2.0620618037e-2f;
    poly = poly * s - 5.3735176597e-2f;
    poly = poly * s + 1.3331405936e-1f;
    poly = poly * s - 3.3333281603e-1f;
    const vf small = x + x * s * poly;
    const vf signed_large = (vf)((vi)large | ((vi)x & (vi)splat(-0.f)));
    return select(magnitude < 0.625f, small, signed_large);
}

PDN_INLINE vf gelu_tanh(vf x) {
    const vf inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.f + vtanh(inner));
}

// erf(x): x * poly(x^2) up to 1, then 1 - exp(-x^2) * poly(1 / (1 + x / 2)); both polynomials fitted to 1e-9 relative.
PDN_INLINE vf verf(vf x) {
    const vf magnitude = (vf)((vi)x & 0x7fffffff);
    const vf s = x * x;
    vf small = splat(7.898210159e-05f);
    small = small * s - 8.024354112e-04f;
    small = small * s + 5.190053576e-03f;
    small = small * s - 2.685480854e-02f;
    small = small * s + 1.128361243e-01f;
    small = small * s - 3.761262884e-01f;
    small = (small * s + 1.128379167e+00f) * x;
    const vf a = vmin(magnitude, splat(10.f));
    const vf t = 1.f / (1.f + 0.5f * a);
    vf tail = splat(-6.783452744e-02f);
    tail = tail * t + 3.269821678e-01f;
    tail = tail * t - 5.722385514e-01f;
    tail = tail * t + 3.713200433e-01f;
    tail = tail * t - 8.832993378e-02f;
    tail = tail * t + 2.282116339e-01f;
    tail = tail * t + 2.365167515e-01f;
    tail = tail * t + 2.833952663e-01f;
    tail = tail * t + 2.820006536e-01f;
    tail = tail * t + 2.975692137e-06f;
    const vf large = 1.f - vexp(-a * a) * tail;
    const vf signed_large = (vf)((vi)large | ((vi)x & (vi)splat(-0.f)));
    const vf result = select(magnitude < 1.f, small, signed_large);
    return select(x != x, x, result);
}

PDN_INLINE vf gelu(vf x) { return 0.5f * x * (1.f + verf(x * 0.70710678118654752f)); }

PDN_INLINE vf leaky_relu(vf x, float slope) { return select(x < 0.f, x * slope, x); }

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|). With s = e / (2 + e) the latter is 2 atanh(s), whose series in s^2 <= 1/9
// was fitted to 4e-10 relative: small results keep their digits, as torch's do.
PDN_INLINE vf softplus(vf x) {
    const vf e = vexp(-(vf)((vi)x & 0x7fffffff));
    const vf s = e / (2.f + e), t = s * s;
    vf poly = splat(1.1619438e-1f);
    poly = poly * t + 1.0851679e-1f;
    poly = poly * t + 1.4296290e-1f;
    poly = poly * t + 1.9999851e-1f;
    poly = poly * t + 3.3333334e-1f;
    const vf twice = s + s;
    return relu(x) + (twice + twice * (t * poly));
}

// `activation` is the number of an Activation that leaves the channels as they are.
PDN_INLINE vf activate(vf x, int activation) {
    switch (activation) {
        case 1:
            return relu(x);
        case 2:
            return silu(x);
        case 3:
            return gelu(x);
        case 4:
            return gelu_tanh(x);
        case 5:
        case 6:
        case 7:
            return leaky_relu(x, leaky_slope(static_cast<Activation>(activation)));
        case 9:
            return softplus(x);
        default:
            return x;
    }
}

}  // namespace
}  // namespace pdn
