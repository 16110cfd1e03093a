// Weighted convolution on CUDA: skinny first layers, skinny last layers, depthwise layers and their gradients.
//
// All of them move far more bytes than a tensor core could be fed with work for, so the design is about memory: every
// output (first layer), every input (last layer) is touched once in device memory, in vectors of four channels, eight
// neighbouring threads side by side. Weight times density is formed while it is read into shared memory.
//
// A kernel is a few phases with a barrier between them. A phase is a PDN_HD function of the thread's number, so that
// tests/native/cuda_host_check.cu runs the same arithmetic on the host, thread after thread.
#include "../core/cuda_util.cuh"
#include "cuda.h"

namespace pdn {
namespace {

using weighted_conv::Axis;
using namespace weighted_conv::cuda;

constexpr int kThreads = 256;
struct Shape {
    int w, h;  // pixels
};
constexpr Shape kTileIn{64, 8}, kTileOut{32, 8};  // of a block: first layers, last layers
constexpr int kTileDepthwise = 32;                // width; the height is 4 rows of threads
constexpr int kLanes = kChannelBlock / 4;         // threads side by side along the channels, four channels each

// How a problem is cut into blocks, and what a block keeps in shared memory.
struct Plan {
    int64_t blocks;
    int tiles_x, tiles_y, depth, groups;  // blocks are numbered (batch, depth, y, x, group), the group fastest
    int tile_w, tile_h;
    int group_channels;  // channels of one group (first layer, depthwise) or of one stage (last layer)
    int taps;
    int rows, pitch;  // input tile of a first layer
    bool fast;        // neighbouring outputs read neighbouring inputs: rows are kept in registers
    bool vector_in, vector_out;
    int64_t shared_bytes;
};

struct Tile {
    int64_t n, z, y, x;
    int64_t channel;  // first channel of the group
};

PDN_HD Tile tile_of(const Plan& plan, int64_t block) {
    uint32_t rest = static_cast<uint32_t>(block);
    const uint32_t group = rest % plan.groups;
    rest /= plan.groups;
    const uint32_t x = rest % plan.tiles_x;
    rest /= plan.tiles_x;
    const uint32_t y = rest % plan.tiles_y;
    rest /= plan.tiles_y;
    const uint32_t z = rest % plan.depth;
    return {rest / plan.depth, z, static_cast<int64_t>(y) * plan.tile_h, static_cast<int64_t>(x) * plan.tile_w,
            static_cast<int64_t>(group) * plan.group_channels};
}

PDN_HD int64_t input_position(const Axis& axis, int64_t out, int64_t tap) {
    return out * axis.step + axis.offset + tap * axis.offset_step;
}

PDN_HD bool inside(int64_t position, int64_t size) {
    return static_cast<uint64_t>(position) < static_cast<uint64_t>(size);
}

PDN_HD int64_t kernel_position(const Axis (&axis)[3], int kd, int ky, int kx) {
    const int64_t d = axis[0].tap + kd * axis[0].tap_step, y = axis[1].tap + ky * axis[1].tap_step;
    return (d * axis[1].kernel + y) * axis[2].kernel + axis[2].tap + kx * axis[2].tap_step;
}

// Weight times density for every tap of one (output, input) channel pair, `stride` floats apart; zeros without a pair.
// SLOTS threads may share a pair: each takes every SLOTS-th tap from `slot` on.
template <typename T, int SLOTS = 1>
PDN_HD void stage_taps(const Problem& p, bool exists, int64_t pair, float* out, int stride, int slot = 0) {
    const int64_t kernel = p.axis[0].kernel * p.axis[1].kernel * p.axis[2].kernel;
    const T* weight = static_cast<const T*>(p.weight) + (exists ? pair * kernel : 0);
    const T* density = static_cast<const T*>(p.density);
    int tap = 0;
    for (int kd = 0; kd < p.axis[0].taps; ++kd)
        for (int ky = 0; ky < p.axis[1].taps; ++ky)
            for (int kx = 0; kx < p.axis[2].taps; ++kx, ++tap, out += stride) {
                if (SLOTS > 1 && tap % SLOTS != slot) continue;
                const int64_t k = kernel_position(p.axis, kd, ky, kx);
                const float w = exists ? load1(weight + k) : 0.f;
                *out = density ? w * load1(density + k) : w;
            }
}

// Inputs at N positions of one row, UNIT neighbours or else `step` apart, four channels each; zero outside the row.
template <bool UNIT, typename T, int N>
PDN_HD void load_row(Float4 (&row)[N], const T* base, const Axis& axis, int64_t first, int64_t step, bool vector,
                     int64_t channels) {
    const int64_t left = axis.in_size - first, stride = axis.in_stride * (UNIT ? 1 : step);
    const int begin = first < -N ? N : static_cast<int>(-first), end = left > N   ? N
                                                                       : left < 0 ? 0
                                                                                  : static_cast<int>(left);
    const T* at = base + first * axis.in_stride;
    if (vector) {
#pragma unroll
        for (int i = 0; i < N; ++i, at += stride)
            row[i] = (UNIT ? i >= begin && i < end : inside(first + i * step, axis.in_size)) ? load4(at) : Float4{};
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i, at += stride) {
            const bool valid = UNIT ? i >= begin && i < end : inside(first + i * step, axis.in_size);
            row[i] = load4_partial(at, valid ? channels : 0);
        }
    }
}

// Epilogue and stores of N neighbouring pixels, four channels each. `acc` holds the sums.
template <typename T, int N>
PDN_HD void finish_row(const Problem& p, const Tile& tile, int64_t y, int64_t x, int64_t channel, bool vector,
                       Float4 (&acc)[N]) {
    const int64_t channels = p.out_channels - channel;
    if (p.bias) {
        const T* at = static_cast<const T*>(p.bias) + channel;
        const Float4 bias = load4_partial(at, channels);
#pragma unroll
        for (int i = 0; i < N; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[i].v[j] += bias.v[j];
    }
    activate(acc, static_cast<int>(p.activation));
    const Axis* a = p.axis;
    T* out = static_cast<T*>(p.output) + tile.n * p.out_batch_stride + tile.z * a[0].out_stride + y * a[1].out_stride +
             x * a[2].out_stride + channel;
    const T* residual = static_cast<const T*>(p.residual);
    if (residual)
        residual += tile.n * p.residual_batch_stride + tile.z * a[0].residual_stride + y * a[1].residual_stride +
                    x * a[2].residual_stride + channel;
    const int left = a[2].out_size - x > N ? N : static_cast<int>(a[2].out_size - x);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (i >= left) break;
        if (residual) {
            const Float4 r = vector ? load4(residual) : load4_partial(residual, channels);
            residual += a[2].residual_stride;
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[i].v[j] += r.v[j];
        }
        if (vector)
            store4(out, acc[i]);
        else
            store4_partial(out, acc[i], channels);
        out += a[2].out_stride;
    }
}

// ------------------------------------------------------------------------------------- first layers: few channels in
// A block computes 64 x 8 pixels of a group of channels. Shared memory holds the group's weights [tap][c_in][channel]
// and the input tile in float32, one plane per input channel: a thread reads runs of pixels along x, 16 bytes at a
// time, and keeps them in registers for all taps of a kernel row. Each thread sums 8 pixels x 4 channels.

template <typename T, int KW>  // KW = 0: any kernel, stride and dilation; inputs come through the L1 cache instead
struct SkinnyIn {
    static constexpr int kPixels = 8;

