// Group norm and layer norm with activation and quantization: two passes over the input, one write of int8.
//
// A kernel is a few phases with a barrier between them; a phase is a PDN_HD function of the thread's number, which
// tests/native runs on the host. Means and squared deviations are kept apart and merged (Welford, Chan): a large mean
// does not cost the variance its digits.
#include "../core/cuda_quantize.cuh"
#include "cuda.h"

namespace pdn {
namespace {

using norm_quantize::cuda::Problem;

constexpr int kThreads = 256, kWarps = kThreads / 32, kVector = 8;
constexpr int kMaxSlabs = 128;  // every block of the second kernel reads all of them

// Count, mean, and sum of squared deviations.
struct Moments {
    float count, mean, squares;

    PDN_HD void add(float x, float inverse_count) {  // `count` already includes x
        const float d = x - mean;
        mean = fmaf(d, inverse_count, mean);
        squares = fmaf(d, x - mean, squares);
    }
    PDN_HD void merge(const Moments& other) {
        if (other.count == 0.f) return;
        const float total = count + other.count, share = quotient(other.count, total), d = other.mean - mean;
        mean = fmaf(d, share, mean);
        squares += fmaf(d * d, count * share, other.squares);
        count = total;
    }
};

struct Stats {
    float mean, inverse_deviation;
};

struct Plan {
    int vectors;  // of eight channels, the last one possibly not full
    int columns;  // vectors that a block takes at a time, one a thread
    int lanes;    // threads of one column: each takes every lanes-th pixel
    int slabs, slab_pixels;
    int write_blocks;  // of the second kernel, per image
    int write_pixels;  // of one of them
    bool vector;
    int64_t stats_shared, write_shared;  // bytes
};

// Eight channels of one pixel, from the image that holds them; `count` of them exist.
PDN_HD void load_pixel(const Problem& p, const Plan& plan, int64_t pixel, int channel, Float4 (&x)[2]) {
    const int second = p.channels - p.first_channels;
    if (plan.vector) {
        const bool first = channel < p.first_channels;
        const int64_t at = first ? pixel * p.first_channels + channel : pixel * second + channel - p.first_channels;
        load8(first ? p.input : p.skip, p.type, at, kVector, true, x);
        return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        const int c = channel + i;
        const bool first = c < p.first_channels;
        const int64_t at = first ? pixel * p.first_channels + c : pixel * second + c - p.first_channels;
        x[i / 4].v[i % 4] = c < p.channels ? load_element(first ? p.input : p.skip, p.type, at) : 0.f;
    }
}

PDN_HD int smaller(int a, int b) { return a < b ? a : b; }

// --------------------------------------------------------------------------------------------------- group statistics

// A block takes one slab of one image. Shared memory: the moments of every channel of a chunk of columns and lane, then
// those of every channel.
struct GroupStats {
    static PDN_HD void accumulate(const Problem& p, const Plan& plan, int block, int chunk, int thread, float* shared) {
        const int n = block / plan.slabs, slab = block % plan.slabs;
        const int lane = thread / plan.columns, vector = chunk * plan.columns + thread % plan.columns;
        if (lane >= plan.lanes || vector >= plan.vectors) return;
        Moments m[kVector] = {};
        const int end = smaller(p.pixels, (slab + 1) * plan.slab_pixels);
        float count = 0.f;
        for (int pixel = slab * plan.slab_pixels + lane; pixel < end; pixel += plan.lanes) {
            Float4 x[2];
            load_pixel(p, plan, static_cast<int64_t>(n) * p.pixels + pixel, vector * kVector, x);
            count += 1.f;
            const float inverse = quotient(1.f, count);
#pragma unroll
            for (int i = 0; i < kVector; ++i) m[i].add(x[i / 4].v[i % 4], inverse);
        }
        float* out = shared + (lane * plan.columns + thread % plan.columns) * kVector * 2;
#pragma unroll
        for (int i = 0; i < kVector; ++i) out[2 * i] = m[i].mean, out[2 * i + 1] = m[i].squares;
    }

    // Pixels of a slab that a lane took.
    static PDN_HD float lane_count(const Problem& p, const Plan& plan, int slab, int lane) {
        const int pixels = smaller(p.pixels - slab * plan.slab_pixels, plan.slab_pixels);
        return static_cast<float>((pixels - lane + plan.lanes - 1) / plan.lanes);
    }

