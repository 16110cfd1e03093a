// The weight gradient of a large depthwise kernel in float32, split like the forward pass (karatsuba.inl): with
// y = join(split(x) * split(w)), the gradient of a part's taps is the correlation of the part of x with the part of dy,
// and a tap's gradient is the sum of the parts that use it.
#pragma once

#include "depthwise_large.inl"

namespace pdn {
namespace weighted_conv {
namespace {

constexpr int kLargeGradPixels = kWidth == 16 ? 14 : 6;  // output-gradient vectors in registers

// Partials: [chunk][block of channels][part][row's tap][column's tap, whole passes][lane]. A chunk is a run of regions
// of all images.
struct LargeGradLayout {
    LargePlan plan;
    int64_t regions, chunks, per_chunk;
    int64_t sum_part, sum_row;  // planes of the output gradient

    explicit LargeGradLayout(const GradWeightParams& p) : plan(p) {
        regions = plan.images * plan.regions();
        const int64_t wanted = max64(1, ceil_div(32, plan.blocks));
        per_chunk = max64(1, ceil_div(regions, max64(1, min64(wanted, regions))));
        chunks = max64(1, ceil_div(regions, per_chunk));
        sum_row = plan.columns * kWidth;
        sum_part = (plan.rows * plan.columns | 1) * kWidth;
    }
};

int64_t large_grad_partial_floats(const GradWeightParams& p) {
    const LargeGradLayout layout(p);
    return layout.chunks * layout.plan.blocks * layout.plan.block_weights;
}

int64_t large_grad_items(const GradWeightParams& p) {
    const LargeGradLayout layout(p);
    return layout.chunks * layout.plan.blocks;
}

int64_t large_grad_scratch_bytes(const GradWeightParams& p) {
    const LargeGradLayout layout(p);
    const LargePlan& plan = layout.plan;
    return (plan.planes + plan.y.parts * plan.line + plan.y.parts * plan.x.parts * layout.sum_part) * 4;
}

// The region's part of the output gradient, split.
template <int LY, int LX>
void large_split_gradient(const Image<float>& dy, const SplitAxis& y, const SplitAxis& x, const Region& region,
                          const Planes& planes) {
    constexpr int kRows = kStep<LY>, kColumns = kStep<LX>;
    for (int64_t r = 0; r < region.rows; ++r)
        for (int64_t c = 0; c < region.columns; ++c) {
            const int64_t row = (region.row + r) * kRows, column = (region.column + c) * kColumns;
            const float* from = dy.data + row * dy.row + column * dy.column;
            const bool whole = row + kRows <= y.out_size && column + kColumns <= x.out_size && dy.lanes == kWidth;
            vf lines[kRows][kParts<LX>];
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
                vf values[kColumns];
#pragma GCC unroll 4
                for (int j = 0; j < kColumns; ++j) {
                    const float* at = from + i * dy.row + j * dy.column;
                    values[j] = whole ? load(at) : row + i < y.out_size && column + j < x.out_size ? dy.at(at) : vf{};
                }
                split_sums<LX>(values, lines[i]);
            }
#pragma GCC unroll 9
            for (int q = 0; q < kParts<LX>; ++q) {
                vf along[kRows], parts[kParts<LY>];
#pragma GCC unroll 4
                for (int i = 0; i < kRows; ++i) along[i] = lines[i][q];
                split_sums<LY>(along, parts);
#pragma GCC unroll 9
                for (int p = 0; p < kParts<LY>; ++p) store(planes.at(p * kParts<LX> + q, r, c), parts[p]);
            }
        }
}

// sums[k] += all rows of plane[at + k] * dy[at], for K taps of one row and a stretch of M columns.
struct LargeGradRow {
    const float *plane, *dy;
    int64_t plane_row, dy_row, rows;
    int64_t low, high;  // columns of the plane that meet the image, from `plane` on
    float* sums;
};

template <int M, int K>
void large_grad_row(const LargeGradRow& t) {
    vf acc[2][K];  // two chains a tap: one would wait for its own additions
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) acc[0][k] = acc[1][k] = vf{};
    for (int64_t row = 0; row < t.rows; ++row) {
        const float *x = t.plane + row * t.plane_row, *from = t.dy + row * t.dy_row;
        vf dy[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) dy[m] = load(from + m * kWidth);
#pragma GCC unroll 24
        for (int at = 0; at < M + K - 1; ++at) {
            if (at < t.low || at >= t.high) continue;
            const vf value = load(x + at * kWidth);
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k)
                if (at - k >= 0 && at - k < M) acc[at & 1][k] += value * dy[at - k];
        }
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) store(t.sums + k * kWidth, load(t.sums + k * kWidth) + (acc[0][k] + acc[1][k]));
}