    static PDN_HD void stage(const Problem& p, const Plan& plan, const Tile& tile, int thread, float* shared) {
        const int channels = static_cast<int>(p.in_channels), group = plan.group_channels;
        for (int i = thread; i < channels * group; i += kThreads) {
            const int c = i / group, o = i % group;
            const int64_t out = tile.channel + o;
            stage_taps<T>(p, out < p.out_channels, out * channels + c, shared + c * group + o, channels * group);
        }
        if constexpr (KW > 0) stage_input(p, plan, tile, thread, shared + plan.taps * channels * group);
    }

    static PDN_HD void stage_input(const Problem& p, const Plan& plan, const Tile& tile, int thread, float* pixels) {
        const Axis *az = &p.axis[0], *ay = &p.axis[1], *ax = &p.axis[2];
        const int channels = static_cast<int>(p.in_channels), rows = plan.rows;
        const int64_t x0 = tile.x + ax->offset;
        for (int i = thread / 32; i < static_cast<int>(az->taps) * rows; i += kThreads / 32) {
            const int kd = i / rows, row = i % rows;
            const int64_t z = input_position(*az, tile.z, kd), y = tile.y * ay->step + ay->offset + row;
            const bool valid = inside(z, az->in_size) && inside(y, ay->in_size);
            const T* base = static_cast<const T*>(p.input) +
                            (valid ? tile.n * p.in_batch_stride + z * az->in_stride + y * ay->in_stride : 0);
            float* out = pixels + static_cast<int64_t>(kd) * channels * rows * plan.pitch + row * plan.pitch;
            for (int x = thread % 32; x < plan.pitch; x += 32) {
                const bool take = valid && inside(x0 + x, ax->in_size);
                for (int c = 0; c < channels; ++c)
                    out[c * rows * plan.pitch + x] = take ? load1(base + (x0 + x) * ax->in_stride + c) : 0.f;
            }
        }
    }

    static PDN_HD void compute(const Problem& p, const Plan& plan, const Tile& tile, int thread, const float* shared) {
        constexpr int kColumns = kTileIn.w / kPixels, kRows = kThreads / (kLanes * kColumns);
        const int lane = thread % kLanes, column = thread / kLanes % kColumns * kPixels;
        const int64_t x = tile.x + column;
        if (x >= p.axis[2].out_size) return;
        for (int row = thread / (kLanes * kColumns); row < kTileIn.h; row += kRows) {
            if (tile.y + row >= p.axis[1].out_size) break;
            for (int first = lane * 4; first < plan.group_channels; first += kChannelBlock) {
                if (tile.channel + first >= p.out_channels) break;
                Float4 acc[kPixels] = {};
                if constexpr (KW > 0)
                    sum_staged(p, plan, row, column, first, shared, acc);
                else
                    sum_direct(p, plan, tile, tile.y + row, x, first, shared, acc);
                finish_row<T>(p, tile, tile.y + row, x, tile.channel + first, plan.vector_out, acc);
            }
        }
    }

    static PDN_HD void sum_staged(const Problem& p, const Plan& plan, int row, int column, int first,
                                  const float* shared, Float4 (&acc)[kPixels]) {
        const int channels = static_cast<int>(p.in_channels), group = plan.group_channels;
        const int kernel_h = static_cast<int>(p.axis[1].taps);
        const int row_step = static_cast<int>(p.axis[1].step), tap_step = static_cast<int>(p.axis[1].offset_step);
        const float* weights = shared + first;
        const float* plane = shared + plan.taps * channels * group + row * row_step * plan.pitch + column;
        for (int kd = 0; kd < static_cast<int>(p.axis[0].taps); ++kd) {
            for (int ky = 0; ky < kernel_h; ++ky) {
                const float* pixels = plane + ky * tap_step * plan.pitch;
#pragma unroll 1
                for (int c = 0; c < channels; ++c, pixels += plan.rows * plan.pitch) {
                    constexpr int kVectors = (kPixels + KW - 1 + 3) / 4;
                    float window[kVectors * 4];
#pragma unroll
                    for (int i = 0; i < kVectors; ++i) {
                        const Float4 v = shared4(pixels + 4 * i);
#pragma unroll
                        for (int j = 0; j < 4; ++j) window[4 * i + j] = v.v[j];
                    }
#pragma unroll
                    for (int kx = 0; kx < KW; ++kx) {
                        const Float4 w = shared4(weights + (kx * channels + c) * group);
#pragma unroll
                        for (int i = 0; i < kPixels; ++i)
#pragma unroll
                            for (int j = 0; j < 4; ++j) acc[i].v[j] = fmaf(window[i + kx], w.v[j], acc[i].v[j]);
                    }
                }
                weights += KW * channels * group;
            }
            plane += channels * plan.rows * plan.pitch;
        }
    }

