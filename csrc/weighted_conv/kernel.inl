// The direct kernel: an implicit matrix product over channels_last memory. A tile of kTile output pixels times kBlock
// vectors of output channels stays in registers while all taps and input channels stream through it. Pixels are reached
// through pointers, so borders, strides and dilations cost nothing in the inner loop: a position outside the image
// points at a row of zeros.
#pragma once

#include "../core/epilogue.inl"
#include "../core/vec.h"
#include "params.h"

namespace pdn {
namespace weighted_conv {
namespace {

constexpr int kBlock = 2;                          // vectors of output channels per tile
constexpr int kTile = kWidth == 16 ? 14 : 6;       // pixels per tile: kTile * kBlock accumulators, rest for operands
constexpr int kLanes = kBlock * kWidth;            // output channels per full block
constexpr int64_t kTapsAtOnce = 64;                // taps whose weights are turned around at once, packing or unpacking
constexpr int64_t kPiece = 128;                    // steps per chain of additions
constexpr int64_t kWeightChunkBytes = 256 * 1024;  // weights that stream through L2 before the next tile reuses them

PDN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
PDN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
PDN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ------------------------------------------------------------------------------------------------ element types

// How one storage type enters the product: a step consumes kChannels input channels of every pixel.
struct Float32 {
    using T = float;
    static constexpr int kChannels = 1;
    static PDN_INLINE vf operand(const T* x) { return splat(*x); }
    static PDN_INLINE vf tail_operand(const T* x) { return splat(*x); }
    static PDN_INLINE vf weights(const T* w) { return load(w); }
    static PDN_INLINE vf accumulate(vf acc, vf x, vf w) { return acc + x * w; }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
    using T = bf16;
    static constexpr int kChannels = 2;
    static PDN_INLINE vf operand(const T* x) {
        int32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        return (vf)_mm512_set1_epi32(pair);
    }
    static PDN_INLINE vf tail_operand(const T* x) { return (vf)_mm512_set1_epi32(static_cast<int32_t>(*x)); }
    static PDN_INLINE vf weights(const T* w) { return (vf)_mm512_loadu_si512(w); }
    static PDN_INLINE vf accumulate(vf acc, vf x, vf w) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));  // the intrinsic makes GCC 12 copy accumulators
        return acc;
    }
};
#endif

// ------------------------------------------------------------------------------------------------ register tile

// Where the output pixels of a tile lie, and what is done to the sums on the way there.
template <class T>
struct Finish {
    const T* bias;  // of this block, or null
    int activation;
    int lanes;  // valid output channels
    T* output;
    int64_t out_stride;
    const T* residual;  // or null
    int64_t residual_stride;
};

// The output pixel (n, row, column) of `p`, channels from `channel`.
template <class T>
PDN_INLINE Finish<T> finish_at(const ConvParams& p, int64_t n, int64_t row, int64_t column, int64_t channel,
                               int lanes) {
    const Axis &a = p.axis[0], &b = p.axis[1], &c = p.axis[2];
    const int64_t od = row / b.out_size, oh = row % b.out_size;
    Finish<T> f;
    f.bias = p.bias ? static_cast<const T*>(p.bias) + channel : nullptr;
    f.activation = static_cast<int>(p.activation);
    f.lanes = lanes;
    f.output = static_cast<T*>(p.output) + n * p.out_batch_stride + od * a.out_stride + oh * b.out_stride +
               column * c.out_stride + channel;
    f.out_stride = c.out_stride;
    f.residual = p.residual ? static_cast<const T*>(p.residual) + n * p.residual_batch_stride + od * a.residual_stride +
                                  oh * b.residual_stride + column * c.residual_stride + channel
                            : nullptr;
    f.residual_stride = c.residual_stride;
    return f;
}

// The same `columns` pixels and `channels` channels further on.
template <class T>
PDN_INLINE Finish<T> moved(Finish<T> f, int64_t columns, int64_t channels, int lanes) {
    if (f.bias) f.bias += channels;
    if (f.residual) f.residual += columns * f.residual_stride + channels;
    f.output += columns * f.out_stride + channels;
    f.lanes = lanes;
    return f;
}