    static PDN_HD void merge_lanes(const Problem& p, const Plan& plan, int block, int chunk, int thread,
                                   float* shared) {
        float* channels = shared + plan.lanes * plan.columns * kVector * 2;
        for (int i = thread; i < plan.columns * kVector; i += kThreads) {
            const int channel = chunk * plan.columns * kVector + i;
            if (channel >= p.channels) return;
            Moments m{};
            for (int lane = 0; lane < plan.lanes; ++lane) {
                const float* from = shared + (lane * plan.columns * kVector + i) * 2;
                m.merge({lane_count(p, plan, block % plan.slabs, lane), from[0], from[1]});
            }
            channels[2 * channel] = m.mean, channels[2 * channel + 1] = m.squares;
        }
    }

    static PDN_HD void merge_channels(const Problem& p, const Plan& plan, int block, int thread, const float* shared) {
        const float* channels = shared + plan.lanes * plan.columns * kVector * 2;
        const int per_group = p.channels / p.groups, slab = block % plan.slabs;
        const float count = static_cast<float>(smaller(p.pixels - slab * plan.slab_pixels, plan.slab_pixels));
        for (int group = thread; group < p.groups; group += kThreads) {
            Moments m{};
            for (int c = group * per_group; c < (group + 1) * per_group; ++c)
                m.merge({count, channels[2 * c], channels[2 * c + 1]});
            float* out = p.workspace + (static_cast<int64_t>(block) * p.groups + group) * 2;
            out[0] = m.mean, out[1] = m.squares;
        }
    }
};

__global__ void __launch_bounds__(kThreads, 4)
    group_stats_kernel(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
    extern __shared__ __align__(16) float shared[];
    for (int chunk = 0; chunk * plan.columns < plan.vectors; ++chunk) {
        GroupStats::accumulate(p, plan, blockIdx.x, chunk, threadIdx.x, shared);
        __syncthreads();
        GroupStats::merge_lanes(p, plan, blockIdx.x, chunk, threadIdx.x, shared);
        __syncthreads();
    }
    GroupStats::merge_channels(p, plan, blockIdx.x, threadIdx.x, shared);
}

// -------------------------------------------------------------------------------------------------- group norm, codes

// How one channel of one image is transformed: ((x - mean) * gain + shift, activated) * channel_scale.
struct ChannelTerms {
    float mean, gain, shift, channel_scale;
};

PDN_HD float vector_or(const float* values, int64_t index, float otherwise) {
    return values ? values[index] : otherwise;
}

PDN_HD ChannelTerms channel_terms(const Problem& p, const Stats& stats, int n, int c) {
    const int64_t image = static_cast<int64_t>(n) * 2 * p.channels;
    const float film = 1.f + vector_or(p.film, image + c, 0.f);
    return {stats.mean, stats.inverse_deviation * vector_or(p.weight, c, 1.f) * film,
            fmaf(vector_or(p.bias, c, 0.f), film, vector_or(p.film, image + p.channels + c, 0.f)),
            vector_or(p.channel_scale, c, 1.f)};
}

PDN_HD void transform(const ChannelTerms (&t)[kVector], int activation, Float4 (&x)[2]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i / 4].v[i % 4] = fmaf(x[i / 4].v[i % 4] - t[i].mean, t[i].gain, t[i].shift);
    activate(x, activation);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i / 4].v[i % 4] *= t[i].channel_scale;
}

// A block takes some pixels of one image. Shared memory: partial moments, one per thread; the groups' statistics; where
// the scale is per pixel, the terms of every channel.
struct GroupWrite {
    static PDN_HD Moments* partial(float* shared) { return reinterpret_cast<Moments*>(shared); }
    static PDN_HD Stats* stats(float* shared) { return reinterpret_cast<Stats*>(shared + 3 * kThreads); }
    static PDN_HD ChannelTerms* terms(const Problem& p, float* shared) {
        return reinterpret_cast<ChannelTerms*>(shared + 3 * kThreads + (2 * p.groups + 3) / 4 * 4);
    }

    // Each group's slabs are merged by several threads, where there are few groups.
    static PDN_HD int parts(const Problem& p) { return p.groups < kThreads ? kThreads / p.groups : 1; }

    static PDN_HD Moments slabs_of(const Problem& p, const Plan& plan, int n, int group, int part) {
        const float per_pixel = static_cast<float>(p.channels / p.groups);
        Moments m{};
        for (int slab = part; slab < plan.slabs; slab += parts(p)) {
            const float* from = p.workspace + ((static_cast<int64_t>(n) * plan.slabs + slab) * p.groups + group) * 2;
            const int pixels = smaller(p.pixels - slab * plan.slab_pixels, plan.slab_pixels);
            m.merge({per_pixel * static_cast<float>(pixels), from[0], from[1]});
        }
        return m;
    }

