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
int64_t depthwise_scratch_bytes(const ConvParams& p) { return depthwise_width(p) * 4; }  // the bias, float32, padded

// What happens to the sums of a tile, decided once per row: a branch in every tile would send them through memory.
enum class TileEnd { plain, relu, any };

// What all pixels of one output row share.
template <class T>
struct DepthwiseRow {
    const ConvParams& p;
    int64_t n, row, d, h;  // output row, and the input row of tap 0
    const T* image;
    int64_t width;
    const float* bias;
    Finish<T> start;
    TileEnd ending;

    DepthwiseRow(const ConvParams& params, int64_t item, const float* padded_bias) : p(params), bias(padded_bias) {
        const Axis &a = p.axis[0], &b = p.axis[1];
        const int64_t rows = a.out_size * b.out_size;
        n = item / rows;
        row = item % rows;
        d = in_position(a, row / b.out_size, 0);
        h = in_position(b, row % b.out_size, 0);
        image = static_cast<const T*>(p.input) + n * p.in_batch_stride;
        width = depthwise_width(p);
        start = finish_at<T>(p, n, row, 0, 0, 0);
        ending = p.residual                         ? TileEnd::any
                 : p.activation == Activation::none ? TileEnd::plain
                 : p.activation == Activation::relu ? TileEnd::relu
                                                    : TileEnd::any;
    }

