// Large depthwise kernels, 7x7 and more, stride and dilation 1, by nested Karatsuba products (karatsuba.inl). A block
// of channels of a region of the image is split into parts: planes of a half or a quarter of its rows and columns, each
// with a kernel of as many fewer taps. A plane fits the first-level cache; its rows are convolved in registers, in
// place, and the parts are joined into the output. Kernel positions that only meet padding cost nothing.
#pragma once

#include "karatsuba.inl"

namespace pdn {
namespace weighted_conv {
namespace {

constexpr int kLargePixels = kWidth == 16 ? 16 : 8;   // most sums in registers
constexpr int kLargeTapsMost = kWidth == 16 ? 7 : 5;  // most taps of a row whose weights are too
constexpr int kLargeTapsLeast = 3;
constexpr int64_t kLargeRegion = 16;  // most pieces of a region along an axis that is split twice
constexpr int64_t kLargeImage = 24;   // least output along an axis that is split twice
constexpr int64_t kLargeItems = 8;    // least items wanted
constexpr int64_t kLargeKernel = 7;   // least kernel

// The taps of a row, `passes` times `taps` of them: those whose weights are in registers at once.
struct TapPasses {
    int64_t taps, passes;

    TapPasses() = default;
    explicit TapPasses(int64_t all) {
        taps = kLargeTapsLeast;
        for (int64_t t = kLargeTapsLeast; t <= kLargeTapsMost; ++t)
            if (ceil_div(all, t) * t <= ceil_div(all, taps) * taps) taps = t;
        passes = ceil_div(all, taps);
    }
};

// How often an axis is split: 7 taps are too few to gain, and twice pays for kernels and images that are large.
PDN_INLINE int64_t large_levels(const Axis& a, bool twice) {
    return a.kernel >= 17 && twice ? 2 : a.kernel >= 8 ? 1 : 0;
}

// Whether some image is worth splitting an axis twice; whether this one is.
PDN_INLINE bool large_has_twice(const Axis* axis) { return max64(axis[1].kernel, axis[2].kernel) >= 17; }
PDN_INLINE bool large_twice(const Axis* axis) {
    for (int i = 1; i < 3; ++i)
        if (axis[i].kernel >= 17 && axis[i].out_size < kLargeImage) return false;
    return large_has_twice(axis);
}

struct LargePlan {
    SplitAxis y, x;
    TapPasses along;        // the row
    int64_t rows, columns;  // most pieces of a region
    int64_t row_regions, column_regions, images, depth, blocks;
    int64_t plane_row, plane, planes;             // floats from row to row, of a plane, of all planes
    int64_t line;                                 // floats of a line
    int64_t weights_row, weights, block_weights;  // floats of a row of taps, of a part, of a block of channels

    LargePlan(const Axis* axis, int64_t batch, int64_t groups, bool twice) {
        y = SplitAxis(axis[1], large_levels(axis[1], twice));
        x = SplitAxis(axis[2], large_levels(axis[2], twice));
        along = TapPasses(x.taps);
        depth = axis[0].out_size;
        images = batch * depth;
        blocks = ceil_div(groups, kWidth);
        column_regions = max64(1, ceil_div(x.pieces, kLargeRegion << (2 - x.levels)));
        row_regions = max64(1, ceil_div(y.pieces, kLargeRegion << (2 - y.levels)));
        // A few items for several threads, but none so low that its borders cost more than its rows.
        const int64_t least = ceil_div(kLargeItems, max64(1, images * blocks * column_regions));
        row_regions = max64(row_regions, min64(least, y.pieces / y.taps));
        rows = ceil_div(y.pieces, row_regions);
        row_regions = max64(1, ceil_div(y.pieces, max64(1, rows)));
        columns = ceil_div(x.pieces, column_regions);
        column_regions = max64(1, ceil_div(x.pieces, max64(1, columns)));
        const int64_t parts = y.parts * x.parts, reach = columns + x.taps - 1;
        plane_row = reach * kWidth;
        plane = (reach * (rows + y.taps - 1) | 1) * kWidth;  // odd: the parts lie in different cache sets
        planes = parts * plane;
        line = (((reach + 1) * x.step - 1) | 1) * kWidth;
        weights_row = along.taps * along.passes * kWidth;
        weights = y.taps * weights_row;
        block_weights = parts * weights;
    }

    template <class P>
    explicit LargePlan(const P& p) : LargePlan(p.axis, p.batch, p.groups, large_twice(p.axis)) {}