    static PDN_HD void sum_direct(const Problem& p, const Plan& plan, const Tile& tile, int64_t y, int64_t x, int first,
                                  const float* shared, Float4 (&acc)[kPixels]) {
        const Axis *az = &p.axis[0], *ay = &p.axis[1], *ax = &p.axis[2];
        const int channels = static_cast<int>(p.in_channels);
        const float* weights = shared + first;
        for (int kd = 0; kd < static_cast<int>(az->taps); ++kd)
            for (int ky = 0; ky < static_cast<int>(ay->taps); ++ky) {
                const int64_t iz = input_position(*az, tile.z, kd), iy = input_position(*ay, y, ky);
                const bool valid = inside(iz, az->in_size) && inside(iy, ay->in_size);
                const T* base = static_cast<const T*>(p.input) +
                                (valid ? tile.n * p.in_batch_stride + iz * az->in_stride + iy * ay->in_stride : 0);
                for (int kx = 0; kx < static_cast<int>(ax->taps); ++kx)
#pragma unroll 1
                    for (int c = 0; c < channels; ++c, weights += plan.group_channels) {
                        const Float4 w = shared4(weights);
#pragma unroll
                        for (int i = 0; i < kPixels; ++i) {
                            const int64_t ix = input_position(*ax, x + i, kx);
                            const float v =
                                valid && inside(ix, ax->in_size) ? load1(base + ix * ax->in_stride + c) : 0.f;
#pragma unroll
                            for (int j = 0; j < 4; ++j) acc[i].v[j] = fmaf(v, w.v[j], acc[i].v[j]);
                        }
                    }
            }
    }
};

template <typename T, int KW>
__global__ void __launch_bounds__(kThreads, 2)
    skinny_in_kernel(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
    extern __shared__ Float4 shared[];
    const Tile tile = tile_of(plan, blockIdx.x);
    float* memory = reinterpret_cast<float*>(shared);
    SkinnyIn<T, KW>::stage(p, plan, tile, threadIdx.x, memory);
    __syncthreads();
    SkinnyIn<T, KW>::compute(p, plan, tile, threadIdx.x, memory);
}

// ------------------------------------------------------------------------------------- last layers: few channels out
// A block computes 32 x 8 pixels, a warp one row of them. Eight threads share eight neighbouring pixels and split the
// input channels, four each, so that a warp reads whole cache lines and keeps a row's inputs in registers for all taps
// of a kernel row. At the end the eight partial sums of a pixel are added by exchanging halves, after which each thread
// owns one pixel.

template <typename T, int CO, int KW>  // CO >= C_out; KW = 0: any kernel, stride and dilation
struct SkinnyOut {
    static constexpr int kPixels = 8;
    static constexpr int kWindow = kPixels + (KW ? KW - 1 : 0);

    // Weights [tap][c_out][channel] of the input channels from `stage` on.
    static PDN_HD void stage(const Problem& p, const Plan& plan, int64_t stage, int thread, float* shared) {
        const int group = plan.group_channels;
        for (int i = thread; i < CO * group; i += kThreads) {
            const int o = i / group, c = i % group;
            const bool exists = o < p.out_channels && stage + c < p.in_channels;
            stage_taps<T>(p, exists, o * p.in_channels + stage + c, shared + o * group + c, CO * group);
        }
    }

    static PDN_HD void accumulate(const Problem& p, const Plan& plan, const Tile& tile, int64_t stage, int thread,
                                  const float* shared, float (&acc)[kPixels][CO]) {
        const Axis *az = &p.axis[0], *ay = &p.axis[1], *ax = &p.axis[2];
        const int lane = thread % kLanes;
        const int64_t x = tile.x + thread / kLanes % 4 * kPixels, y = tile.y + thread / 32;
        if (x >= ax->out_size || y >= ay->out_size) return;
        const int kernel_w = KW ? KW : static_cast<int>(ax->taps);
#pragma unroll 1
        for (int first = lane * 4; first < plan.group_channels; first += kChannelBlock) {
            const int64_t channels = p.in_channels - stage - first;
            if (channels <= 0) break;
            const float* weights = shared + first;
            const T* origin = static_cast<const T*>(p.input) + tile.n * p.in_batch_stride + stage + first;
#pragma unroll 1
            for (int kd = 0; kd < static_cast<int>(az->taps); ++kd) {
                const int64_t iz = input_position(*az, tile.z, kd);
#pragma unroll 1
                for (int ky = 0; ky < static_cast<int>(ay->taps);
                     ++ky, weights += kernel_w * CO * plan.group_channels) {
                    const int64_t iy = input_position(*ay, y, ky);
                    if (!inside(iz, az->in_size) || !inside(iy, ay->in_size)) continue;
                    const T* base = origin + iz * az->in_stride + iy * ay->in_stride;
                    Float4 window[kWindow];
                    if constexpr (KW > 0) {
                        load_row<true>(window, base, *ax, x + ax->offset, 1, true, channels);
#pragma unroll
                        for (int kx = 0; kx < KW; ++kx) add_tap(window, kx, weights, kx, plan.group_channels, acc);
                    } else {
                        for (int kx = 0; kx < kernel_w; ++kx) {
                            load_row<false>(window, base, *ax, input_position(*ax, x, kx), ax->step, plan.vector_in,
                                            channels);
                            add_tap(window, 0, weights, kx, plan.group_channels, acc);
                        }
                    }
                }
            }
        }
    }

