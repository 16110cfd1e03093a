// The weight gradient of a depthwise convolution in float32: channels fill the vectors, and the sums of a few
// neighbouring taps stay in registers while the pixels of all rows stream by.
#pragma once

#include "grad_weight.inl"

namespace pdn {
namespace weighted_conv {
namespace {

constexpr int kDepthwiseTaps = 8;  // taps summed at once

// Partials: [chunk][block of kWidth channels][tap][lane].
struct DepthwiseGradLayout {
    int64_t blocks, outer_taps, taps, rows, chunks, rows_per_chunk;

    explicit DepthwiseGradLayout(const GradWeightParams& p) {
        blocks = ceil_div(p.groups, kWidth);
        outer_taps = p.axis[0].kernel * p.axis[1].kernel;
        taps = outer_taps * p.axis[2].kernel;
        rows = p.batch * p.axis[0].out_size * p.axis[1].out_size;
        const int64_t wanted = max64(1, ceil_div(96, blocks * outer_taps));
        const int64_t affordable = max64(1, rows * p.axis[2].out_size / 64);
        chunks = max64(1, min64(min64(wanted, affordable), rows));
        rows_per_chunk = max64(1, ceil_div(rows, chunks));
        chunks = max64(1, ceil_div(rows, rows_per_chunk));
    }
};

int64_t depthwise_grad_partial_floats(const GradWeightParams& p) {
    const DepthwiseGradLayout layout(p);
    return layout.chunks * layout.blocks * layout.taps * kWidth;
}

int64_t depthwise_grad_items(const GradWeightParams& p) {
    const DepthwiseGradLayout layout(p);
    return layout.chunks * layout.blocks * layout.outer_taps;
}

// acc[t] += x[pixel + t] * dy[pixel] over one stretch of pixels for which all `Taps` taps lie inside the image.
template <int Taps, bool Partial>
void depthwise_grad_stretch(const float* x, int64_t x_step, int64_t tap_step, const float* dy, int64_t dy_step,
                            int64_t pixels, int lanes, float* sums) {
    vf acc[Taps];
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t) acc[t] = load(sums + t * kWidth);
    for (int64_t k = 0; k < pixels; ++k) {
        const vf g = Partial ? load_partial(dy, lanes) : load(dy);
#pragma GCC unroll 8
        for (int t = 0; t < Taps; ++t)
            acc[t] += g * (Partial ? load_partial(x + t * tap_step, lanes) : load(x + t * tap_step));
        x += x_step;
        dy += dy_step;
    }
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t) store(sums + t * kWidth, acc[t]);
}

template <int Taps>
PDN_INLINE void depthwise_grad_taps(const float* x, int64_t x_step, int64_t tap_step, const float* dy, int64_t dy_step,
                                    int64_t pixels, int lanes, float* sums) {
    if (lanes < kWidth)
        depthwise_grad_stretch<Taps, true>(x, x_step, tap_step, dy, dy_step, pixels, lanes, sums);
    else
        depthwise_grad_stretch<Taps, false>(x, x_step, tap_step, dy, dy_step, pixels, lanes, sums);
}

// One row of output gradient with one row of input: all taps of the innermost axis. Pixels that see all taps of a bunch
// go through it together, those at the borders tap by tap.
void depthwise_grad_row(const GradWeightParams& p, const float* x_row, const float* dy_row, int lanes, float* sums) {
    const Axis& c = p.axis[2];
    const int64_t x_step = c.step * c.in_stride, tap_step = c.offset_step * c.in_stride;
    for (int64_t kw = 0; kw < c.kernel; kw += kDepthwiseTaps) {
        const int64_t bunch = min64(kDepthwiseTaps, c.kernel - kw);
        int64_t low = 0, high = c.out_size;
        for (int64_t t = kw; t < kw + bunch; ++t) {
            int64_t from, to;
            valid_range(c, t, &from, &to);
            low = max64(low, from);
            high = min64(high, to);
        }
        const bool together = bunch > 1 && low < high;
        if (together) {
            const float* x = x_row + (low * c.step + c.offset + kw * c.offset_step) * c.in_stride;
            const float* dy = dy_row + low * c.out_stride;
            float* at = sums + kw * kWidth;
            switch (bunch) {
                case 2:
                    depthwise_grad_taps<2>(x, x_step, tap_step, dy, c.out_stride, high - low, lanes, at);
                    break;
                case 3:
                    depthwise_grad_taps<3>(x, x_step, tap_step, dy, c.out_stride, high - low, lanes, at);
                    break;
                case 4:
                    depthwise_grad_taps<4>(x, x_step, tap_step, dy, c.out_stride, high - low, lanes, at);
                    break;
                case 5:
                    depthwise_grad_taps<5>(x, x_step, tap_step, dy, c.out_stride, high - low, lanes, at);
                    break;
                case 6:
                    depthwise_grad_taps<6>(x, x_step, tap_step, dy, c.out_stride, high - low, lanes, at);
                    break;
                case 7:
                    depthwise_grad_taps<7>(x, x_step, tap_step, dy, c.out_stride, high - low, lanes, at);
                    break;
                default:
                    depthwise_grad_taps<8>(x, x_step, tap_step, dy, c.out_stride, high - low, lanes, at);
            }
        }
        for (int64_t t = kw; t < kw + bunch; ++t) {
            int64_t from, to;
            valid_range(c, t, &from, &to);
            const int64_t ends[2][2] = {{from, together ? min64(low, to) : to},
                                        {together ? max64(high, from) : to, to}};
            for (const auto& end : ends) {
                if (end[0] >= end[1]) continue;
                const float* x = x_row + (end[0] * c.step + c.offset + t * c.offset_step) * c.in_stride;
                depthwise_grad_taps<1>(x, x_step, tap_step, dy_row + end[0] * c.out_stride, c.out_stride,
                                       end[1] - end[0], lanes, sums + t * kWidth);
            }
        }
    }
}

void depthwise_grad_run(const GradWeightParams& p, float* partials, int64_t begin, int64_t end, void*) {
    const DepthwiseGradLayout layout(p);
    const Axis &a = p.axis[0], &b = p.axis[1], &c = p.axis[2];
    for (int64_t item = begin; item < end; ++item) {
        const int64_t outer = item % layout.outer_taps, block = item / layout.outer_taps % layout.blocks;
        const int64_t chunk = item / (layout.outer_taps * layout.blocks);
        const int lanes = static_cast<int>(min64(kWidth, p.groups - block * kWidth));
        float* sums = partials + ((chunk * layout.blocks + block) * layout.taps + outer * c.kernel) * kWidth;
        std::memset(sums, 0, static_cast<size_t>(c.kernel) * kWidth * sizeof(float));
        const int64_t last = min64(layout.rows, (chunk + 1) * layout.rows_per_chunk);
        for (int64_t row = chunk * layout.rows_per_chunk; row < last; ++row) {
            const int64_t oh = row % b.out_size, od = row / b.out_size % a.out_size,
                          n = row / (b.out_size * a.out_size);
            const int64_t id = in_position(a, od, outer / b.kernel), ih = in_position(b, oh, outer % b.kernel);
            if (!inside(id, a.in_size) || !inside(ih, b.in_size)) continue;
            const float* x_row = static_cast<const float*>(p.input) + n * p.in_batch_stride + id * a.in_stride +
                                 ih * b.in_stride + block * kWidth;
            const float* dy_row = static_cast<const float*>(p.grad) + n * p.out_batch_stride + od * a.out_stride +
                                  oh * b.out_stride + block * kWidth;
            depthwise_grad_row(p, x_row, dy_row, lanes, sums);
        }
    }
}

int64_t depthwise_grad_finish_items(const GradWeightParams& p) { return DepthwiseGradLayout(p).blocks; }

void depthwise_grad_finish(const GradWeightParams& p, const float* partials, double* density_rows, int64_t begin,
                           int64_t end) {
    const DepthwiseGradLayout layout(p);
    const float* density = static_cast<const float*>(p.density);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t lanes = min64(kWidth, p.groups - block * kWidth);
        for (int64_t k = 0; k < layout.taps; ++k) {
            vf total{};
            for (int64_t chunk = 0; chunk < layout.chunks; ++chunk)
                total += load(partials + ((chunk * layout.blocks + block) * layout.taps + k) * kWidth);
            float values[kWidth];
            store(values, total);
            double sum = 0;
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const int64_t at = (block * kWidth + lane) * layout.taps + k;
                if (density_rows) sum += static_cast<double>(values[lane]) * static_cast<const float*>(p.weight)[at];
                if (p.weight_grad)
                    static_cast<float*>(p.weight_grad)[at] = density ? values[lane] * density[k] : values[lane];
            }
            if (density_rows) density_rows[block * layout.taps + k] = sum;
        }
    }
}

const char* depthwise_grad_unsupported(const GradWeightParams& p) {
    if (p.dtype != DType::float32) return "the weight gradient is computed in float32";
    return p.in_channels == 1 && p.out_channels == 1 ? nullptr : "depthwise: one channel in and out per group";
}

constexpr GradAlgorithm kGradDepthwise = {
    "grad_depthwise",   depthwise_grad_unsupported,  depthwise_grad_partial_floats, depthwise_grad_items,
    depthwise_grad_run, depthwise_grad_finish_items, depthwise_grad_finish};

}  // namespace
}  // namespace weighted_conv
}  // namespace pdn
