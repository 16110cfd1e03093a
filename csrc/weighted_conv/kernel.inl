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

constexpr int kBlock = 2;                         // vectors of output channels per tile
constexpr int kTile = kWidth == 16 ? 14 : 6;      // pixels per tile: kTile * kBlock accumulators, rest for operands
constexpr int kLanes = kBlock * kWidth;           // output channels per full block
constexpr int64_t kPiece = 192;                    // steps per chain of additions
constexpr int64_t kWeightChunkBytes = 96 * 1024;  // weights that stream through L2 before the next tile reuses them

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
    static PDN_INLINE void accumulate(vf& acc, vf x, vf w) { acc += x * w; }
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
    static PDN_INLINE void accumulate(vf& acc, vf x, vf w) { asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w)); }
};
#endif

// ------------------------------------------------------------------------------------------------ register tile

// What a tile needs to know; `pixels` holds kTile pointers per tap.
template <class E>
struct TileTask {
    using T = typename E::T;
    const T* const* pixels;
    const T* const* weights;  // per tap: [steps][N * kWidth * kChannels]
    int taps;
    int64_t channels;
    const float* start;  // accumulators of the chunk before, [M][N * kWidth], or null: start from the bias
    float* stop;         // where to leave the accumulators, or null: finish the output
    const T* bias;       // of this block, or null
    int activation;
    int lanes;  // valid output channels
    T* output;
    int64_t out_stride;
    const T* residual;
    int64_t residual_stride;
};

template <class E, int M, int N>
PDN_INLINE void step(vf (&acc)[M][N], const typename E::T* const (&x)[M], int64_t c, const typename E::T* w, bool tail) {
    vf b[N];
    for (int j = 0; j < N; ++j) b[j] = E::weights(w + j * kWidth * E::kChannels);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
        const vf a = tail ? E::tail_operand(x[m] + c) : E::operand(x[m] + c);
        for (int j = 0; j < N; ++j) E::accumulate(acc[m][j], a, b[j]);
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

// The activations that are not a comparison: out of line, so that every tile does not carry their code.
__attribute__((noinline)) void activate_all(float* values, int vectors, int activation) {
    for (int i = 0; i < vectors; ++i) store(values + i * kWidth, activate(load(values + i * kWidth), activation));
}

template <class T>
PDN_INLINE vf bias_vector(const T* bias, int lanes) {
    if (bias == nullptr || lanes <= 0) return vf{};
    return lanes >= kWidth ? load(bias) : load_partial(bias, lanes);
}

template <class E, int M, int N>
void tile(const TileTask<E>& t) {
    using T = typename E::T;
    vf acc[M][N];
    for (int j = 0; j < N; ++j) {
        const vf first = t.start ? vf{} : bias_vector(t.bias ? t.bias + j * kWidth : nullptr, t.lanes - j * kWidth);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) acc[m][j] = t.start ? load(t.start + (m * N + j) * kWidth) : first;
    }
    // Sums are added up in pieces of about kPiece steps: one chain of thousands of additions would lose digits.
    float total[M * N * kWidth];
    int64_t chain = 0;
    bool pieces = false;
    for (int tap = 0; tap < t.taps; ++tap) {
        const T* x[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) x[m] = t.pixels[tap * kTile + m];
        const T* w = t.weights[tap];
        for (int64_t from = 0; from < t.channels; from += kPiece * E::kChannels) {
            const int64_t to = min64(t.channels, from + kPiece * E::kChannels);
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
    const bool relu_only = t.activation == static_cast<int>(Activation::relu);
    if (relu_only || t.activation == static_cast<int>(Activation::none)) {
        const vf floor = splat(relu_only ? 0.f : -__builtin_inff());
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < N; ++j) acc[m][j] = select(acc[m][j] < floor, floor, acc[m][j]);
    } else {
        float values[M * N * kWidth];
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < N; ++j) store(values + (m * N + j) * kWidth, acc[m][j]);
        activate_all(values, M * N, t.activation);
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < N; ++j) acc[m][j] = load(values + (m * N + j) * kWidth);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < N; ++j)
            finish_vector(acc[m][j], t.residual ? t.residual + m * t.residual_stride + j * kWidth : nullptr,
                          t.output + m * t.out_stride + j * kWidth, t.lanes - j * kWidth);
}

template <class E, int M>
PDN_INLINE void tile_of(const TileTask<E>& t) {
    t.lanes > kWidth ? tile<E, M, 2>(t) : tile<E, M, 1>(t);
}