    template <int M, TileEnd E>
    PDN_INLINE void leave(vf (&acc)[M], int64_t column, int64_t channel, int lanes) const {
        const Finish<T> f = moved(start, column, channel, lanes);
        if (E == TileEnd::any) {
            float values[M * kWidth];
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) store(values + m * kWidth, acc[m]);
            return finish_values(values, M, 1, f);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) store(f.output + m * f.out_stride, E == TileEnd::relu ? relu(acc[m]) : acc[m]);
    }

    // M neighbouring pixels that see all K taps of a row, stride and dilation 1: every input vector is loaded once a
    // row. Pixels lie a whole cache line or more apart, which the processor's own prefetch does not follow: the next
    // tile's part of the lowest row, the one that no earlier row has read, is asked for by hand.
    template <int M, int K, bool Partial, TileEnd E>
    void slide(int64_t column, int64_t channel, int lanes) const {
        const Axis &a = p.axis[0], &b = p.axis[1], &c = p.axis[2];
        const float* packed = static_cast<const float*>(p.packed) + channel;
        vf acc[M];
        const vf first = load(bias + channel);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) acc[m] = first;
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
                for (int at = 0; at < M + K - 1; ++at, x += c.in_stride) {
                    if (at < M && j == b.taps - 1) __builtin_prefetch(x + (M + K - 1) * c.in_stride);
                    const vf value = Partial ? load_partial(x, lanes) : load(x);
#pragma GCC unroll 8
                    for (int k = 0; k < K; ++k)
                        if (at - k >= 0 && at - k < M) acc[at - k] += value * weights[k];
                }
            }
        }
        if (K == 3) {  // little work per output: the lines to be written hold it up as well
            const T* next = start.output + (column + M) * start.out_stride + channel;
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m, next += start.out_stride) __builtin_prefetch(next, 1);
        }
        leave<M, E>(acc, column, channel, lanes);
    }

    template <int M, int K, TileEnd E>
    void slide_channels(int64_t column) const {
        int64_t channel = 0;
        for (; channel + kWidth <= p.groups; channel += kWidth) slide<M, K, false, E>(column, channel, kWidth);
        if (channel < p.groups) slide<M, K, true, TileEnd::any>(column, channel, static_cast<int>(p.groups - channel));
    }

    template <int M, int K>
    void slide_end(int64_t column) const {
        if (ending == TileEnd::plain) return slide_channels<M, K, TileEnd::plain>(column);
        ending == TileEnd::relu ? slide_channels<M, K, TileEnd::relu>(column)
                                : slide_channels<M, K, TileEnd::any>(column);
    }

    // M pixels from `column`; taps [from, to) of the innermost axis lie inside the image for all of them.
    template <int M, bool Partial, TileEnd E>
    void tile(int64_t column, int64_t from, int64_t to, int64_t channel, int lanes) const {
        const Axis &a = p.axis[0], &b = p.axis[1], &c = p.axis[2];
        const float* packed = static_cast<const float*>(p.packed) + channel;
        const int64_t pixel = c.step * c.in_stride, tap_step = c.offset_step * c.in_stride;
        vf acc[M];
        const vf first = load(bias + channel);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) acc[m] = first;
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
                        acc[m] += weight * (Partial ? load_partial(x + m * pixel, lanes) : load(x + m * pixel));
                    x += tap_step;
                    w += c.tap_step * width;
                }
            }
        }
        leave<M, E>(acc, column, channel, lanes);
    }

    template <int M, TileEnd E>
    void channels_as(int64_t column, int64_t from, int64_t to) const {
        int64_t channel = 0;
        for (; channel + kWidth <= p.groups; channel += kWidth) tile<M, false, E>(column, from, to, channel, kWidth);
        if (channel < p.groups)
            tile<M, true, TileEnd::any>(column, from, to, channel, static_cast<int>(p.groups - channel));
    }

    template <int M>
    void channels(int64_t column, int64_t from, int64_t to) const {
        if (ending == TileEnd::plain) return channels_as<M, TileEnd::plain>(column, from, to);
        ending == TileEnd::relu ? channels_as<M, TileEnd::relu>(column, from, to)
                                : channels_as<M, TileEnd::any>(column, from, to);
    }

    // The taps that pixel `column` sees: they are neighbours, whichever way the taps run.
    void visible(int64_t column, int64_t* from, int64_t* to) const {
        const Axis& c = p.axis[2];
        *from = 0;
        while (*from < c.taps && !inside(in_position(c, column, *from), c.in_size)) ++*from;
        *to = *from;
        while (*to < c.taps && inside(in_position(c, column, *to), c.in_size)) ++*to;
    }

    // Pixels [begin, end), all of which see every tap. The last tile reaches back over pixels that are done: computing
    // them twice costs less than pixels one by one.
    template <int M, int K>
    void slides(int64_t begin, int64_t end) const {
        for (int64_t column = begin; column < end; column += M) slide_end<M, K>(min64(column, end - M));
    }

    template <int M>
    void whole_tiles(int64_t begin, int64_t end) const {
        const Axis& c = p.axis[2];
        if (c.step == 1 && c.offset_step == 1 && c.tap_step == 1 && c.taps == c.kernel) {
            if (c.taps == 3) return slides<M, 3>(begin, end);
            if (c.taps == 5) return slides<M, 5>(begin, end);
            if (c.taps == 7) return slides<M, 7>(begin, end);
        }
        for (int64_t column = begin; column < end; column += M) channels<M>(min64(column, end - M), 0, c.taps);
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

template <class T>
void depthwise_run_as(const ConvParams& p, int64_t begin, int64_t end, float* bias) {
    const int64_t width = depthwise_width(p);
    for (int64_t g = 0; g < width; ++g)
        bias[g] = p.bias && g < p.groups ? widen(static_cast<const T*>(p.bias)[g]) : 0.f;
    for (int64_t item = begin; item < end; ++item) DepthwiseRow<T>(p, item, bias).run();
}

void depthwise_run(const ConvParams& p, int64_t begin, int64_t end, void* scratch) {
    float* bias = static_cast<float*>(scratch);
    p.dtype == DType::float32 ? depthwise_run_as<float>(p, begin, end, bias)
                              : depthwise_run_as<bf16>(p, begin, end, bias);
}

constexpr Algorithm kDepthwise = {"depthwise",    depthwise_unsupported, depthwise_packed_bytes,  depthwise_pack_items,
                                  depthwise_pack, depthwise_items,       depthwise_scratch_bytes, depthwise_run};

}  // namespace
}  // namespace weighted_conv
}  // namespace pdn