// A stretch of input channels that every pixel of a tile multiplies with the same weights: one tap, or a whole row of
// taps where neighbouring pixels lie next to each other in memory.
template <class E>
struct Stretch {
    using T = typename E::T;
    const T* first;    // of pixel 0; the others follow at pixel_stride. Null: the pixels have pointers of their own
    const T* weights;  // [steps][N * kWidth * kChannels]
    int64_t channels;
};

// What a tile needs to know.
template <class E>
struct TileTask {
    using T = typename E::T;
    const Stretch<E>* stretches;
    const T* const* pixels;  // kTile pointers per stretch
    int count;               // of stretches
    int64_t pixel_stride;
    const float* start;  // accumulators of the chunk before, [M][N * kWidth], or null: start from the bias
    float* stop;         // where to leave the accumulators, or null: finish the output
    Finish<T> finish;
};

template <class E, int M, int N>
PDN_INLINE void step(vf (&acc)[M][N], const typename E::T* const (&x)[M], int64_t c, const typename E::T* w,
                     bool tail) {
    vf b[N];
    for (int j = 0; j < N; ++j) b[j] = E::weights(w + j * kWidth * E::kChannels);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
        const vf a = tail ? E::tail_operand(x[m] + c) : E::operand(x[m] + c);
        for (int j = 0; j < N; ++j) acc[m][j] = E::accumulate(acc[m][j], a, b[j]);
    }
}

template <class T>
PDN_INLINE void finish_vector(vf acc, const T* residual, T* output, int lanes) {
    if (lanes >= kWidth) {
        store(output, residual ? acc + load(residual) : acc);
    } else if (lanes > 0) {
        store_partial(output, residual ? acc + load_partial(residual, lanes) : acc, lanes);
    }
}

// The rare ends of a tile, out of line so that not every tile carries their code: activations that are more than a
// comparison, and outputs that do not fill their vectors.
template <class T>
__attribute__((noinline)) void finish_values(float* values, int pixels, int vectors, const Finish<T>& f) {
    for (int m = 0; m < pixels; ++m)
        for (int j = 0; j < vectors; ++j) {
            const vf value = activate(load(values + (m * vectors + j) * kWidth), f.activation);
            finish_vector(value, f.residual ? f.residual + m * f.residual_stride + j * kWidth : nullptr,
                          f.output + m * f.out_stride + j * kWidth, f.lanes - j * kWidth);
        }
}

template <class T>
PDN_INLINE vf bias_vector(const T* bias, int lanes) {
    if (bias == nullptr || lanes <= 0) return vf{};
    return lanes >= kWidth ? load(bias) : load_partial(bias, lanes);
}

template <class T, int M, int N>
PDN_INLINE void finish_tile(vf (&acc)[M][N], const Finish<T>& f) {
    const bool relu_only = f.activation == static_cast<int>(Activation::relu);
    if (f.lanes < N * kWidth || (!relu_only && f.activation != static_cast<int>(Activation::none))) {
        float values[M * N * kWidth];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < N; ++j) store(values + (m * N + j) * kWidth, acc[m][j]);
        return finish_values(values, M, N, f);
    }
    if (relu_only) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < N; ++j) acc[m][j] = relu(acc[m][j]);
    }
    if (f.residual) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < N; ++j) acc[m][j] += load(f.residual + m * f.residual_stride + j * kWidth);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < N; ++j) store(f.output + m * f.out_stride + j * kWidth, acc[m][j]);
}