template <class E>
void run_tile(const TileTask<E>& t, int pixels) {
    switch (pixels) {
        case 1: return tile_of<E, 1>(t);
        case 2: return tile_of<E, 2>(t);
        case 3: return tile_of<E, 3>(t);
        case 4: return tile_of<E, 4>(t);
        case 5: return tile_of<E, 5>(t);
        case 6: return tile_of<E, 6>(t);
#if defined(__AVX512F__)
        case 7: return tile_of<E, 7>(t);
        case 8: return tile_of<E, 8>(t);
        case 9: return tile_of<E, 9>(t);
        case 10: return tile_of<E, 10>(t);
        case 11: return tile_of<E, 11>(t);
        case 12: return tile_of<E, 12>(t);
        case 13: return tile_of<E, 13>(t);
        case 14: return tile_of<E, 14>(t);
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

template <class E>
void pack(const ConvParams& p, const WeightView& view, void* packed, int64_t begin, int64_t end) {
    using T = typename E::T;
    const Packing<E> layout(p);
    const T* weight = static_cast<const T*>(view.weight);
    const T* density = static_cast<const T*>(view.density);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item / layout.blocks, block = item % layout.blocks;
        const int width = block_width(p, block);
        const int64_t lanes = min64(width, p.out_channels - block * kLanes);
        T* out = static_cast<T*>(packed) + layout.block_offset(group, block);
        for (int64_t tap = 0; tap < layout.taps; ++tap) {
            const float factor = density ? widen(density[tap * view.tap_stride]) : 1.f;
            const T* w = weight + group * view.group_stride + block * kLanes * view.out_stride + tap * view.tap_stride;
            for (int64_t c = 0; c < layout.steps * E::kChannels; ++c) {
                T* row = out + (c / E::kChannels) * width * E::kChannels + c % E::kChannels;
                const bool inside = c < layout.channels;
                for (int64_t o = 0; o < width; ++o) {
                    const float value = inside && o < lanes ? widen(w[o * view.out_stride + c * view.in_stride]) : 0.f;
                    narrow(value * factor, row + o * E::kChannels);
                }
            }
            out += layout.tap_elements(width);
        }
    }
}

// ------------------------------------------------------------------------------------------------ rows and tiles

// Output pixels are walked in runs: whole rows where a row fills tiles, several rows together where it does not.
struct Runs {
    int64_t rows, rows_per_run, runs_per_image;

    explicit Runs(const ConvParams& p) {
        rows = p.axis[0].out_size * p.axis[1].out_size;
        const int64_t width = p.axis[2].out_size;
        rows_per_run = width >= 4 * kTile ? 1 : ceil_div(4 * kTile, max64(width, 1));
        rows_per_run = min64(rows_per_run, max64(rows, 1));
        runs_per_image = ceil_div(rows, rows_per_run);
    }
};

int64_t direct_items(const ConvParams& p) { return p.batch * Runs(p).runs_per_image; }

// Scratch: a row of zeros, the pixel pointers of one tile, the weight pointers, and the accumulators of one run.
template <class E>
struct Scratch {
    using T = typename E::T;
    int64_t taps, zero_bytes, pixel_bytes, weight_bytes, run_pixels;

    explicit Scratch(const ConvParams& p) {
        taps = p.axis[0].taps * p.axis[1].taps * p.axis[2].taps;
        zero_bytes = ceil_div((p.in_channels + 1) * static_cast<int64_t>(sizeof(T)), 64) * 64;
        pixel_bytes = ceil_div(taps * kTile * 8, 64) * 64;
        weight_bytes = ceil_div(taps * 8, 64) * 64;
        run_pixels = Runs(p).rows_per_run * p.axis[2].out_size;
    }

    int64_t bytes() const { return zero_bytes + pixel_bytes + 2 * weight_bytes + run_pixels * kLanes * 4; }
};

template <class E>
int64_t direct_scratch(const ConvParams& p) {
    return Scratch<E>(p).bytes();
}

PDN_INLINE int64_t in_position(const Axis& a, int64_t out, int64_t tap) {
    return out * a.step + a.offset + tap * a.offset_step;
}
PDN_INLINE bool inside(int64_t position, int64_t size) { return static_cast<uint64_t>(position) < static_cast<uint64_t>(size); }

// One tap of the (possibly strided) tap set: its three tap numbers and its weight's place.
struct Tap {
    int32_t t0, t1, t2;
};

template <class E>
struct DirectRun {
    using T = typename E::T;
    const ConvParams& p;
    const Packing<E> layout;
    const Scratch<E> sizes;
    T* zeros;
    const T** pixels;
    const T** weights;
    int64_t* tap_weight;  // weight tap number per tap
    float* accumulators;

    DirectRun(const ConvParams& params, void* scratch) : p(params), layout(params), sizes(params) {
        char* at = static_cast<char*>(scratch);
        zeros = reinterpret_cast<T*>(at);
        std::memset(at, 0, static_cast<size_t>(sizes.zero_bytes));
        at += sizes.zero_bytes;
        pixels = reinterpret_cast<const T**>(at);
        at += sizes.pixel_bytes;
        weights = reinterpret_cast<const T**>(at);
        at += sizes.weight_bytes;
        tap_weight = reinterpret_cast<int64_t*>(at);
        at += sizes.weight_bytes;
        accumulators = reinterpret_cast<float*>(at);
        const Axis &a = p.axis[0], &b = p.axis[1], &c = p.axis[2];
        int64_t n = 0;
        for (int64_t i = 0; i < a.taps; ++i)
            for (int64_t j = 0; j < b.taps; ++j)
                for (int64_t k = 0; k < c.taps; ++k)
                    tap_weight[n++] = ((a.tap + i * a.tap_step) * b.kernel + b.tap + j * b.tap_step) * c.kernel + c.tap +
                                      k * c.tap_step;
    }

    // Pointers of `count` pixels from `first` (numbered within the run) for the outer taps [from, to); taps that no
    // pixel of the tile can see are left out. Returns how many taps remain.
    int gather(const T* image, int64_t row0, int64_t first, int count, int64_t from, int64_t to, const T* block, int width) {
        const Axis &a = p.axis[0], &b = p.axis[1], &c = p.axis[2];
        const int64_t tap_elements = layout.tap_elements(width);
        int64_t d[kTile], h[kTile], w[kTile];
        for (int m = 0; m < count; ++m) {
            const int64_t pixel = first + m, row = row0 + pixel / c.out_size;
            d[m] = row / b.out_size * a.step + a.offset;
            h[m] = row % b.out_size * b.step + b.offset;
            w[m] = pixel % c.out_size * c.step + c.offset;
        }
        int used = 0;
        for (int64_t outer = from; outer < to; ++outer) {
            const int64_t i = outer / b.taps, j = outer % b.taps;
            const T* rows[kTile];
            bool any_row = false;
            for (int m = 0; m < count; ++m) {
                const int64_t di = d[m] + i * a.offset_step, hj = h[m] + j * b.offset_step;
                const bool ok = inside(di, a.in_size) && inside(hj, b.in_size);
                rows[m] = ok ? image + di * a.in_stride + hj * b.in_stride : nullptr;
                any_row |= ok;
            }
            if (!any_row) continue;
            for (int64_t k = 0; k < c.taps; ++k) {
                const T** at = pixels + used * kTile;
                bool any = false;
                for (int m = 0; m < count; ++m) {
                    const int64_t wk = w[m] + k * c.offset_step;
                    const bool ok = rows[m] != nullptr && inside(wk, c.in_size);
                    at[m] = ok ? rows[m] + wk * c.in_stride : zeros;
                    any |= ok;
                }
                if (!any) continue;
                weights[used] = block + tap_weight[outer * c.taps + k] * tap_elements;
                ++used;
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
        task.pixels = pixels;
        task.weights = weights;
        task.channels = p.in_channels;
        task.bias = p.bias ? static_cast<const T*>(p.bias) + channel : nullptr;
        task.activation = static_cast<int>(p.activation);
        task.lanes = static_cast<int>(min64(kLanes, p.out_channels - block * kLanes));
        task.out_stride = c.out_stride;
        task.residual_stride = c.residual_stride;
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
                task.taps = gather(image, row0, first, count, from, to, packed, width);
                float* saved = accumulators + first * width;
                task.start = from == 0 ? nullptr : saved;
                task.stop = to >= outer_taps ? nullptr : saved;
                const int64_t od = row / b.out_size, oh = row % b.out_size;
                task.output = static_cast<T*>(p.output) + n * p.out_batch_stride + od * a.out_stride + oh * b.out_stride +
                              column * c.out_stride + channel;
                task.residual = p.residual ? static_cast<const T*>(p.residual) + n * p.residual_batch_stride +
                                                 od * a.residual_stride + oh * b.residual_stride +
                                                 column * c.residual_stride + channel
                                           : nullptr;
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
        const int64_t n = item / runs.runs_per_image, row0 = item % runs.runs_per_image * runs.rows_per_run;
        const int64_t rows = min64(runs.rows_per_run, runs.rows - row0);
        for (int64_t group = 0; group < p.groups; ++group)
            for (int64_t block = 0; block < run.layout.blocks; ++block)
                run.block_of_run(n, group, block, row0, rows * p.axis[2].out_size);
    }
}

const char* direct_f32_unsupported(const ConvParams& p) {
    return p.dtype == DType::float32 ? nullptr : "the float32 kernel takes float32 only";
}

constexpr Algorithm kDirectF32 = {"direct",
                                  direct_f32_unsupported,
                                  packed_bytes<Float32>,
                                  pack_items<Float32>,
                                  pack<Float32>,
                                  direct_items,
                                  direct_scratch<Float32>,
                                  direct_run<Float32>};

#if defined(__AVX512BF16__)
const char* direct_bf16_unsupported(const ConvParams& p) {
    return p.dtype == DType::bfloat16 ? nullptr : "the bfloat16 kernel takes bfloat16 only";
}

constexpr Algorithm kDirectBF16 = {"direct_bf16",
                                   direct_bf16_unsupported,
                                   packed_bytes<BFloat16>,
                                   pack_items<BFloat16>,
                                   pack<BFloat16>,
                                   direct_items,
                                   direct_scratch<BFloat16>,
                                   direct_run<BFloat16>};
#endif

}  // namespace
}  // namespace weighted_conv
}  // namespace pdn