    static PDN_HD void add_tap(const Float4 (&window)[kWindow], int shift, const float* weights, int kx, int group,
                               float (&acc)[kPixels][CO]) {
#pragma unroll
        for (int o = 0; o < CO; ++o) {
            const Float4 w = shared4(weights + (kx * CO + o) * group);
#pragma unroll
            for (int i = 0; i < kPixels; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) acc[i][o] = fmaf(window[i + shift].v[j], w.v[j], acc[i][o]);
        }
    }

    static PDN_HD void finish(const Problem& p, const Tile& tile, int thread, const float (&sum)[CO]) {
        const Axis* a = p.axis;
        const int64_t x = tile.x + thread % 32, y = tile.y + thread / 32;
        if (x >= a[2].out_size || y >= a[1].out_size) return;
        T* out = static_cast<T*>(p.output) + tile.n * p.out_batch_stride + tile.z * a[0].out_stride +
                 y * a[1].out_stride + x * a[2].out_stride;
        const T* bias = static_cast<const T*>(p.bias);
        const T* residual = static_cast<const T*>(p.residual);
        if (residual)
            residual += tile.n * p.residual_batch_stride + tile.z * a[0].residual_stride + y * a[1].residual_stride +
                        x * a[2].residual_stride;
#pragma unroll
        for (int o = 0; o < CO; ++o) {
            if (o >= p.out_channels) break;
            const float v = activate(bias ? sum[o] + load1(bias + o) : sum[o], static_cast<int>(p.activation));
            from_float(residual ? v + load1(residual + o) : v, out[o]);
        }
    }
};

// Adds the sums of eight neighbouring threads; thread i of them ends with pixel i in acc[0].
template <int HALF, int CO>
__device__ __forceinline__ void exchange_sums(float (&acc)[8][CO], int lane) {
    const bool upper = lane & HALF;
#pragma unroll
    for (int i = 0; i < HALF; ++i)
#pragma unroll
        for (int o = 0; o < CO; ++o) {
            const float give = upper ? acc[i][o] : acc[i + HALF][o];
            const float keep = upper ? acc[i + HALF][o] : acc[i][o];
            acc[i][o] = keep + __shfl_xor_sync(0xffffffffu, give, HALF);
        }
    if constexpr (HALF > 1) exchange_sums<HALF / 2>(acc, lane);
}

template <typename T, int CO, int KW>
__global__ void __launch_bounds__(kThreads, 2)
    skinny_out_kernel(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
    using Kernel = SkinnyOut<T, CO, KW>;
    extern __shared__ Float4 shared[];
    float* memory = reinterpret_cast<float*>(shared);
    const Tile tile = tile_of(plan, blockIdx.x);
    float acc[Kernel::kPixels][CO] = {};
    for (int64_t stage = 0; stage < p.in_channels; stage += plan.group_channels) {
        if (stage) __syncthreads();
        Kernel::stage(p, plan, stage, threadIdx.x, memory);
        __syncthreads();
        Kernel::accumulate(p, plan, tile, stage, threadIdx.x, memory, acc);
    }
    exchange_sums<Kernel::kPixels / 2>(acc, threadIdx.x % kLanes);
    Kernel::finish(p, tile, threadIdx.x, acc[0]);
}

// --------------------------------------------------------------------------------------------------------- depthwise
// A block computes 32 x 4R pixels of 32 channels, a thread 4 x R pixels of four channels. Going down the rows, each row
// of inputs is loaded once into registers and used for every tap of every output row that it reaches.

template <typename T, int KW>
struct Depthwise {
    static constexpr int kPixels = 4;
    static constexpr int kRows = KW >= 5 && sizeof(T) == 4 ? 4 : 2;
    static constexpr int kWindow = kPixels + (KW ? KW - 1 : 0);

    static PDN_HD void stage(const Problem& p, const Plan& plan, const Tile& tile, int thread, float* shared) {
        const int lane = thread % kChannelBlock;
        const int64_t channel = tile.channel + lane;
        stage_taps<T, kThreads / kChannelBlock>(p, channel < p.out_channels, channel, shared + lane, kChannelBlock,
                                                thread / kChannelBlock);
    }

    static PDN_HD void compute(const Problem& p, const Plan& plan, const Tile& tile, int thread, const float* shared) {
        const int lane = thread % kLanes;
        const int64_t channel = tile.channel + lane * 4;
        const int64_t x = tile.x + thread / kLanes % (kTileDepthwise / kPixels) * kPixels;
        const int64_t y = tile.y + thread / (kLanes * kTileDepthwise / kPixels) * kRows;
        if (channel >= p.out_channels || x >= p.axis[2].out_size || y >= p.axis[1].out_size) return;
        Float4 acc[kRows][kPixels] = {};
        const Axis& az = p.axis[0];
        const float* weights = shared + lane * 4;
        for (int kd = 0; kd < static_cast<int>(az.taps); ++kd) {
            const int64_t iz = input_position(az, tile.z, kd);
            if (inside(iz, az.in_size)) {
                const T* plane = static_cast<const T*>(p.input) + tile.n * p.in_batch_stride + iz * az.in_stride;
                if constexpr (KW > 0)
                    sum_rows(p, plan, plane + channel, y, x, weights, acc);
                else
                    sum_taps(p, plan, plane, channel, y, x, weights, acc);
            }
            weights += p.axis[1].taps * p.axis[2].taps * kChannelBlock;
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r)
            if (y + r < p.axis[1].out_size) finish_row<T>(p, tile, y + r, x, channel, plan.vector_out, acc[r]);
    }