    int64_t regions() const { return row_regions * column_regions; }
    Region region(int64_t row, int64_t column) const {
        const int64_t top = row * rows, left = column * columns;
        return {top, min64(rows, y.pieces - top), left, min64(columns, x.pieces - left)};
    }
};

// Stride and dilation 1, all taps.
PDN_INLINE bool large_axis(const Axis& a) {
    return a.step == 1 && a.offset_step == 1 && a.taps == a.kernel && a.tap == 0 && a.tap_step == 1;
}

template <class P>
const char* large_shape_unsupported(const P& p) {
    if (p.in_channels != 1 || p.out_channels != 1) return "depthwise_large: one channel in and out per group";
    const Axis& z = p.axis[0];
    if (z.kernel != 1 || z.offset != 0 || z.step != 1) return "depthwise_large: the kernel has one or two dimensions";
    if (!large_axis(z) || !large_axis(p.axis[1]) || !large_axis(p.axis[2]))
        return "depthwise_large: only stride 1 and dilation 1";
    if (max64(p.axis[1].kernel, p.axis[2].kernel) < kLargeKernel || p.axis[2].kernel < kLargeTapsLeast)
        return "depthwise_large: a small kernel";
    return nullptr;
}

const char* large_unsupported(const ConvParams& p) { return large_shape_unsupported(p); }

// -------------------------------------------------------------------------------------------------------------- weight

// Packed: [block of channels][row's part][column's part][row's tap][column's tap, up to whole passes][lane], for
// kernels split at most once; then, where some images are worth it, the same split twice.
PDN_INLINE LargePlan large_packing(const ConvParams& p, bool twice) {
    return LargePlan(p.axis, p.batch, p.groups, twice);
}

int64_t large_packed_bytes(const ConvParams& p) {
    const LargePlan once = large_packing(p, false), twice = large_packing(p, true);
    return once.blocks * (once.block_weights + (large_has_twice(p.axis) ? twice.block_weights : 0)) * 4;
}
int64_t large_pack_items(const ConvParams& p) { return ceil_div(p.groups, kWidth) * (large_has_twice(p.axis) ? 2 : 1); }

template <class T>
void large_pack_block(const ConvParams& p, const LargePlan& plan, const WeightView& view, int64_t block, float* out) {
    const SplitAxis &y = plan.y, &x = plan.x;
    const PartLists row_parts(y), column_parts(x);
    zero_vectors(out, plan.block_weights / kWidth);
    const int64_t lanes = min64(kWidth, p.groups - block * kWidth);
    for (int64_t i = 0; i < p.axis[1].kernel; ++i)
        for (int64_t j = 0; j < p.axis[2].kernel; ++j) {
            const int64_t tap = (i * p.axis[2].kernel + j) * view.tap_stride;
            const float factor = view.density ? widen(static_cast<const T*>(view.density)[tap]) : 1.f;
            float values[kWidth] = {};
            for (int64_t l = 0; l < lanes; ++l) {
                const int64_t at = (block * kWidth + l) * view.group_stride + tap;
                values[l] = widen(static_cast<const T*>(view.weight)[at]) * factor;
            }
            const vf weight = load(values);
            float* to = out + i / y.step * plan.weights_row + j / x.step * kWidth;
            for (int64_t a = 0; a < y.step; ++a)
                for (int64_t b = 0; b < x.step; ++b) {
                    const int64_t part = row_parts.part[i % y.step][a] * x.parts + column_parts.part[j % x.step][b];
                    store(to + part * plan.weights, load(to + part * plan.weights) + weight);
                }
        }
}

void large_pack(const ConvParams& p, const WeightView& view, void* packed, int64_t begin, int64_t end) {
    const LargePlan once = large_packing(p, false), twice = large_packing(p, true);
    for (int64_t item = begin; item < end; ++item) {
        const bool second = item >= once.blocks;
        const int64_t block = item % once.blocks;
        const LargePlan& plan = second ? twice : once;
        float* out = static_cast<float*>(packed) + (second ? once.blocks * once.block_weights : 0);
        out += block * plan.block_weights;
        p.dtype == DType::float32 ? large_pack_block<float>(p, plan, view, block, out)
                                  : large_pack_block<bf16>(p, plan, view, block, out);
    }
}

// ------------------------------------------------------------------------------------------------------------ products

// One stretch of a row of one plane, and what is summed up for it.
struct LargeRow {
    const float* plane;  // row of the first tap, column of the first sum's first tap
    const float* weights;
    int64_t plane_row, weights_row;
    int64_t rows, passes;
    int64_t low, high;  // columns that meet the image, counted from the first sum
    float* out;
};

// M sums under rows of K taps a pass: every vector of the plane is loaded once a pass.
template <int M, int K, bool Border>
void large_row(const LargeRow& t) {
    vf acc[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) acc[m] = vf{};
    for (int64_t row = 0; row < t.rows; ++row) {
        const float *x = t.plane + row * t.plane_row, *w = t.weights + row * t.weights_row;
        int64_t low = t.low, high = t.high;
        for (int64_t pass = 0; pass < t.passes; ++pass) {
            vf weights[K];
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k) weights[k] = load(w + k * kWidth);
#pragma GCC unroll 24
            for (int at = 0; at < M + K - 1; ++at) {
                if (Border && (at < low || at >= high)) continue;
                const vf value = load(x + at * kWidth);
#pragma GCC unroll 8
                for (int k = 0; k < K; ++k)
                    if (at - k >= 0 && at - k < M) acc[at - k] += value * weights[k];
            }
            x += K * kWidth;
            w += K * kWidth;
            low -= K;
            high -= K;
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) store(t.out + m * kWidth, acc[m]);
}

using LargeRowFunction = void (*)(const LargeRow&);

template <int M, bool Border>
LargeRowFunction large_row_taps(int64_t taps) {
    switch (taps) {
        case 3:
            return large_row<M, 3, Border>;
        case 4:
            return large_row<M, 4, Border>;
#if defined(__AVX512F__)
        case 6:
            return large_row<M, 6, Border>;
        case 7:
            return large_row<M, 7, Border>;
#endif
        default:
            return large_row<M, 5, Border>;
    }
}

template <bool Border>
LargeRowFunction large_row_of(int64_t sums, int64_t taps) {
    switch (sums) {
        case 1:
            return large_row_taps<1, Border>(taps);
        case 2:
            return large_row_taps<2, Border>(taps);
        case 3:
            return large_row_taps<3, Border>(taps);
        case 4:
            return large_row_taps<4, Border>(taps);
        case 5:
            return large_row_taps<5, Border>(taps);
        case 6:
            return large_row_taps<6, Border>(taps);
        case 7:
            return large_row_taps<7, Border>(taps);
#if defined(__AVX512F__)
        case 9:
            return large_row_taps<9, Border>(taps);
        case 10:
            return large_row_taps<10, Border>(taps);
        case 11:
            return large_row_taps<11, Border>(taps);
        case 12:
            return large_row_taps<12, Border>(taps);
        case 13:
            return large_row_taps<13, Border>(taps);
        case 14:
            return large_row_taps<14, Border>(taps);
        case 15:
            return large_row_taps<15, Border>(taps);
        case 16:
            return large_row_taps<16, Border>(taps);
#endif
        default:
            return large_row_taps<8, Border>(taps);
    }
}

// One block of channels of one region of one image.
template <class T>
struct LargeItem {
    int64_t block;
    Region region;
    Image<T> input;
    Finish<T> output;