    static PDN_HD void merge_slabs(const Problem& p, const Plan& plan, int block, int thread, float* shared) {
        const int n = block / plan.write_blocks;
        if (p.groups < kThreads) {
            if (thread < parts(p) * p.groups)
                partial(shared)[thread] = slabs_of(p, plan, n, thread % p.groups, thread / p.groups);
        } else {
            for (int group = thread; group < p.groups; group += kThreads)
                stats(shared)[group] = stats_of(p, slabs_of(p, plan, n, group, 0));
        }
    }

    static PDN_HD void merge_parts(const Problem& p, int thread, float* shared) {
        if (thread >= p.groups || p.groups >= kThreads) return;
        Moments m{};
        for (int part = 0; part < parts(p); ++part) m.merge(partial(shared)[part * p.groups + thread]);
        stats(shared)[thread] = stats_of(p, m);
    }

    static PDN_HD Stats stats_of(const Problem& p, const Moments& m) {
        return {m.mean, 1.f / sqrtf(divide(m.squares, m.count) + p.eps)};
    }

    static PDN_HD ChannelTerms terms_of(const Problem& p, int n, int c, float* shared) {
        if (c >= p.channels) return {};
        return channel_terms(p, stats(shared)[c / (p.channels / p.groups)], n, c);
    }

    static PDN_HD void make_terms(const Problem& p, const Plan& plan, int block, int thread, float* shared) {
        for (int c = thread; c < plan.vectors * kVector; c += kThreads)
            terms(p, shared)[c] = terms_of(p, block / plan.write_blocks, c, shared);
    }

    // One scale for the tensor: a thread keeps the terms of its eight channels and walks over the pixels.
    static PDN_HD void write(const Problem& p, const Plan& plan, int block, int thread, float* shared) {
        const int n = block / plan.write_blocks, first = block % plan.write_blocks * plan.write_pixels;
        const int lane = thread / plan.columns, end = smaller(p.pixels, first + plan.write_pixels);
        if (lane >= plan.lanes) return;
        const Grid g = load_grid(p.scale, p.zero_point);
        const float inverse = divide(1.f, g.scale);
        for (int vector = thread % plan.columns; vector < plan.vectors; vector += plan.columns) {
            const int channel = vector * kVector;
            ChannelTerms t[kVector];
#pragma unroll
            for (int i = 0; i < kVector; ++i) t[i] = terms_of(p, n, channel + i, shared);
            for (int pixel = first + lane; pixel < end; pixel += plan.lanes) {
                const int64_t row = static_cast<int64_t>(n) * p.pixels + pixel;
                Float4 x[2];
                load_pixel(p, plan, row, channel, x);
                transform(t, p.activation, x);
                store8_codes(p.output + row * p.channels + channel, x, g, inverse, p.channels - channel, plan.vector);
            }
        }
    }

    static PDN_HD void load_terms(const ChannelTerms* table, int vector, ChannelTerms (&t)[kVector]) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            const Float4 raw = shared4(reinterpret_cast<const float*>(table + vector * kVector + i));
            t[i] = {raw.v[0], raw.v[1], raw.v[2], raw.v[3]};
        }
    }

    // A scale per pixel: a warp takes a pixel; a lane every 32nd vector.
    static PDN_HD Range range_of_pixel(const Problem& p, const Plan& plan, int64_t row, int lane, float* shared) {
        Range range;
        for (int vector = lane; vector < plan.vectors; vector += 32) {
            Float4 x[2];
            ChannelTerms t[kVector];
            load_terms(terms(p, shared), vector, t);
            load_pixel(p, plan, row, vector * kVector, x);
            transform(t, p.activation, x);
            range.add8(x, p.channels - vector * kVector);
        }
        return range;
    }

    static PDN_HD void codes_of_pixel(const Problem& p, const Plan& plan, int64_t row, int lane, const Grid& g,
                                      float* shared) {
        for (int vector = lane; vector < plan.vectors; vector += 32) {
            const int channel = vector * kVector;
            Float4 x[2];
            ChannelTerms t[kVector];
            load_terms(terms(p, shared), vector, t);
            load_pixel(p, plan, row, channel, x);
            transform(t, p.activation, x);
            store8_codes(p.output + row * p.channels + channel, x, g, 0.f, p.channels - channel, plan.vector);
        }
        if (lane == 0) p.row_scale[row] = g.scale, p.row_zero_point[row] = g.zero_point;
    }
};