    static PDN_HD void add_tap(const Float4 (&window)[kWindow], int shift, Float4 w, Float4 (&acc)[kPixels]) {
#pragma unroll
        for (int i = 0; i < kPixels; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[i].v[j] = fmaf(window[i + shift].v[j], w.v[j], acc[i].v[j]);
    }

    static PDN_HD void sum_rows(const Problem& p, const Plan& plan, const T* plane, int64_t y, int64_t x,
                                const float* weights, Float4 (&acc)[kRows][kPixels]) {
        const Axis &ay = p.axis[1], &ax = p.axis[2];
        const int kernel_h = static_cast<int>(ay.taps);
#pragma unroll 1
        for (int i = 0; i < kRows + kernel_h - 1; ++i) {
            const int64_t iy = y + ay.offset + i;
            if (!inside(iy, ay.in_size)) continue;
            Float4 window[kWindow];
            load_row<true>(window, plane + iy * ay.in_stride, ax, x + ax.offset, 1, true, 4);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int ky = i - r;
                if (ky < 0 || ky >= kernel_h) continue;
#pragma unroll
                for (int kx = 0; kx < KW; ++kx)
                    add_tap(window, kx, shared4(weights + (ky * KW + kx) * kChannelBlock), acc[r]);
            }
        }
    }

    static PDN_HD void sum_taps(const Problem& p, const Plan& plan, const T* plane, int64_t channel, int64_t y,
                                int64_t x, const float* weights, Float4 (&acc)[kRows][kPixels]) {
        const Axis &ay = p.axis[1], &ax = p.axis[2];
        const int64_t repeat = p.out_channels / p.in_channels;
        const T* base = plane + channel / repeat;
        const int64_t skip = channel % repeat;  // four channels of one input start in the middle of its run
        for (int ky = 0; ky < static_cast<int>(ay.taps); ++ky)
            for (int kx = 0; kx < static_cast<int>(ax.taps); ++kx, weights += kChannelBlock) {
                const Float4 w = shared4(weights);
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    const int64_t iy = input_position(ay, y + r, ky);
                    if (!inside(iy, ay.in_size)) continue;
                    Float4 window[kWindow];
                    const T* row = base + iy * ay.in_stride;
#pragma unroll
                    for (int i = 0; i < kPixels; ++i) {
                        const int64_t ix = input_position(ax, x + i, kx);
                        window[i] = Float4{};
                        if (!inside(ix, ax.in_size)) continue;
                        const T* at = row + ix * ax.in_stride;
                        if (plan.vector_in) {
                            window[i] = load4(at);
                        } else {
#pragma unroll
                            for (int j = 0; j < 4; ++j)
                                if (channel + j < p.out_channels)
                                    window[i].v[j] = load1(at + (repeat == 1 ? j : (skip + j) / repeat));
                        }
                    }
                    add_tap(window, 0, w, acc[r]);
                }
            }
    }
};

template <typename T, int KW>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_kernel(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
    extern __shared__ Float4 shared[];
    const Tile tile = tile_of(plan, blockIdx.x);
    float* memory = reinterpret_cast<float*>(shared);
    Depthwise<T, KW>::stage(p, plan, tile, threadIdx.x, memory);
    __syncthreads();
    Depthwise<T, KW>::compute(p, plan, tile, threadIdx.x, memory);
}

// ------------------------------------------------------------------------------------ depthwise gradients of the
// weight G[c, k] = sum over pixels of dy[pixel, c] * x[pixel at tap k, c]. A block takes 32 channels, one row of taps
// (KW of them; KW = 1 is the general case, one tap at a time) and one slab of pixels; its 32 workers of eight threads
// go over runs of four pixels. Partial sums go to the workspace [slab][tap][channel] and are added in order, so that
// the result does not change from run to run.

struct GradPlan {
    int groups, tap_rows, slabs, kernel_w;
    int taps, kernel_h;
    int64_t runs_x, runs;      // runs of four pixels in a row, and in all
    int step_rows, step_runs;  // a worker's step of kWorkers runs, as whole rows and a rest
    bool vector;
};

constexpr int kWorkers = kThreads / kLanes;
constexpr int kRun = 4;

template <typename T, int KW>
struct DepthwiseGrad {
    static constexpr int kSharedFloats = kWorkers * KW * kChannelBlock;

    static PDN_HD void compute(const GradProblem& p, const GradPlan& plan, uint32_t block, int thread, float* shared) {
        const int lane = thread % kLanes, worker = thread / kLanes;
        const int64_t channel = static_cast<int64_t>(block % plan.groups) * kChannelBlock + lane * 4;
        const int tap_row = block / plan.groups % plan.tap_rows;
        const int slab = block / plan.groups / plan.tap_rows;
        Float4 acc[KW] = {};
        if (channel < p.channels) accumulate(p, plan, channel, tap_row, slab, worker, acc);
        float* out = shared + worker * KW * kChannelBlock + lane * 4;
#pragma unroll
        for (int kx = 0; kx < KW; ++kx) *reinterpret_cast<Float4*>(out + kx * kChannelBlock) = acc[kx];
    }

