// Depthwise convolution: channels fill the vectors, a few neighbouring pixels stay in registers while the taps go by.
#pragma once

#include "kernel.inl"

namespace pdn {
namespace weighted_conv {
namespace {

constexpr int kDepthwisePixels = kWidth == 16 ? 12 : 6;

const char* depthwise_unsupported(const ConvParams& p) {
    return p.in_channels == 1 && p.out_channels == 1 ? nullptr : "depthwise: one channel in and out per group";
}

PDN_INLINE int64_t depthwise_width(const ConvParams& p) { return ceil_div(p.groups, kWidth) * kWidth; }
PDN_INLINE int64_t all_taps(const ConvParams& p) { return p.axis[0].kernel * p.axis[1].kernel * p.axis[2].kernel; }

// Packed: [tap][channels up to a whole vector], float32 whatever the storage type.
int64_t depthwise_packed_bytes(const ConvParams& p) { return all_taps(p) * depthwise_width(p) * 4; }
int64_t depthwise_pack_items(const ConvParams& p) { return all_taps(p); }

template <class T>
void depthwise_pack_as(const ConvParams& p, const WeightView& view, float* packed, int64_t begin, int64_t end) {
    const int64_t width = depthwise_width(p);
    for (int64_t tap = begin; tap < end; ++tap) {
        const float factor = view.density ? widen(static_cast<const T*>(view.density)[tap * view.tap_stride]) : 1.f;
        for (int64_t g = 0; g < width; ++g) {
            const int64_t at = g * view.group_stride + tap * view.tap_stride;
            packed[tap * width + g] = g < p.groups ? widen(static_cast<const T*>(view.weight)[at]) * factor : 0.f;
        }
    }
}

void depthwise_pack(const ConvParams& p, const WeightView& view, void* packed, int64_t begin, int64_t end) {
    float* out = static_cast<float*>(packed);
    p.dtype == DType::float32 ? depthwise_pack_as<float>(p, view, out, begin, end)
                              : depthwise_pack_as<bf16>(p, view, out, begin, end);
}

int64_t depthwise_items(const ConvParams& p) { return p.batch * p.axis[0].out_size * p.axis[1].out_size; }
int64_t depthwise_scratch_bytes(const ConvParams&) { return 0; }

// What all pixels of one output row share.
template <class T>
struct DepthwiseRow {
    const ConvParams& p;
    int64_t n, row, d, h;  // output row, and the input row of tap 0
    const T* image;
    int64_t width;
    Finish<T> start;

    DepthwiseRow(const ConvParams& params, int64_t item) : p(params) {
        const Axis &a = p.axis[0], &b = p.axis[1];
        const int64_t rows = a.out_size * b.out_size;
        n = item / rows;
        row = item % rows;
        d = in_position(a, row / b.out_size, 0);
        h = in_position(b, row % b.out_size, 0);
        image = static_cast<const T*>(p.input) + n * p.in_batch_stride;
        width = depthwise_width(p);
        start = finish_at<T>(p, n, row, 0, 0, 0);
    }

    // M neighbouring pixels that see all K taps of a row, stride and dilation 1: every input vector is loaded once a
    // row.
    template <int M, int K, bool Partial>
    void slide(int64_t column, int64_t channel, int lanes) const {
        const Axis &a = p.axis[0], &b = p.axis[1], &c = p.axis[2];
        const Finish<T> finish = moved(start, column, channel, lanes);
        const float* packed = static_cast<const float*>(p.packed) + channel;
        vf acc[M][1];
        const vf first = bias_vector(finish.bias, lanes);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) acc[m][0] = first;
        for (int64_t i = 0; i < a.taps; ++i) {
            const int64_t di = d + i * a.offset_step;
            if (!inside(di, a.in_size)) continue;
            for (int64_t j = 0; j < b.taps; ++j) {
                const int64_t hj = h + j * b.offset_step;
                if (!inside(hj, b.in_size)) continue;
                const T* x = image + di * a.in_stride + hj * b.in_stride + channel + (column + c.offset) * c.in_stride;
                const int64_t outer = (a.tap + i * a.tap_step) * b.kernel + b.tap + j * b.tap_step;
                const float* w = packed + outer * K * width;
                vf weights[K];
#pragma GCC unroll 8
                for (int k = 0; k < K; ++k) weights[k] = load(w + k * width);
#pragma GCC unroll 24
                for (int at = 0; at < M + K - 1; ++at) {
                    const vf value = Partial ? load_partial(x + at * c.in_stride, lanes) : load(x + at * c.in_stride);
#pragma GCC unroll 8
                    for (int k = 0; k < K; ++k)
                        if (at - k >= 0 && at - k < M) acc[at - k][0] += value * weights[k];
                }
            }
        }
        finish_tile(acc, finish);
    }

    template <int M, int K>
    void slide_channels(int64_t column) const {
        for (int64_t channel = 0; channel < p.groups; channel += kWidth) {
            const int lanes = static_cast<int>(min64(kWidth, p.groups - channel));
            lanes < kWidth ? slide<M, K, true>(column, channel, lanes) : slide<M, K, false>(column, channel, lanes);
        }
    }