    LargeItem(const ConvParams& p, const LargePlan& plan, int64_t item) {
        const int64_t at = item / plan.blocks % plan.regions(), image = item / plan.blocks / plan.regions();
        block = item % plan.blocks;
        const int64_t n = image / plan.depth, d = image % plan.depth, channel = block * kWidth;
        const int lanes = static_cast<int>(min64(kWidth, p.groups - channel));
        region = plan.region(at / plan.column_regions, at % plan.column_regions);
        input = {static_cast<const T*>(p.input) + n * p.in_batch_stride + d * p.axis[0].in_stride + channel,
                 p.axis[1].in_stride, p.axis[2].in_stride, lanes};
        const int64_t row = region.row * plan.y.step, column = region.column * plan.x.step;
        output = finish_at<T>(p, n, d * p.axis[1].out_size + row, column, channel, lanes);
    }
};

// Pixels to bring into the second-level cache while products are computed: one block of channels of a window. They lie
// too far apart for the processor's own prefetch, and waiting for them would take as long as half of the products.
struct PixelFetch {
    const char* first;
    int64_t row_bytes, column_bytes, rows, columns;
    int64_t row = 0, column = 0;

    // What the split of the item reads.
    template <class T>
    static PixelFetch input(const LargePlan& plan, const LargeItem<T>& item) {
        const SplitAxis &y = plan.y, &x = plan.x;
        const Region& r = item.region;
        const int64_t top = max64(0, y.step * r.row + y.offset), left = max64(0, x.step * r.column + x.offset);
        const int64_t bottom = min64(y.step * (r.row + r.rows + y.taps) + y.offset, y.in_size);
        const int64_t right = min64(x.step * (r.column + r.columns + x.taps) + x.offset, x.in_size);
        const T* from = item.input.data + top * item.input.row + left * item.input.column;
        return window(from, item.input.row, item.input.column, bottom - top, right - left);
    }