    static PDN_HD void accumulate(const GradProblem& p, const GradPlan& plan, int64_t channel, int tap_row, int slab,
                                  int worker, Float4 (&acc)[KW]) {
        const Axis &az = p.axis[0], &ay = p.axis[1], &ax = p.axis[2];
        const int kx0 = KW == 1 ? tap_row % plan.kernel_w : 0;
        const int line = KW == 1 ? tap_row / plan.kernel_w : tap_row;
        const int kd = line / plan.kernel_h, ky = line % plan.kernel_h;
        const int64_t per_slab = (plan.runs + plan.slabs - 1) / plan.slabs;
        const int64_t end = min64(plan.runs, (slab + 1) * per_slab);
        const int64_t channels = p.channels - channel;
        const int64_t start = slab * per_slab + worker;
        uint32_t line_out = static_cast<uint32_t>(start / plan.runs_x);  // row of the output, over the whole batch
        int64_t run = start % plan.runs_x;
        for (int64_t i = start; i < end; i += kWorkers, line_out += plan.step_rows, run += plan.step_runs) {
            if (run >= plan.runs_x) run -= plan.runs_x, ++line_out;  // instead of a 64-bit division per run
            const int64_t x = run * kRun;
            const uint32_t y = line_out % static_cast<uint32_t>(ay.out_size);
            const uint32_t rest = line_out / static_cast<uint32_t>(ay.out_size);
            const uint32_t z = rest % static_cast<uint32_t>(az.out_size);
            const int64_t n = rest / static_cast<uint32_t>(az.out_size);
            const int64_t iz = input_position(az, z, kd), iy = input_position(ay, y, ky);
            if (!inside(iz, az.in_size) || !inside(iy, ay.in_size)) continue;
            Float4 dy[kRun], window[kRun + KW - 1];
            const T* grad = static_cast<const T*>(p.grad) + n * p.grad_batch_stride + z * az.out_stride +
                            y * ay.out_stride + channel;
            const Axis out_axis{ax.out_size, 0, ax.out_stride};
            load_row<true>(dy, grad, out_axis, x, 1, KW > 1 || plan.vector, channels);
            const T* input = static_cast<const T*>(p.input) + n * p.in_batch_stride + iz * az.in_stride +
                             iy * ay.in_stride + channel;
            load_row<(KW > 1)>(window, input, ax, input_position(ax, x, kx0), ax.step, KW > 1 || plan.vector, channels);
#pragma unroll
            for (int kx = 0; kx < KW; ++kx)
#pragma unroll
                for (int r = 0; r < kRun; ++r)
#pragma unroll
                    for (int j = 0; j < 4; ++j) acc[kx].v[j] = fmaf(dy[r].v[j], window[r + kx].v[j], acc[kx].v[j]);
        }
    }

    static PDN_HD int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

    static PDN_HD void reduce(const GradProblem& p, const GradPlan& plan, uint32_t block, int thread,
                              const float* shared) {
        if (thread >= KW * kChannelBlock) return;
        const int64_t channel = static_cast<int64_t>(block % plan.groups) * kChannelBlock + thread % kChannelBlock;
        if (channel >= p.channels) return;
        const int tap = block / plan.groups % plan.tap_rows * KW + thread / kChannelBlock;
        const int64_t slab = block / plan.groups / plan.tap_rows;
        float sum = 0.f;
        for (int worker = 0; worker < kWorkers; ++worker) sum += shared[worker * KW * kChannelBlock + thread];
        p.workspace[(slab * plan.taps + tap) * p.channels + channel] = sum;
    }
};

template <typename T, int KW>
__global__ void __launch_bounds__(kThreads, KW == 7 ? 1 : 2)
    depthwise_grad_kernel(const __grid_constant__ GradProblem p, const __grid_constant__ GradPlan plan) {
    __shared__ Float4 shared[DepthwiseGrad<T, KW>::kSharedFloats / 4];
    float* memory = reinterpret_cast<float*>(shared);
    DepthwiseGrad<T, KW>::compute(p, plan, blockIdx.x, threadIdx.x, memory);
    __syncthreads();
    DepthwiseGrad<T, KW>::reduce(p, plan, blockIdx.x, threadIdx.x, memory);
}

// One block per tap: adds the slabs, writes density * G, and returns this thread's share of sum over c of W * G.
template <typename T>
PDN_HD float grad_of_tap(const GradProblem& p, const GradPlan& plan, int tap, int thread) {
    const T* density = static_cast<const T*>(p.density);
    const float factor = density ? load1(density + tap) : 1.f;
    float share = 0.f;
    for (int64_t c = thread; c < p.channels; c += kThreads) {
        float sum = 0.f;
        for (int64_t slab = 0; slab < plan.slabs; ++slab) sum += p.workspace[(slab * plan.taps + tap) * p.channels + c];
        if (p.weight_grad) from_float(sum * factor, static_cast<T*>(p.weight_grad)[c * plan.taps + tap]);
        if (p.density_grad) share += load1(static_cast<const T*>(p.weight) + c * plan.taps + tap) * sum;
    }
    return share;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    depthwise_grad_finish_kernel(const __grid_constant__ GradProblem p, const __grid_constant__ GradPlan plan) {
    __shared__ float shares[kThreads];
    const int tap = blockIdx.x, thread = threadIdx.x;
    shares[thread] = grad_of_tap<T>(p, plan, tap, thread);
    for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) shares[thread] += shares[thread + half];
    }
    if (thread == 0 && p.density_grad) from_float(shares[0], static_cast<T*>(p.density_grad)[tap]);
}

// --------------------------------------------------------------------------------------------------------- launchers

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int64_t element_bytes(Storage storage) { return storage == Storage::float32 ? 4 : 2; }

// Whether four-channel vectors of `tensor` can be moved in one access.
bool vectors(const void* tensor, Storage storage, int64_t channels, int64_t batch_stride, int64_t s0, int64_t s1,
             int64_t s2) {
    const bool strides = batch_stride % 4 == 0 && s0 % 4 == 0 && s1 % 4 == 0 && s2 % 4 == 0;
    return channels % 4 == 0 && strides && aligned(tensor, 4 * element_bytes(storage));
}

bool vector_input(const Problem& p) {
    const Axis* a = p.axis;
    return vectors(p.input, p.storage, p.in_channels, p.in_batch_stride, a[0].in_stride, a[1].in_stride,
                   a[2].in_stride);
}

bool vector_output(const Problem& p) {
    const Axis* a = p.axis;
    const bool out = vectors(p.output, p.storage, p.out_channels, p.out_batch_stride, a[0].out_stride, a[1].out_stride,
                             a[2].out_stride);
    return out && (!p.residual || vectors(p.residual, p.storage, p.out_channels, p.residual_batch_stride,
                                          a[0].residual_stride, a[1].residual_stride, a[2].residual_stride));
}