__global__ void __launch_bounds__(kThreads, 2)
    group_write_kernel(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
    extern __shared__ __align__(16) float shared[];
    GroupWrite::merge_slabs(p, plan, blockIdx.x, threadIdx.x, shared);
    __syncthreads();
    GroupWrite::merge_parts(p, threadIdx.x, shared);
    __syncthreads();
    GroupWrite::write(p, plan, blockIdx.x, threadIdx.x, shared);
}

__global__ void __launch_bounds__(kThreads, 2)
    group_write_dynamic_kernel(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
    extern __shared__ __align__(16) float shared[];
    GroupWrite::merge_slabs(p, plan, blockIdx.x, threadIdx.x, shared);
    __syncthreads();
    GroupWrite::merge_parts(p, threadIdx.x, shared);
    __syncthreads();
    GroupWrite::make_terms(p, plan, blockIdx.x, threadIdx.x, shared);
    __syncthreads();
    const int lane = threadIdx.x % 32, n = blockIdx.x / plan.write_blocks;
    const int first = blockIdx.x % plan.write_blocks * plan.write_pixels;
    const int end = smaller(p.pixels, first + plan.write_pixels);
    for (int pixel = first + threadIdx.x / 32; pixel < end; pixel += kWarps) {
        const int64_t row = static_cast<int64_t>(n) * p.pixels + pixel;
        const Range range = warp_range(GroupWrite::range_of_pixel(p, plan, row, lane, shared));
        GroupWrite::codes_of_pixel(p, plan, row, lane, grid_of_range(range.low, range.high, range.nan, false), shared);
    }
}

// --------------------------------------------------------------------------------------------------------- layer norm

// A warp takes a row, a lane every 32nd vector of it; the row is read several times, but only once from far away.
struct LayerNorm {
    static PDN_HD float sum(const Problem& p, const Plan& plan, int64_t row, int lane) {
        float sum = 0.f;
        for (int vector = lane; vector < plan.vectors; vector += 32) {
            Float4 x[2];
            load_pixel(p, plan, row, vector * kVector, x);
#pragma unroll
            for (int i = 0; i < kVector; ++i) sum += x[i / 4].v[i % 4];
        }
        return sum;
    }

    static PDN_HD float squares(const Problem& p, const Plan& plan, int64_t row, int lane, float mean) {
        float sum = 0.f;
        for (int vector = lane; vector < plan.vectors; vector += 32) {
            Float4 x[2];
            load_pixel(p, plan, row, vector * kVector, x);
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                const float d = vector * kVector + i < p.channels ? x[i / 4].v[i % 4] - mean : 0.f;
                sum = fmaf(d, d, sum);
            }
        }
        return sum;
    }

    static PDN_HD void normalised(const Problem& p, const Plan& plan, int64_t row, int vector, const Stats& stats,
                                  Float4 (&x)[2]) {
        const int n = static_cast<int>(row / p.pixels);
        ChannelTerms t[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            const int c = vector * kVector + i;
            t[i] = c < p.channels ? channel_terms(p, stats, n, c) : ChannelTerms{};
        }
        load_pixel(p, plan, row, vector * kVector, x);
        transform(t, 0, x);
    }

    static PDN_HD Range range(const Problem& p, const Plan& plan, int64_t row, int lane, const Stats& stats) {
        Range range;
        for (int vector = lane; vector < plan.vectors; vector += 32) {
            Float4 x[2];
            normalised(p, plan, row, vector, stats, x);
            range.add8(x, p.channels - vector * kVector);
        }
        return range;
    }

    static PDN_HD void codes(const Problem& p, const Plan& plan, int64_t row, int lane, const Stats& stats,
                             const Grid& g) {
        for (int vector = lane; vector < plan.vectors; vector += 32) {
            Float4 x[2];
            normalised(p, plan, row, vector, stats, x);
            store8_codes(p.output + row * p.channels + vector * kVector, x, g, 0.f, p.channels - vector * kVector,
                         plan.vector);
        }
        if (lane == 0 && !p.scale) p.row_scale[row] = g.scale, p.row_zero_point[row] = g.zero_point;
    }
};

__global__ void __launch_bounds__(kThreads)
    layer_norm_kernel(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
    const int lane = threadIdx.x % 32;
    const int64_t rows = static_cast<int64_t>(p.batch) * p.pixels, step = static_cast<int64_t>(gridDim.x) * kWarps;
    const float channels = static_cast<float>(p.channels);
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; row < rows; row += step) {
        const float mean = divide(warp_sum(LayerNorm::sum(p, plan, row, lane)), channels);
        const float squares = warp_sum(LayerNorm::squares(p, plan, row, lane, mean));
        const Stats stats = GroupWrite::stats_of(p, {channels, mean, squares});
        Grid g;
        if (p.scale) {
            g = load_grid(p.scale, p.zero_point);
        } else {
            const Range range = warp_range(LayerNorm::range(p, plan, row, lane, stats));
            g = grid_of_range(range.low, range.high, range.nan, false);
        }
        LayerNorm::codes(p, plan, row, lane, stats, g);
    }
}