    // What its output will be written to.
    template <class T>
    static PixelFetch output(const ConvParams& p, const LargePlan& plan, const LargeItem<T>& item) {
        const Region& r = item.region;
        const int64_t rows = min64(r.rows * plan.y.step, plan.y.out_size - r.row * plan.y.step);
        const int64_t columns = min64(r.columns * plan.x.step, plan.x.out_size - r.column * plan.x.step);
        return window(item.output.output, p.axis[1].out_stride, p.axis[2].out_stride, rows, columns);
    }

    template <class T>
    static PixelFetch window(const T* from, int64_t row, int64_t column, int64_t rows, int64_t columns) {
        const int64_t bytes = static_cast<int64_t>(sizeof(T));
        return {reinterpret_cast<const char*>(from), row * bytes, column * bytes, columns > 0 ? rows : 0, columns};
    }

    int64_t lines() const { return max64(rows, 0) * columns; }

    void some(int64_t count) {
        const char* at = first + row * row_bytes + column * column_bytes;
        for (; count > 0 && row < rows; --count) {
            __builtin_prefetch(at, 0, 2);
            at += column_bytes;
            if (++column < columns) continue;
            column = 0;
            at = first + ++row * row_bytes;
        }
    }
};

// One part of a region, in place: row r is not read after its sums are written over it, and neither are the columns of
// a stretch.
void large_part(const LargePlan& plan, const Region& region, const Planes& planes, int64_t row_part, int64_t part,
                const float* weights, PixelFetch& input, PixelFetch& output, int64_t each) {
    const SplitAxis &y = plan.y, &x = plan.x;
    const int64_t top = y.first(row_part) - region.row, bottom = y.end(row_part) - region.row;
    const int64_t left = x.first(part) - region.column;
    const int64_t right = min64(x.end(part) - region.column, region.columns + x.taps - 1);
    const int64_t stretches = ceil_div(region.columns, kLargePixels), index = row_part * x.parts + part;
    LargeRow t;
    t.plane_row = plan.plane_row, t.weights_row = plan.weights_row, t.passes = plan.along.passes;
    for (int64_t r = 0; r < region.rows; ++r) {
        const int64_t skip = min64(max64(top - r, 0), y.taps);
        t.rows = max64(0, min64(y.taps, bottom - r) - skip);
        t.weights = weights + skip * plan.weights_row;
        for (int64_t s = 0; s < stretches; ++s) {
            const int64_t column = s * region.columns / stretches;
            const int64_t sums = (s + 1) * region.columns / stretches - column;
            t.plane = planes.at(index, r + skip, column);
            t.out = planes.at(index, r, column);
            t.low = left - column, t.high = right - column;
            const bool border = t.low > 0 || t.high < sums + plan.along.taps * t.passes - 1;
            const auto body =
                border ? large_row_of<true>(sums, plan.along.taps) : large_row_of<false>(sums, plan.along.taps);
            body(t);
            input.some(each);
            output.some(each);
        }
    }
}

// -------------------------------------------------------------------------------------------------------------- output

// Joins the parts of one piece of the output.
template <int LY, int LX>
PDN_INLINE void large_join(const float* from, int64_t part, vf bias, vf (&y)[kStep<LY> * kStep<LX>]) {
    vf columns[kParts<LY>][kStep<LX>];
#pragma GCC unroll 9
    for (int p = 0; p < kParts<LY>; ++p) {
        vf m[kParts<LX>];
#pragma GCC unroll 9
        for (int q = 0; q < kParts<LX>; ++q) m[q] = load(from + (p * kParts<LX> + q) * part);
        join<LX>(m, columns[p]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kStep<LX>; ++c) {
        vf m[kParts<LY>], rows[kStep<LY>];
#pragma GCC unroll 9
        for (int p = 0; p < kParts<LY>; ++p) m[p] = columns[p][c];
        join<LY>(m, rows);
#pragma GCC unroll 4
        for (int r = 0; r < kStep<LY>; ++r) y[r * kStep<LX> + c] = rows[r] + bias;
    }
}

// `start` is at the region's first pixel.
template <class T, int LY, int LX>
void large_output(const LargePlan& plan, const Region& region, const Planes& planes, const Axis* axis,
                  const Finish<T>& start) {
    constexpr int kRows = kStep<LY>, kColumns = kStep<LX>;
    const bool relu_only = start.activation == static_cast<int>(Activation::relu);
    const bool simple = start.lanes == kWidth && !start.residual &&
                        (relu_only || start.activation == static_cast<int>(Activation::none));
    const vf bias = bias_vector(start.bias, start.lanes);
    for (int64_t r = 0; r < region.rows; ++r) {
        const int64_t rows = min64(kRows, plan.y.out_size - (region.row + r) * kRows);
        Finish<T> f = start;
        f.output += r * kRows * axis[1].out_stride;
        if (f.residual) f.residual += r * kRows * axis[1].residual_stride;
        for (int64_t c = 0; c < region.columns; ++c, f = moved(f, kColumns, 0, f.lanes)) {
            vf y[kRows * kColumns];
            large_join<LY, LX>(planes.at(0, r, c), planes.part, bias, y);
            const int64_t columns = min64(kColumns, plan.x.out_size - (region.column + c) * kColumns);
            if (simple && rows == kRows && columns == kColumns) {
#pragma GCC unroll 4
                for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
                    for (int j = 0; j < kColumns; ++j) {
                        const vf value = y[i * kColumns + j];
                        store(f.output + i * axis[1].out_stride + j * f.out_stride, relu_only ? relu(value) : value);
                    }
                continue;
            }
            float values[kRows * kColumns * kWidth];
#pragma GCC unroll 16
            for (int i = 0; i < kRows * kColumns; ++i) store(values + i * kWidth, y[i]);
            Finish<T> line = f;
            for (int64_t i = 0; i < rows; ++i) {
                finish_values(values + i * kColumns * kWidth, static_cast<int>(columns), 1, line);
                line.output += axis[1].out_stride;
                if (line.residual) line.residual += axis[1].residual_stride;
            }
        }
    }
}

// ----------------------------------------------------------------------------------------------------------- interface

int64_t large_items(const ConvParams& p) {
    const LargePlan plan(p);
    return plan.images * plan.regions() * plan.blocks;
}

int64_t large_scratch_bytes(const ConvParams& p) {
    const LargePlan plan(p);
    return (plan.planes + plan.y.parts * plan.line) * 4;
}

template <class T, int LY, int LX>
void large_run_split(const ConvParams& p, const LargePlan& plan, int64_t begin, int64_t end, float* scratch) {
    const Planes planes = {scratch, plan.plane, plan.plane_row};
    const int64_t skipped = large_twice(p.axis) ? large_packing(p, false).block_weights * plan.blocks : 0;
    for (int64_t at = begin; at < end; ++at) {
        const LargeItem<T> item(p, plan, at);
        const Region& region = item.region;
        split_region<T, LY, LX>(item.input, plan.y, plan.x, region, planes, scratch + plan.planes, plan.line);
        PixelFetch output = PixelFetch::output(p, plan, item), input = {};
        if (at + 1 < end) input = PixelFetch::input(plan, LargeItem<T>(p, plan, at + 1));
        const int64_t stretches = region.rows * ceil_div(region.columns, kLargePixels) * plan.y.parts * plan.x.parts;
        const int64_t each = ceil_div(max64(input.lines(), output.lines()), stretches);
        const float* weights = static_cast<const float*>(p.packed) + skipped + item.block * plan.block_weights;
        for (int64_t i = 0; i < plan.y.parts; ++i)
            for (int64_t j = 0; j < plan.x.parts; ++j, weights += plan.weights)
                large_part(plan, region, planes, i, j, weights, input, output, each);
        large_output<T, LY, LX>(plan, region, planes, p.axis, item.output);
    }
}

template <class T, int LY>
void large_run_rows(const ConvParams& p, const LargePlan& plan, int64_t begin, int64_t end, float* scratch) {
    const auto body = plan.x.levels == 0   ? large_run_split<T, LY, 0>
                      : plan.x.levels == 1 ? large_run_split<T, LY, 1>
                                           : large_run_split<T, LY, 2>;
    body(p, plan, begin, end, scratch);
}

template <class T>
void large_run_as(const ConvParams& p, int64_t begin, int64_t end, float* scratch) {
    const LargePlan plan(p);
    const auto body = plan.y.levels == 0   ? large_run_rows<T, 0>
                      : plan.y.levels == 1 ? large_run_rows<T, 1>
                                           : large_run_rows<T, 2>;
    body(p, plan, begin, end, scratch);
}

void large_run(const ConvParams& p, int64_t begin, int64_t end, void* scratch) {
    p.dtype == DType::float32 ? large_run_as<float>(p, begin, end, static_cast<float*>(scratch))
                              : large_run_as<bf16>(p, begin, end, static_cast<float*>(scratch));
}

constexpr Algorithm kDepthwiseLarge = {"depthwise_large", large_unsupported, large_packed_bytes,  large_pack_items,
                                       large_pack,        large_items,       large_scratch_bytes, large_run};

}  // namespace
}  // namespace weighted_conv
}  // namespace pdn