bool unit_steps(const Axis& axis) { return axis.step == 1 && axis.offset_step == 1; }

const char* cut(const Problem& p, int tile_w, int tile_h, int64_t groups, Plan& plan) {
    const int64_t tiles_x = (p.axis[2].out_size + tile_w - 1) / tile_w,
                  tiles_y = (p.axis[1].out_size + tile_h - 1) / tile_h;
    const int64_t limit = 0x7fffffff;
    if (tiles_x > limit || tiles_y > limit || p.axis[0].out_size > limit || groups > limit)
        return "an axis is too long";
    plan.tile_w = tile_w, plan.tile_h = tile_h;
    plan.tiles_x = static_cast<int>(tiles_x), plan.tiles_y = static_cast<int>(tiles_y);
    plan.depth = static_cast<int>(p.axis[0].out_size), plan.groups = static_cast<int>(groups);
    const double blocks = static_cast<double>(p.batch) * p.axis[0].out_size * tiles_y * tiles_x * groups;
    if (blocks > limit) return "the output needs more than 2^31 blocks";
    plan.blocks = static_cast<int64_t>(blocks);
    return nullptr;
}

int64_t all_taps(const Axis (&axis)[3]) { return axis[0].taps * axis[1].taps * axis[2].taps; }

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

const char* kTooManyTaps = "the kernel has too many taps for shared memory";

const char* plan_skinny_in(const Problem& p, Plan& plan) {
    const int64_t taps = all_taps(p.axis), floats = taps * p.in_channels;
    if (p.in_channels > kMaxSkinny) return "C_in is larger than 4";
    if (floats * kChannelBlock * 4 > kMaxSharedBytes) return kTooManyTaps;
    const int64_t wish = (40 << 10) / (floats * 4) / kChannelBlock * kChannelBlock;  // leaves room for several blocks
    const int64_t all = round_up(p.out_channels, kChannelBlock);
    plan.taps = static_cast<int>(taps);
    plan.group_channels = static_cast<int>(wish < kChannelBlock ? kChannelBlock : wish < all ? wish : all);
    plan.vector_in = false, plan.vector_out = vector_output(p);
    if (const char* why =
            cut(p, kTileIn.w, kTileIn.h, (p.out_channels + plan.group_channels - 1) / plan.group_channels, plan))
        return why;
    const int64_t weight_bytes = floats * plan.group_channels * 4;
    const Axis &ay = p.axis[1], &ax = p.axis[2];
    const int64_t rows = (kTileIn.h - 1) * ay.step + (ay.taps - 1) * ay.offset_step + 1;
    const int64_t pitch = round_up(kTileIn.w + ax.taps - 1, 4);
    const int64_t tile_bytes = p.axis[0].taps * p.in_channels * rows * pitch * 4;
    plan.fast = ax.taps == 3 && unit_steps(ax) && ay.offset_step > 0 && rows < 4096 &&
                weight_bytes + tile_bytes <= kMaxSharedBytes;
    plan.rows = plan.fast ? static_cast<int>(rows) : 0, plan.pitch = plan.fast ? static_cast<int>(pitch) : 0;
    plan.shared_bytes = weight_bytes + (plan.fast ? tile_bytes : 0);
    return nullptr;
}

int skinny_out_columns(const Problem& p, bool fast) {
    return !fast ? 4 : p.out_channels == 1 ? 1 : p.out_channels <= 3 ? 3 : 4;
}

const char* plan_skinny_out(const Problem& p, Plan& plan) {
    if (p.out_channels > kMaxSkinny) return "C_out is larger than 4";
    const int64_t taps = all_taps(p.axis);
    plan.taps = static_cast<int>(taps);
    plan.vector_in = vector_input(p), plan.vector_out = false;
    plan.fast = p.axis[2].taps == 3 && unit_steps(p.axis[2]) && plan.vector_in;
    const int64_t channel_bytes = taps * skinny_out_columns(p, plan.fast) * 4;
    if (channel_bytes * kChannelBlock > kMaxSharedBytes) return kTooManyTaps;
    const int64_t wish = (40 << 10) / channel_bytes / kChannelBlock * kChannelBlock;
    const int64_t all = round_up(p.in_channels, kChannelBlock);
    plan.group_channels = static_cast<int>(wish < kChannelBlock ? kChannelBlock : wish < all ? wish : all);
    plan.shared_bytes = channel_bytes * plan.group_channels;
    plan.rows = plan.pitch = 0;
    return cut(p, kTileOut.w, kTileOut.h, 1, plan);
}

const char* plan_depthwise(const Problem& p, Plan& plan) {
    if (p.in_channels == 0 || p.out_channels % p.in_channels) return "C_out is not a multiple of C_in";
    const int64_t taps = all_taps(p.axis), width = p.axis[2].taps;
    plan.taps = static_cast<int>(taps);
    plan.group_channels = kChannelBlock;
    plan.vector_in = p.in_channels == p.out_channels && vector_input(p), plan.vector_out = vector_output(p);
    plan.fast =
        (width == 3 || width == 5 || width == 7) && unit_steps(p.axis[1]) && unit_steps(p.axis[2]) && plan.vector_in;
    plan.shared_bytes = taps * kChannelBlock * 4;
    plan.rows = plan.pitch = 0;
    if (plan.shared_bytes > kMaxSharedBytes) return kTooManyTaps;
    const int rows = plan.fast && width >= 5 && p.storage == Storage::float32 ? 4 : 2;
    return cut(p, kTileDepthwise, 4 * rows, (p.out_channels + kChannelBlock - 1) / kChannelBlock, plan);
}

const char* kNoGradPlan = "the gradient needs more than 2^31 blocks or rows";

