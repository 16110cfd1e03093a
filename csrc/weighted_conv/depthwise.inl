// Depthwise convolution: channels fill the vectors, a few neighbouring pixels stay in registers while the taps go by.
#pragma once

#include "kernel.inl"

namespace pdn {
namespace weighted_conv {
namespace {

constexpr int kDepthwisePixels = 12;                 // of a tile under any kernel: sums in registers
constexpr int kPairPixels = 6;                       // of each of two rows at once
constexpr int kSlidePixels = kWidth == 16 ? 12 : 6;  // the same where the weights of a row are in registers too

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

// Stride and dilation 1, and `kernel` taps, all of them.
PDN_INLINE bool plain_axis(const Axis& a, int64_t kernel) {
    return a.step == 1 && a.offset_step == 1 && a.tap_step == 1 && a.taps == kernel && a.kernel == kernel;
}

// Under a 3x3 kernel two output rows are made at once: each input row is fetched for two of them, not three times.
PDN_INLINE int64_t depthwise_rows(const ConvParams& p) {
    const bool pair =
        kWidth == 16 && plain_axis(p.axis[1], 3) && plain_axis(p.axis[2], 3) && p.axis[2].out_size >= kPairPixels;
    return pair ? 2 : 1;
}

int64_t depthwise_items(const ConvParams& p) {
    return p.batch * p.axis[0].out_size * ceil_div(p.axis[1].out_size, depthwise_rows(p));
}
int64_t depthwise_scratch_bytes(const ConvParams& p) { return depthwise_width(p) * 4; }  // the bias, float32, padded

// What happens to the sums of a tile, decided once per row: a branch in every tile would send them through memory.
enum class TileEnd { plain, relu, any };

// What all pixels of one output row share.
template <class T>
struct DepthwiseRow {
    const ConvParams& p;
    int64_t n, row, d, h;  // output row (the first of `count`), and the input row of its tap 0
    int64_t count;
    const T* image;
    int64_t width;
    const float* bias;
    Finish<T> start;
    TileEnd ending;

    DepthwiseRow(const ConvParams& params, int64_t item, const float* padded_bias) : p(params), bias(padded_bias) {
        const Axis &a = p.axis[0], &b = p.axis[1];
        const int64_t step = depthwise_rows(p), groups = ceil_div(b.out_size, step);
        const int64_t od = item / groups % a.out_size, oh = item % groups * step;
        n = item / (groups * a.out_size);
        row = od * b.out_size + oh;
        count = min64(step, b.out_size - oh);
        d = in_position(a, od, 0);
        h = in_position(b, oh, 0);
        image = static_cast<const T*>(p.input) + n * p.in_batch_stride;
        width = depthwise_width(p);
        start = finish_at<T>(p, n, row, 0, 0, 0);
        ending = p.residual                         ? TileEnd::any
                 : p.activation == Activation::none ? TileEnd::plain
                 : p.activation == Activation::relu ? TileEnd::relu
                                                    : TileEnd::any;
    }

    template <int M, TileEnd E>
    PDN_INLINE void leave(vf (&acc)[M], int64_t column, int64_t channel, int lanes, int64_t below = 0) const {
        Finish<T> f = moved(start, column, channel, lanes);
        f.output += below * p.axis[1].out_stride;
        if (f.residual) f.residual += below * p.axis[1].residual_stride;
        if (E == TileEnd::any) {
            float values[M * kWidth];
#pragma GCC unroll 24
            for (int m = 0; m < M; ++m) store(values + m * kWidth, acc[m]);
            return finish_values(values, M, 1, f);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) store(f.output + m * f.out_stride, E == TileEnd::relu ? relu(acc[m]) : acc[m]);
    }