template <class E, int M, int N>
void tile(const TileTask<E>& t) {
    using T = typename E::T;
    vf acc[M][N];
    for (int j = 0; j < N; ++j) {
        const vf first =
            t.start ? vf{}
                    : bias_vector(t.finish.bias ? t.finish.bias + j * kWidth : nullptr, t.finish.lanes - j * kWidth);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) acc[m][j] = t.start ? load(t.start + (m * N + j) * kWidth) : first;
    }
    // Sums are added up in pieces of about kPiece steps: one chain of thousands of additions would lose digits.
    float total[M * N * kWidth];
    int64_t chain = 0;
    bool pieces = false;
    for (int i = 0; i < t.count; ++i) {
        const Stretch<E>& stretch = t.stretches[i];
        const T* x[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) x[m] = stretch.first ? stretch.first + m * t.pixel_stride : t.pixels[i * kTile + m];
        const T* w = stretch.weights;
        for (int64_t from = 0; from < stretch.channels; from += kPiece * E::kChannels) {
            const int64_t to = min64(stretch.channels, from + kPiece * E::kChannels);
            const int64_t whole = from + (to - from) / E::kChannels * E::kChannels;
            for (int64_t c = from; c < whole; c += E::kChannels) {
                step<E, M, N>(acc, x, c, w, false);
                w += N * kWidth * E::kChannels;
            }
            if (whole < to) {
                step<E, M, N>(acc, x, whole, w, true);
                w += N * kWidth * E::kChannels;
            }
            chain += (to - from) / E::kChannels;
            if (chain < kPiece) continue;
            chain = 0;
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m)
                for (int j = 0; j < N; ++j) {
                    float* sum = total + (m * N + j) * kWidth;
                    store(sum, pieces ? load(sum) + acc[m][j] : acc[m][j]);
                    acc[m][j] = vf{};
                }
            pieces = true;
        }
    }
    if (pieces) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < N; ++j) acc[m][j] += load(total + (m * N + j) * kWidth);
    }
    if (t.stop) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < N; ++j) store(t.stop + (m * N + j) * kWidth, acc[m][j]);
        return;
    }
    finish_tile(acc, t.finish);
}

template <class E, int M>
PDN_INLINE void tile_of(const TileTask<E>& t) {
    t.finish.lanes > kWidth ? tile<E, M, 2>(t) : tile<E, M, 1>(t);
}

template <class E>
void run_tile(const TileTask<E>& t, int pixels) {
    switch (pixels) {
        case 1:
            return tile_of<E, 1>(t);
        case 2:
            return tile_of<E, 2>(t);
        case 3:
            return tile_of<E, 3>(t);
        case 4:
            return tile_of<E, 4>(t);
        case 5:
            return tile_of<E, 5>(t);
        case 6:
            return tile_of<E, 6>(t);
#if defined(__AVX512F__)
        case 7:
            return tile_of<E, 7>(t);
        case 8:
            return tile_of<E, 8>(t);
        case 9:
            return tile_of<E, 9>(t);
        case 10:
            return tile_of<E, 10>(t);
        case 11:
            return tile_of<E, 11>(t);
        case 12:
            return tile_of<E, 12>(t);
        case 13:
            return tile_of<E, 13>(t);
        case 14:
            return tile_of<E, 14>(t);
#endif
    }
}

// ------------------------------------------------------------------------------------------------ packed weights

// [group][block of output channels][tap of the whole kernel][steps][block width][channels per step]: full blocks are
// kLanes wide, the last one kWidth if no more lanes are needed.
template <class E>
struct Packing {
    int64_t channels, steps, taps, blocks, group_elements;

    explicit Packing(const ConvParams& p) {
        channels = p.in_channels;
        steps = ceil_div(channels, E::kChannels);
        taps = p.axis[0].kernel * p.axis[1].kernel * p.axis[2].kernel;
        blocks = ceil_div(p.out_channels, kLanes);
        const int64_t last = p.out_channels - (blocks - 1) * kLanes;
        const int64_t widths = (blocks - 1) * kLanes + (last > kWidth ? kLanes : kWidth);
        group_elements = widths * taps * steps * E::kChannels;
    }

    int64_t tap_elements(int width) const { return steps * width * E::kChannels; }
    int64_t block_offset(int64_t group, int64_t block) const {
        return group * group_elements + block * taps * tap_elements(kLanes);
    }
};

PDN_INLINE int block_width(const ConvParams& p, int64_t block) {
    return p.out_channels - block * kLanes > kWidth ? kLanes : kWidth;
}

PDN_INLINE float widen(float x) { return x; }
PDN_INLINE float widen(bf16 x) { return from_bf16(x); }
PDN_INLINE void narrow(float x, float* out) { *out = x; }
PDN_INLINE void narrow(float x, bf16* out) { *out = to_bf16(x); }

template <class E>
int64_t packed_bytes(const ConvParams& p) {
    return p.groups * Packing<E>(p).group_elements * static_cast<int64_t>(sizeof(typename E::T));
}

template <class E>
int64_t pack_items(const ConvParams& p) {
    return p.groups * Packing<E>(p).blocks;
}