const char* plan_depthwise_grad(const GradProblem& p, GradPlan& plan) {
    const Axis* a = p.axis;
    const int64_t width = a[2].taps, limit = 0x7fffffff;
    plan.vector =
        vectors(p.input, p.storage, p.channels, p.in_batch_stride, a[0].in_stride, a[1].in_stride, a[2].in_stride) &&
        vectors(p.grad, p.storage, p.channels, p.grad_batch_stride, a[0].out_stride, a[1].out_stride, a[2].out_stride);
    const bool fast = (width == 3 || width == 5 || width == 7) && unit_steps(a[2]) && plan.vector;
    plan.kernel_w = static_cast<int>(width), plan.kernel_h = static_cast<int>(a[1].taps);
    plan.taps = static_cast<int>(all_taps(p.axis));
    plan.tap_rows = fast ? static_cast<int>(a[0].taps * a[1].taps) : plan.taps;
    plan.groups = static_cast<int>((p.channels + kChannelBlock - 1) / kChannelBlock);
    plan.runs_x = (a[2].out_size + kRun - 1) / kRun;
    plan.step_rows = static_cast<int>(kWorkers / plan.runs_x),
    plan.step_runs = static_cast<int>(kWorkers % plan.runs_x);
    const double rows = static_cast<double>(p.batch) * a[0].out_size * a[1].out_size;
    if (rows > limit) return kNoGradPlan;
    plan.runs = static_cast<int64_t>(rows) * plan.runs_x;
    const int64_t others = static_cast<int64_t>(plan.groups) * plan.tap_rows;
    const int64_t filled = (2048 + others - 1) / others, useful = (plan.runs + 8 * kWorkers - 1) / (8 * kWorkers);
    plan.slabs = static_cast<int>(filled < useful ? filled : useful);
    if (plan.slabs < 1) plan.slabs = 1;
    if (others * plan.slabs > limit) return kNoGradPlan;
    return nullptr;
}

template <typename P, typename L>
const char* launch(void (*kernel)(P, L), const P& p, const L& plan, int64_t blocks, int64_t shared_bytes,
                   void* stream) {
    if (shared_bytes > 48 << 10) {
        const auto wide = cudaFuncAttributeMaxDynamicSharedMemorySize;
        const cudaError_t error = cudaFuncSetAttribute(kernel, wide, static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    kernel<<<static_cast<unsigned>(blocks), kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(p, plan);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename F>
const char* with_storage(Storage storage, F&& run) {
    switch (storage) {
        case Storage::float32:
            return run(float{});
        case Storage::bfloat16:
            return run(BFloat16{});
        case Storage::float16:
            return run(Float16{});
    }
    return "the storage type is unknown";
}

bool empty(const Problem& p) {
    return p.batch == 0 || p.axis[0].out_size == 0 || p.axis[1].out_size == 0 || p.axis[2].out_size == 0;
}

}  // namespace

namespace weighted_conv {
namespace cuda {

const char* skinny_in(const Problem& p, void* stream) {
    Plan plan;
    if (empty(p)) return nullptr;
    if (const char* why = plan_skinny_in(p, plan)) return why;
    return with_storage(p.storage, [&](auto t) {
        using T = decltype(t);
        return launch(plan.fast ? skinny_in_kernel<T, 3> : skinny_in_kernel<T, 0>, p, plan, plan.blocks,
                      plan.shared_bytes, stream);
    });
}

const char* skinny_out(const Problem& p, void* stream) {
    Plan plan;
    if (empty(p)) return nullptr;
    if (const char* why = plan_skinny_out(p, plan)) return why;
    return with_storage(p.storage, [&](auto t) {
        using T = decltype(t);
        const int columns = skinny_out_columns(p, plan.fast);
        auto kernel = !plan.fast     ? skinny_out_kernel<T, 4, 0>
                      : columns == 1 ? skinny_out_kernel<T, 1, 3>
                      : columns == 3 ? skinny_out_kernel<T, 3, 3>
                                     : skinny_out_kernel<T, 4, 3>;
        return launch(kernel, p, plan, plan.blocks, plan.shared_bytes, stream);
    });
}

const char* depthwise(const Problem& p, void* stream) {
    Plan plan;
    if (empty(p)) return nullptr;
    if (const char* why = plan_depthwise(p, plan)) return why;
    return with_storage(p.storage, [&](auto t) {
        using T = decltype(t);
        const int width = plan.fast ? static_cast<int>(p.axis[2].taps) : 0;
        auto kernel = width == 3   ? depthwise_kernel<T, 3>
                      : width == 5 ? depthwise_kernel<T, 5>
                      : width == 7 ? depthwise_kernel<T, 7>
                                   : depthwise_kernel<T, 0>;
        return launch(kernel, p, plan, plan.blocks, plan.shared_bytes, stream);
    });
}

int64_t depthwise_grad_workspace(const GradProblem& p) {
    GradPlan plan;
    if (plan_depthwise_grad(p, plan)) return 0;
    return static_cast<int64_t>(plan.slabs) * plan.taps * p.channels;
}

const char* depthwise_grad(const GradProblem& p, void* stream) {
    GradPlan plan;
    if (const char* why = plan_depthwise_grad(p, plan)) return why;
    return with_storage(p.storage, [&](auto t) {
        using T = decltype(t);
        const int width = plan.tap_rows == plan.taps ? 1 : plan.kernel_w;
        auto kernel = width == 3   ? depthwise_grad_kernel<T, 3>
                      : width == 5 ? depthwise_grad_kernel<T, 5>
                      : width == 7 ? depthwise_grad_kernel<T, 7>
                                   : depthwise_grad_kernel<T, 1>;
        const int64_t blocks = static_cast<int64_t>(plan.groups) * plan.tap_rows * plan.slabs;
        if (const char* why = launch(kernel, p, plan, blocks, 0, stream)) return why;
        return launch(depthwise_grad_finish_kernel<T>, p, plan, plan.taps, 0, stream);
    });
}

}  // namespace cuda
}  // namespace weighted_conv
}  // namespace pdn