    // M pixels from `column`; taps [from, to) of the innermost axis lie inside the image for all of them.
    template <int M, bool Partial>
    void tile(int64_t column, int64_t from, int64_t to, int64_t channel, int lanes) const {
        const Axis &a = p.axis[0], &b = p.axis[1], &c = p.axis[2];
        const Finish<T> finish = moved(start, column, channel, lanes);
        const float* packed = static_cast<const float*>(p.packed) + channel;
        const int64_t pixel = c.step * c.in_stride, tap_step = c.offset_step * c.in_stride;
        vf acc[M][1];
        const vf first = bias_vector(finish.bias, lanes);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) acc[m][0] = first;
        for (int64_t i = 0; i < a.taps; ++i) {
            const int64_t di = d + i * a.offset_step;
            if (!inside(di, a.in_size)) continue;
            for (int64_t j = 0; j < b.taps; ++j) {
                const int64_t hj = h + j * b.offset_step;
                if (!inside(hj, b.in_size)) continue;
                const T* x = image + di * a.in_stride + hj * b.in_stride + channel +
                             (in_position(c, column, 0))*c.in_stride + from * tap_step;
                const int64_t tap = ((a.tap + i * a.tap_step) * b.kernel + b.tap + j * b.tap_step) * c.kernel + c.tap;
                const float* w = packed + (tap + from * c.tap_step) * width;
                for (int64_t k = from; k < to; ++k) {
                    const vf weight = load(w);
#pragma GCC unroll 16
                    for (int m = 0; m < M; ++m)
                        acc[m][0] += weight * (Partial ? load_partial(x + m * pixel, lanes) : load(x + m * pixel));
                    x += tap_step;
                    w += c.tap_step * width;
                }
            }
        }
        finish_tile(acc, finish);
    }

    template <int M>
    void channels(int64_t column, int64_t from, int64_t to) const {
        for (int64_t channel = 0; channel < p.groups; channel += kWidth) {
            const int lanes = static_cast<int>(min64(kWidth, p.groups - channel));
            lanes < kWidth ? tile<M, true>(column, from, to, channel, lanes)
                           : tile<M, false>(column, from, to, channel, lanes);
        }
    }

    // The taps that pixel `column` sees: they are neighbours, whichever way the taps run.
    void visible(int64_t column, int64_t* from, int64_t* to) const {
        const Axis& c = p.axis[2];
        *from = 0;
        while (*from < c.taps && !inside(in_position(c, column, *from), c.in_size)) ++*from;
        *to = *from;
        while (*to < c.taps && inside(in_position(c, column, *to), c.in_size)) ++*to;
    }

    template <int M>
    void whole_tile(int64_t column) const {
        const Axis& c = p.axis[2];
        if (c.step == 1 && c.offset_step == 1 && c.tap_step == 1 && c.taps == c.kernel) {
            if (c.taps == 3) return slide_channels<M, 3>(column);
            if (c.taps == 5) return slide_channels<M, 5>(column);
            if (c.taps == 7) return slide_channels<M, 7>(column);
        }
        channels<M>(column, 0, c.taps);
    }

    // Pixels [begin, end), all of which see every tap. The last tile reaches back over pixels that are done: computing
    // them twice costs less than pixels one by one.
    template <int M>
    void whole_tiles(int64_t begin, int64_t end) const {
        for (int64_t column = begin; column < end; column += M) whole_tile<M>(min64(column, end - M));
    }

    void run() const {
        const Axis& c = p.axis[2];
        int64_t low, high, low_last, high_last;
        valid_range(c, 0, &low, &high);
        valid_range(c, max64(0, c.taps - 1), &low_last, &high_last);
        const int64_t column = min64(max64(low, low_last), c.out_size);
        const int64_t end = max64(column, min64(high, high_last));
        single_pixels(0, column);
        if (end - column >= kDepthwisePixels)
            whole_tiles<kDepthwisePixels>(column, end);
        else if (end - column >= 4)
            whole_tiles<4>(column, end);
        else
            single_pixels(column, end);
        single_pixels(end, c.out_size);
    }

    void single_pixels(int64_t begin, int64_t end) const {
        for (int64_t column = begin; column < end; ++column) {
            int64_t from, to;
            visible(column, &from, &to);
            channels<1>(column, from, to);
        }
    }
};

void depthwise_run(const ConvParams& p, int64_t begin, int64_t end, void*) {
    for (int64_t item = begin; item < end; ++item)
        p.dtype == DType::float32 ? DepthwiseRow<float>(p, item).run() : DepthwiseRow<bf16>(p, item).run();
}

constexpr Algorithm kDepthwise = {"depthwise",    depthwise_unsupported, depthwise_packed_bytes,  depthwise_pack_items,
                                  depthwise_pack, depthwise_items,       depthwise_scratch_bytes, depthwise_run};

}  // namespace
}  // namespace weighted_conv
}  // namespace pdn