// One step of one block: channels [c, c + kChannels) of `lanes` outputs for taps [from, to), as rows [tap -
// from][width][kChannels].
template <class E>
void pack_step(const ConvParams& p, const WeightView& view, const typename E::T* w, int64_t c, int64_t lanes,
               int64_t from, int64_t to, int width, typename E::T* rows) {
    using T = typename E::T;
    const T* density = static_cast<const T*>(view.density);
    const int64_t row = static_cast<int64_t>(width) * E::kChannels;
    for (int64_t o = 0; o < width; ++o) {
        for (int64_t i = 0; i < E::kChannels; ++i) {
            T* at = rows + o * E::kChannels + i;
            const T* read = w + o * view.out_stride + (c + i) * view.in_stride;
            const bool exists = o < lanes && c + i < p.in_channels;
            for (int64_t tap = from; tap < to; ++tap, at += row) {
                if (!exists)
                    *at = T(0);
                else if (density == nullptr)
                    *at = read[tap * view.tap_stride];
                else
                    narrow(widen(read[tap * view.tap_stride]) * widen(density[tap * view.tap_stride]), at);
            }
        }
    }
}

template <class E>
void pack(const ConvParams& p, const WeightView& view, void* packed, int64_t begin, int64_t end) {
    using T = typename E::T;
    const Packing<E> layout(p);
    T rows[kTapsAtOnce * kLanes * E::kChannels];  // taps lie far apart in the packed weights: collect whole rows first
    for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item / layout.blocks, block = item % layout.blocks;
        const int width = block_width(p, block);
        const int64_t lanes = min64(width, p.out_channels - block * kLanes);
        const T* w = static_cast<const T*>(view.weight) + group * view.group_stride + block * kLanes * view.out_stride;
        T* out = static_cast<T*>(packed) + layout.block_offset(group, block);
        const int64_t row = static_cast<int64_t>(width) * E::kChannels;
        for (int64_t from = 0; from < layout.taps; from += kTapsAtOnce) {
            const int64_t to = min64(layout.taps, from + kTapsAtOnce);
            for (int64_t s = 0; s < layout.steps; ++s) {
                pack_step<E>(p, view, w, s * E::kChannels, lanes, from, to, width, rows);
                for (int64_t tap = from; tap < to; ++tap)
                    std::memcpy(out + tap * layout.tap_elements(width) + s * row, rows + (tap - from) * row,
                                static_cast<size_t>(row) * sizeof(T));
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------ rows and tiles

// Output pixels are walked in runs: whole rows where a row fills tiles, several rows together where it does not. A work
// item is one run of one block of output channels. Blocks come first where the weights are larger than the image, so
// that what is larger is read once.
struct Runs {
    int64_t rows, rows_per_run, per_image, blocks;
    bool blocks_first;

    explicit Runs(const ConvParams& p) {
        rows = p.axis[0].out_size * p.axis[1].out_size;
        const int64_t width = max64(p.axis[2].out_size, 1);
        rows_per_run = width >= 4 * kTile ? 1 : min64(ceil_div(4 * kTile, width), max64(rows, 1));
        per_image = ceil_div(rows, rows_per_run);
        rows_per_run = ceil_div(rows, max64(per_image, 1));
        per_image = ceil_div(rows, max64(rows_per_run, 1));
        blocks = p.groups * ceil_div(p.out_channels, kLanes);
        const int64_t taps = p.axis[0].taps * p.axis[1].taps * p.axis[2].taps;
        const int64_t image = p.axis[0].in_size * p.axis[1].in_size * p.axis[2].in_size;
        blocks_first = taps * p.out_channels > image;
    }
};

template <class E>
int64_t direct_items(const ConvParams& p) {
    const Runs runs(p);
    return p.batch * runs.per_image * runs.blocks;
}

// Scratch: a row of zeros, the stretches and pixel pointers of one tile, and the accumulators of one run.
template <class E>
struct Scratch {
    using T = typename E::T;
    int64_t taps, zero_bytes, pixel_bytes, stretch_bytes, run_pixels;

    explicit Scratch(const ConvParams& p) {
        taps = p.axis[0].taps * p.axis[1].taps * p.axis[2].taps;
        zero_bytes = ceil_div((p.in_channels + 1) * static_cast<int64_t>(sizeof(T)), 64) * 64;
        pixel_bytes = ceil_div(taps * kTile * 8, 64) * 64;
        stretch_bytes = ceil_div(taps * static_cast<int64_t>(sizeof(Stretch<E>)), 64) * 64;
        run_pixels = Runs(p).rows_per_run * p.axis[2].out_size;
    }

    int64_t bytes() const { return zero_bytes + pixel_bytes + stretch_bytes + run_pixels * kLanes * 4; }
};

template <class E>
int64_t direct_scratch(const ConvParams& p) {
    return Scratch<E>(p).bytes();
}

PDN_INLINE int64_t in_position(const Axis& a, int64_t out, int64_t tap) {
    return out * a.step + a.offset + tap * a.offset_step;
}
PDN_INLINE bool inside(int64_t position, int64_t size) {
    return static_cast<uint64_t>(position) < static_cast<uint64_t>(size);
}

// First and one-past-last output position whose input position for tap t lies inside the image.
PDN_INLINE void valid_range(const Axis& a, int64_t t, int64_t* low, int64_t* high) {
    const int64_t at = a.offset + t * a.offset_step;
    *low = at >= 0 ? 0 : ceil_div(-at, a.step);
    *high = min64(a.out_size, at >= a.in_size ? 0 : (a.in_size - 1 - at) / a.step + 1);
}

template <class E>
struct DirectRun {
    using T = typename E::T;
    const ConvParams& p;
    const Packing<E> layout;
    const Scratch<E> sizes;
    T* zeros;
    const T** pixels;
    Stretch<E>* stretches;
    float* accumulators;
    bool rows_adjoin;  // taps of one row read adjoining memory, with weights in the same order

    DirectRun(const ConvParams& params, void* scratch) : p(params), layout(params), sizes(params) {
        char* at = static_cast<char*>(scratch);
        zeros = reinterpret_cast<T*>(at);
        std::memset(at, 0, static_cast<size_t>(sizes.zero_bytes));
        at += sizes.zero_bytes;
        pixels = reinterpret_cast<const T**>(at);
        at += sizes.pixel_bytes;
        stretches = reinterpret_cast<Stretch<E>*>(at);
        at += sizes.stretch_bytes;
        accumulators = reinterpret_cast<float*>(at);
        const Axis& c = p.axis[2];
        rows_adjoin =
            c.offset_step * c.in_stride == p.in_channels && c.tap_step == 1 && p.in_channels % E::kChannels == 0;
    }

    // The stretches that `count` pixels of one output row, from `column`, read for the outer taps [from, to). Taps that
    // no pixel sees are left out; where some pixels see a tap and others do not, those read zeros. Returns how many.
    int gather(const T* image, int64_t row, int64_t column, int count, int64_t from, int64_t to, const T* block,
               int width) {
        const Axis &a = p.axis[0], &b = p.axis[1], &c = p.axis[2];
        const int64_t tap_elements = layout.tap_elements(width);
        const int64_t d = row / b.out_size * a.step + a.offset, h = row % b.out_size * b.step + b.offset;
        const int64_t first = column * c.step + c.offset, last = first + (count - 1) * c.step;
        const int64_t reach = (c.taps - 1) * c.offset_step;
        const bool all_inside = inside(first, c.in_size) && inside(last, c.in_size) &&
                                inside(first + reach, c.in_size) && inside(last + reach, c.in_size);
        int used = 0;
        for (int64_t outer = from; outer < to; ++outer) {
            const int64_t i = outer / b.taps, j = outer % b.taps;
            const int64_t di = d + i * a.offset_step, hj = h + j * b.offset_step;
            if (!inside(di, a.in_size) || !inside(hj, b.in_size)) continue;
            const T* in_row = image + di * a.in_stride + hj * b.in_stride;
            const int64_t tap = ((a.tap + i * a.tap_step) * b.kernel + b.tap + j * b.tap_step) * c.kernel + c.tap;
            const T* weights = block + tap * tap_elements;
            if (all_inside && rows_adjoin) {
                stretches[used++] = {in_row + first * c.in_stride, weights, c.taps * p.in_channels};
                continue;
            }
            for (int64_t k = 0; k < c.taps; ++k) {
                const int64_t at = first + k * c.offset_step, to_last = last + k * c.offset_step;
                Stretch<E>& stretch = stretches[used];
                stretch = {nullptr, weights + k * c.tap_step * tap_elements, p.in_channels};
                if (inside(at, c.in_size) && inside(to_last, c.in_size)) {
                    stretch.first = in_row + at * c.in_stride;
                    ++used;
                    continue;
                }
                bool any = false;
                for (int m = 0; m < count; ++m) {
                    const int64_t w = at + m * c.step;
                    const bool ok = inside(w, c.in_size);
                    pixels[used * kTile + m] = ok ? in_row + w * c.in_stride : zeros;
                    any |= ok;
                }
                used += any;
            }
        }
        return used;
    }

    void block_of_run(int64_t n, int64_t group, int64_t block, int64_t row0, int64_t run_pixels) {
        const Axis &a = p.axis[0], &b = p.axis[1], &c = p.axis[2];
        const int width = block_width(p, block);
        const int64_t channel = group * p.out_channels + block * kLanes;
        const T* packed = static_cast<const T*>(p.packed) + layout.block_offset(group, block);
        const T* image = static_cast<const T*>(p.input) + n * p.in_batch_stride + group * p.in_channels;
        TileTask<E> task;
        task.stretches = stretches;
        task.pixels = pixels;
        task.pixel_stride = c.step * c.in_stride;
        const int lanes = static_cast<int>(min64(kLanes, p.out_channels - block * kLanes));
        const int64_t outer_taps = a.taps * b.taps;
        const int64_t outer_bytes = max64(1, c.taps * layout.tap_elements(width) * static_cast<int64_t>(sizeof(T)));
        const int64_t per_chunk = max64(1, kWeightChunkBytes / outer_bytes);
        for (int64_t from = 0; from == 0 || from < outer_taps; from += per_chunk) {
            const int64_t to = min64(outer_taps, from + per_chunk);
            for (int64_t first = 0; first < run_pixels;) {
                // tiles never straddle rows: outputs of one tile are equally spaced
                const int64_t row = row0 + first / c.out_size, column = first % c.out_size;
                const int64_t left = c.out_size - column;
                const int64_t tiles = ceil_div(left, kTile);
                const int count = static_cast<int>(ceil_div(left, tiles));
                task.count = gather(image, row, column, count, from, to, packed, width);
                float* saved = accumulators + first * width;
                task.start = from == 0 ? nullptr : saved;
                task.stop = to >= outer_taps ? nullptr : saved;
                task.finish = finish_at<T>(p, n, row, column, channel, lanes);
                run_tile<E>(task, count);
                first += count;
            }
        }
    }
};

template <class E>
void direct_run(const ConvParams& p, int64_t begin, int64_t end, void* scratch) {
    const Runs runs(p);
    DirectRun<E> run(p, scratch);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t n = item / (runs.per_image * runs.blocks), rest = item % (runs.per_image * runs.blocks);
        const int64_t block = runs.blocks_first ? rest / runs.per_image : rest % runs.blocks;
        const int64_t row0 = (runs.blocks_first ? rest % runs.per_image : rest / runs.blocks) * runs.rows_per_run;
        const int64_t rows = min64(runs.rows_per_run, runs.rows - row0);
        run.block_of_run(n, block / run.layout.blocks, block % run.layout.blocks, row0, rows * p.axis[2].out_size);
    }
}

const char* direct_f32_unsupported(const ConvParams& p) {
    return p.dtype == DType::float32 ? nullptr : "the float32 kernel takes float32 only";
}

constexpr Algorithm kDirectF32 = {"direct",      direct_f32_unsupported, packed_bytes<Float32>,   pack_items<Float32>,
                                  pack<Float32>, direct_items<Float32>,  direct_scratch<Float32>, direct_run<Float32>};

#if defined(__AVX512BF16__)
const char* direct_bf16_unsupported(const ConvParams& p) {
    return p.dtype == DType::bfloat16 ? nullptr : "the bfloat16 kernel takes bfloat16 only";
}

constexpr Algorithm kDirectBF16 = {
    "direct_bf16",  direct_bf16_unsupported, packed_bytes<BFloat16>,   pack_items<BFloat16>,
    pack<BFloat16>, direct_items<BFloat16>,  direct_scratch<BFloat16>, direct_run<BFloat16>};
#endif

}  // namespace
}  // namespace weighted_conv
}  // namespace pdn