// --------------------------------------------------------------------------------------------------------- launchers

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int divide_up(int64_t x, int64_t y) { return static_cast<int>((x + y - 1) / y); }

int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

bool whole_vectors(const Problem& p) {
    return p.channels % kVector == 0 && p.first_channels % kVector == 0 && aligned(p.input, 16) &&
           aligned(p.skip, 16) && aligned(p.output, 8);
}

Plan make_plan(const Problem& p, int multiprocessors) {
    Plan plan{};
    plan.vector = whole_vectors(p);
    plan.vectors = divide_up(p.channels, kVector);
    plan.columns = smaller(plan.vectors, kThreads);
    plan.lanes = kThreads / plan.columns;
    const int batch = p.batch > 0 ? p.batch : 1;
    // At least eight pixels a lane: a block's start and its merging cost as much as a few pixels.
    const int wanted = divide_up(2 * multiprocessors, batch), useful = divide_up(p.pixels, 8 * plan.lanes);
    plan.slab_pixels = divide_up(p.pixels, clamp(smaller(wanted, useful), 1, kMaxSlabs));
    plan.slabs = divide_up(p.pixels, plan.slab_pixels);
    const int at_once = p.scale ? plan.lanes : kWarps;
    const int blocks = smaller(divide_up(2 * multiprocessors, batch), divide_up(p.pixels, 4 * at_once));
    plan.write_pixels = divide_up(p.pixels, clamp(blocks, 1, 1 << 16));
    plan.write_blocks = divide_up(p.pixels, plan.write_pixels);
    plan.stats_shared = 4 * (static_cast<int64_t>(plan.lanes) * plan.columns * kVector * 2 + 2 * p.channels);
    const int64_t terms = p.scale ? 0 : 4 * plan.vectors * kVector;
    plan.write_shared = 4 * (3 * kThreads + (2 * p.groups + 3) / 4 * 4 + terms);
    return plan;
}

const char* launch(void (*kernel)(Problem, Plan), const Problem& p, const Plan& plan, int64_t blocks,
                   int64_t shared_bytes, void* stream) {
    if (blocks > 0x7fffffff) return "the output needs more than 2^31 blocks";
    if (shared_bytes > 48 << 10) {
        const auto wide = cudaFuncAttributeMaxDynamicSharedMemorySize;
        const cudaError_t error = cudaFuncSetAttribute(kernel, wide, static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    kernel<<<static_cast<unsigned>(blocks), kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(p, plan);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

namespace norm_quantize {
namespace cuda {

int current_multiprocessors() {
    int device = 0, multiprocessors = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    return multiprocessors > 0 ? multiprocessors : 1;
}

int64_t workspace_floats(const Problem& p, int multiprocessors) {
    return static_cast<int64_t>(p.batch) * make_plan(p, multiprocessors).slabs * p.groups * 2;
}

const char* group_norm(const Problem& p, int multiprocessors, void* stream) {
    if (p.channels > kMaxChannels) return "more channels than fit in shared memory";
    if (p.batch == 0 || p.pixels == 0) return nullptr;
    const Plan plan = make_plan(p, multiprocessors);
    const int64_t slabs = static_cast<int64_t>(p.batch) * plan.slabs;
    if (const char* why = launch(group_stats_kernel, p, plan, slabs, plan.stats_shared, stream)) return why;
    return launch(p.scale ? group_write_kernel : group_write_dynamic_kernel, p, plan,
                  static_cast<int64_t>(p.batch) * plan.write_blocks, plan.write_shared, stream);
}

const char* layer_norm(const Problem& p, void* stream) {
    const int64_t rows = static_cast<int64_t>(p.batch) * p.pixels, limit = 1 << 20;
    if (rows == 0) return nullptr;
    Plan plan{};
    plan.vector = whole_vectors(p);
    plan.vectors = divide_up(p.channels, kVector);
    const int64_t blocks = (rows + kWarps - 1) / kWarps;
    return launch(layer_norm_kernel, p, plan, blocks < limit ? blocks : limit, 0, stream);
}

}  // namespace cuda
}  // namespace norm_quantize
}  // namespace pdn