    // M neighbouring pixels under a kernel of K taps a row, stride and dilation 1: every input vector is loaded once a
    // row. Border: some taps fall outside the image. Pixels lie a whole cache line or more apart, which the processor's
    // own prefetch does not follow; where little work hides that, the next tile's part of the lowest row, the one that
    // no earlier row has read, and the lines to be written are asked for by hand.
    template <int M, int K, bool Border, bool Partial, TileEnd E>
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
                    if (Border && !inside(column + c.offset + at, c.in_size)) continue;
                    if (K == 3 && at < M && j == b.taps - 1) __builtin_prefetch(x + (M + K - 1) * c.in_stride);
                    const vf value = Partial ? load_partial(x, lanes) : load(x);
#pragma GCC unroll 8
                    for (int k = 0; k < K; ++k)
                        if (at - k >= 0 && at - k < M) acc[at - k] += value * weights[k];
                }
            }
        }
        if (K == 3) {
            const T* next = start.output + (column + M) * start.out_stride + channel;
#pragma GCC unroll 24
            for (int m = 0; m < M; ++m, next += start.out_stride) __builtin_prefetch(next, 1);
        }
        leave<M, E>(acc, column, channel, lanes);
    }

    // M neighbouring pixels of two rows under a 3x3 kernel, stride and dilation 1.
    template <int M, bool Border, bool Partial, TileEnd E>
    void slide_pair(int64_t column, int64_t channel, int lanes) const {
        const Axis &a = p.axis[0], &c = p.axis[2];
        vf acc[2][M];
        const vf first = load(bias + channel);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) acc[0][m] = acc[1][m] = first;
        for (int64_t i = 0; i < a.taps; ++i) {
            const int64_t di = d + i * a.offset_step;
            if (!inside(di, a.in_size)) continue;
            const float* w = static_cast<const float*>(p.packed) + channel + (a.tap + i * a.tap_step) * 9 * width;
            vf weights[9];
#pragma GCC unroll 9
            for (int k = 0; k < 9; ++k) weights[k] = load(w + k * width);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                if (!inside(h + r, p.axis[1].in_size)) continue;
                const T* x = image + di * a.in_stride + (h + r) * p.axis[1].in_stride + channel +
                             (column + c.offset) * c.in_stride;
#pragma GCC unroll 24
                for (int at = 0; at < M + 2; ++at, x += c.in_stride) {
                    if (Border && !inside(column + c.offset + at, c.in_size)) continue;
                    if (r >= 2 && at < M) __builtin_prefetch(x + (M + 2) * c.in_stride);
                    const vf value = Partial ? load_partial(x, lanes) : load(x);
#pragma GCC unroll 2
                    for (int q = 0; q < 2; ++q)
#pragma GCC unroll 3
                        for (int k = 0; k < 3; ++k)
                            if (r - q >= 0 && r - q < 3 && at - k >= 0 && at - k < M)
                                acc[q][at - k] += value * weights[(r - q) * 3 + k];
                }
            }
        }
        const T* next = start.output + (column + M) * start.out_stride + channel;
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m, next += start.out_stride) {
            __builtin_prefetch(next, 1);
            __builtin_prefetch(next + p.axis[1].out_stride, 1);
        }
        leave<M, E>(acc[0], column, channel, lanes);
        leave<M, E>(acc[1], column, channel, lanes, 1);
    }

    template <int M, bool Border, TileEnd E>
    void pair_channels(int64_t column) const {
        int64_t channel = 0;
        for (; channel + kWidth <= p.groups; channel += kWidth)
            slide_pair<M, Border, false, E>(column, channel, kWidth);
        if (channel < p.groups)
            slide_pair<M, true, true, TileEnd::any>(column, channel, static_cast<int>(p.groups - channel));
    }

    template <int M>
    void pairs() const {
        const int64_t size = p.axis[2].out_size;
        for (int64_t next = 0; next < size; next += M) {
            const int64_t column = min64(next, size - M);
            at_border<3>(column, M) ? pair_end<M, true>(column) : pair_end<M, false>(column);
        }
    }

    template <int M, bool Border>
    void pair_end(int64_t column) const {
        if (ending == TileEnd::plain) return pair_channels<M, Border, TileEnd::plain>(column);
        ending == TileEnd::relu ? pair_channels<M, Border, TileEnd::relu>(column)
                                : pair_channels<M, Border, TileEnd::any>(column);
    }

    template <int M, int K, bool Border, TileEnd E>
    void slide_channels(int64_t column) const {
        int64_t channel = 0;
        for (; channel + kWidth <= p.groups; channel += kWidth) slide<M, K, Border, false, E>(column, channel, kWidth);
        if (channel < p.groups)
            slide<M, K, true, true, TileEnd::any>(column, channel, static_cast<int>(p.groups - channel));
    }

    template <int M, int K, bool Border>
    void slide_end(int64_t column) const {
        if (ending == TileEnd::plain) return slide_channels<M, K, Border, TileEnd::plain>(column);
        ending == TileEnd::relu ? slide_channels<M, K, Border, TileEnd::relu>(column)
                                : slide_channels<M, K, Border, TileEnd::any>(column);
    }

    // M neighbouring pixels under any kernel.
    template <int M, bool Partial, TileEnd E>
    __attribute__((noinline)) void tile(int64_t column, int64_t channel, int lanes) const {
        const Axis &a = p.axis[0], &b = p.axis[1], &c = p.axis[2];
        const float* packed = static_cast<const float*>(p.packed) + channel;
        const int64_t pixel = c.step * c.in_stride, first = in_position(c, column, 0), reach = (M - 1) * c.step;
        vf acc[M];
        const vf sum = load(bias + channel);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) acc[m] = sum;
        for (int64_t i = 0; i < a.taps; ++i) {
            const int64_t di = d + i * a.offset_step;
            if (!inside(di, a.in_size)) continue;
            for (int64_t j = 0; j < b.taps; ++j) {
                const int64_t hj = h + j * b.offset_step;
                if (!inside(hj, b.in_size)) continue;
                const T* row_in = image + di * a.in_stride + hj * b.in_stride + channel;
                const int64_t outer = (a.tap + i * a.tap_step) * b.kernel + b.tap + j * b.tap_step;
                const float* w = packed + (outer * c.kernel + c.tap) * width;
                for (int64_t k = 0; k < c.taps; ++k, w += c.tap_step * width) {
                    const int64_t at = first + k * c.offset_step;
                    const vf weight = load(w);
                    const T* x = row_in + at * c.in_stride;
                    if (inside(at, c.in_size) && inside(at + reach, c.in_size)) {
#pragma GCC unroll 24
                        for (int m = 0; m < M; ++m, x += pixel)
                            acc[m] += weight * (Partial ? load_partial(x, lanes) : load(x));
                        continue;
                    }
                    if (at + reach < 0 || at >= c.in_size) continue;
#pragma GCC unroll 24
                    for (int m = 0; m < M; ++m, x += pixel)
                        if (inside(at + m * c.step, c.in_size))
                            acc[m] += weight * (Partial ? load_partial(x, lanes) : load(x));
                }
            }
        }
        leave<M, E>(acc, column, channel, lanes);
    }

    template <int M>
    void tile_end(int64_t column) const {
        int64_t channel = 0;
        for (; channel + kWidth <= p.groups; channel += kWidth)
            ending == TileEnd::plain ? tile<M, false, TileEnd::plain>(column, channel, kWidth)
                                     : tile<M, false, TileEnd::any>(column, channel, kWidth);
        if (channel < p.groups) tile<M, true, TileEnd::any>(column, channel, static_cast<int>(p.groups - channel));
    }

    template <int K>
    bool at_border(int64_t column, int64_t pixels) const {
        const int64_t first = column + p.axis[2].offset;
        return first < 0 || first + pixels + K - 2 >= p.axis[2].in_size;
    }

    // Tiles of M pixels; K taps a row, or 0: any kernel. The last tile reaches back over pixels that are done:
    // computing them twice costs less than pixels one by one.
    template <int M, int K>
    void tiles() const {
        const int64_t size = p.axis[2].out_size;
        for (int64_t next = 0; next < size; next += M) {
            const int64_t column = min64(next, size - M);
            if constexpr (K == 0)
                tile_end<M>(column);
            else
                at_border<K>(column, M) ? slide_end<M, K, true>(column) : slide_end<M, K, false>(column);
        }
    }

    void run() const {
        const Axis& c = p.axis[2];
        if constexpr (kWidth == 16) {
            if (count == 2) return pairs<kPairPixels>();
        }
        const bool dense = c.step == 1 && c.offset_step == 1 && c.tap_step == 1 && c.taps == c.kernel;
        if (dense && c.out_size >= kSlidePixels) {
            if (c.taps == 3) return tiles<kSlidePixels, 3>();
            if (c.taps == 5) return tiles<kSlidePixels, 5>();
            if (c.taps == 7) return tiles<kSlidePixels, 7>();
        }
        if (c.out_size >= kDepthwisePixels) return tiles<kDepthwisePixels, 0>();
        c.out_size >= 4 ? tiles<4, 0>() : tiles<1, 0>();
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