using LargeGradFunction = void (*)(const LargeGradRow&);

template <int M>
LargeGradFunction large_grad_taps(int64_t taps) {
    switch (taps) {
        case 3:
            return large_grad_row<M, 3>;
        case 4:
            return large_grad_row<M, 4>;
#if defined(__AVX512F__)
        case 6:
            return large_grad_row<M, 6>;
        case 7:
            return large_grad_row<M, 7>;
#endif
        default:
            return large_grad_row<M, 5>;
    }
}

LargeGradFunction large_grad_of(int64_t columns, int64_t taps) {
    switch (columns) {
        case 1:
            return large_grad_taps<1>(taps);
        case 2:
            return large_grad_taps<2>(taps);
        case 3:
            return large_grad_taps<3>(taps);
        case 4:
            return large_grad_taps<4>(taps);
        case 5:
            return large_grad_taps<5>(taps);
#if defined(__AVX512F__)
        case 7:
            return large_grad_taps<7>(taps);
        case 8:
            return large_grad_taps<8>(taps);
        case 9:
            return large_grad_taps<9>(taps);
        case 10:
            return large_grad_taps<10>(taps);
        case 11:
            return large_grad_taps<11>(taps);
        case 12:
            return large_grad_taps<12>(taps);
        case 13:
            return large_grad_taps<13>(taps);
        case 14:
            return large_grad_taps<14>(taps);
#endif
        default:
            return large_grad_taps<6>(taps);
    }
}

// One part of one region, added to the part's sums.
void large_grad_part(const LargePlan& plan, const Region& region, const Planes& planes, const Planes& grads,
                     int64_t row_part, int64_t part, float* sums) {
    const SplitAxis &y = plan.y, &x = plan.x;
    const int64_t top = y.first(row_part) - region.row, bottom = y.end(row_part) - region.row;
    const int64_t left = x.first(part) - region.column;
    const int64_t right = min64(x.end(part) - region.column, region.columns + x.taps - 1);
    const int64_t stretches = ceil_div(region.columns, kLargeGradPixels), index = row_part * x.parts + part;
    LargeGradRow t;
    t.plane_row = plan.plane_row, t.dy_row = grads.row;
    for (int64_t tap = 0; tap < y.taps; ++tap) {
        const int64_t from = max64(0, top - tap), to = min64(region.rows, bottom - tap);
        if (from >= to) continue;
        t.rows = to - from;
        for (int64_t pass = 0; pass < plan.along.passes; ++pass)
            for (int64_t s = 0; s < stretches; ++s) {
                const int64_t column = s * region.columns / stretches;
                const int64_t columns = (s + 1) * region.columns / stretches - column;
                const int64_t shift = column + pass * plan.along.taps;
                t.plane = planes.at(index, from + tap, shift);
                t.dy = grads.at(index, from, column);
                t.low = left - shift, t.high = right - shift;
                if (t.high <= 0) continue;
                t.sums = sums + tap * plan.weights_row + pass * plan.along.taps * kWidth;
                large_grad_of(columns, plan.along.taps)(t);
            }
    }
}

template <int LY, int LX>
void large_grad_split(const GradWeightParams& p, const LargeGradLayout& layout, float* partials, int64_t begin,
                      int64_t end, float* scratch) {
    const LargePlan& plan = layout.plan;
    const Planes planes = {scratch, plan.plane, plan.plane_row};
    float* lines = scratch + plan.planes;
    const Planes grads = {lines + plan.y.parts * plan.line, layout.sum_part, layout.sum_row};
    const int64_t per_image = plan.regions();
    for (int64_t item = begin; item < end; ++item) {
        const int64_t block = item % plan.blocks, chunk = item / plan.blocks;
        const int lanes = static_cast<int>(min64(kWidth, p.groups - block * kWidth));
        float* sums = partials + item * plan.block_weights;
        zero_vectors(sums, plan.block_weights / kWidth);
        const int64_t last = min64(layout.regions, (chunk + 1) * layout.per_chunk);
        for (int64_t at = chunk * layout.per_chunk; at < last; ++at) {
            const int64_t image = at / per_image, n = image / plan.depth, d = image % plan.depth;
            const Region region = plan.region(at % per_image / plan.column_regions, at % plan.column_regions);
            const Image<float> x = {
                static_cast<const float*>(p.input) + n * p.in_batch_stride + d * p.axis[0].in_stride + block * kWidth,
                p.axis[1].in_stride, p.axis[2].in_stride, lanes};
            const Image<float> dy = {
                static_cast<const float*>(p.grad) + n * p.out_batch_stride + d * p.axis[0].out_stride + block * kWidth,
                p.axis[1].out_stride, p.axis[2].out_stride, lanes};
            split_region<float, LY, LX>(x, plan.y, plan.x, region, planes, lines, plan.line);
            large_split_gradient<LY, LX>(dy, plan.y, plan.x, region, grads);
            for (int64_t i = 0; i < plan.y.parts; ++i)
                for (int64_t j = 0; j < plan.x.parts; ++j)
                    large_grad_part(plan, region, planes, grads, i, j, sums + (i * plan.x.parts + j) * plan.weights);
        }
    }
}

template <int LY>
void large_grad_rows(const GradWeightParams& p, const LargeGradLayout& layout, float* partials, int64_t begin,
                     int64_t end, float* scratch) {
    const auto body = layout.plan.x.levels == 0   ? large_grad_split<LY, 0>
                      : layout.plan.x.levels == 1 ? large_grad_split<LY, 1>
                                                  : large_grad_split<LY, 2>;
    body(p, layout, partials, begin, end, scratch);
}

void large_grad_run(const GradWeightParams& p, float* partials, int64_t begin, int64_t end, void* scratch) {
    const LargeGradLayout layout(p);
    const auto body = layout.plan.y.levels == 0   ? large_grad_rows<0>
                      : layout.plan.y.levels == 1 ? large_grad_rows<1>
                                                  : large_grad_rows<2>;
    body(p, layout, partials, begin, end, static_cast<float*>(scratch));
}

int64_t large_grad_finish_items(const GradWeightParams& p) { return ceil_div(p.groups, kWidth); }

// Adds up the chunks, then the parts of each tap.
void large_grad_finish(const GradWeightParams& p, const float* partials, double* density_rows, int64_t begin,
                       int64_t end) {
    const LargeGradLayout layout(p);
    const LargePlan& plan = layout.plan;
    const SplitAxis &y = plan.y, &x = plan.x;
    const PartLists row_parts(y), column_parts(x);
    const float* density = static_cast<const float*>(p.density);
    const int64_t taps = p.axis[1].kernel * p.axis[2].kernel;
    for (int64_t block = begin; block < end; ++block) {
        const int64_t lanes = min64(kWidth, p.groups - block * kWidth);
        for (int64_t k = 0; k < taps; ++k) {
            const int64_t i = k / p.axis[2].kernel, j = k % p.axis[2].kernel;
            const int64_t tap = i / y.step * plan.weights_row + j / x.step * kWidth;
            vf total{};
            for (int64_t a = 0; a < y.step; ++a)
                for (int64_t b = 0; b < x.step; ++b) {
                    const int64_t part = row_parts.part[i % y.step][a] * x.parts + column_parts.part[j % x.step][b];
                    const float* at = partials + block * plan.block_weights + part * plan.weights + tap;
                    for (int64_t chunk = 0; chunk < layout.chunks; ++chunk)
                        total += load(at + chunk * plan.blocks * plan.block_weights);
                }
            float values[kWidth];
            store(values, total);
            double sum = 0;
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const int64_t at = (block * kWidth + lane) * taps + k;
                if (density_rows) sum += static_cast<double>(values[lane]) * static_cast<const float*>(p.weight)[at];
                if (p.weight_grad)
                    static_cast<float*>(p.weight_grad)[at] = density ? values[lane] * density[k] : values[lane];
            }
            if (density_rows) density_rows[block * taps + k] = sum;
        }
    }
}

const char* large_grad_unsupported(const GradWeightParams& p) {
    if (p.dtype != DType::float32) return "the weight gradient is computed in float32";
    return large_shape_unsupported(p);
}

constexpr GradAlgorithm kGradDepthwiseLarge = {
    "grad_depthwise_large", large_grad_unsupported,  large_grad_partial_floats, large_grad_items,
    large_grad_run,         large_grad_finish_items, large_grad_finish,         large_grad_scratch_bytes};

}  // namespace
}  // namespace weighted_conv
}  // namespace pdn
