// int8 convolutions that are no matrix product for tensor cores: channels that are no multiple of 16 (first and last
// layers, odd groups), and depthwise ones. Also the last step of layers whose depth was split.
//
// A function of the thread's number does the work of a thread: tests/native runs it on the host as it is.
#pragma once

#include "cuda_epilogue.cuh"

namespace pdn {
namespace {

constexpr int kDirectThreads = 256;

PDN_HD uint32_t load_word(const int8_t* p) { return *reinterpret_cast<const uint32_t*>(p); }

PDN_HD int signed_byte(uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i)); }

// ------------------------------------------------------------------------------------------------------------- direct

// A thread sums one pixel's four channels. Neighbouring threads take neighbouring channels, then the next pixel.
struct Direct {
    // One tap's sums of weight * (code - zero_point), of four channels `depth` bytes of weight apart.
    static PDN_HD void add_tap(const int8_t* x, const int8_t* w, int64_t depth, int channels, int count, bool words,
                               int zero_point, int (&sum)[4]) {
        if (words) {
            int weights[4] = {};
            for (int c = 0; c < channels; c += 4) {
                const uint32_t codes = load_word(x + c);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (j < count) {
                        const uint32_t word = load_word(w + j * depth + c);
                        sum[j] = dot4(codes, word, sum[j]), weights[j] = dot4(0x01010101u, word, weights[j]);
                    }
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[j] -= zero_point * weights[j];
        } else {
            for (int c = 0; c < channels; ++c) {
                const int code = x[c] - zero_point;
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (j < count) sum[j] += code * w[j * depth + c];
            }
        }
    }

    static PDN_HD void compute(const Problem& p, const Plan& plan, int64_t item) {
        const int quads = (plan.group_out + 3) / 4, per_row = quads * p.groups;
        const int64_t row = item / per_row;
        if (row >= plan.rows) return;
        const int rest = static_cast<int>(item % per_row), group = rest / quads, first = rest % quads * 4;
        const int channel = group * plan.group_out + first;
        const int count = plan.group_out - first < 4 ? plan.group_out - first : 4;
        const Position o = position_of(p, static_cast<uint32_t>(row));
        const int64_t depth = static_cast<int64_t>(p.kernel_h) * p.kernel_w * plan.group_in;
        const int zero_point = p.zero_point && !p.per_pixel ? *p.zero_point : 0;
        Sums sums{};
        for (int ky = 0; ky < p.kernel_h; ++ky)
            for (int kx = 0; kx < p.kernel_w; ++kx) {
                int iy, ix;
                if (!source_pixel(p, o.y, o.x, ky, kx, iy, ix)) continue;
                const int8_t* x = pixel_address(p, o.n, iy, ix) + group * plan.group_in;
                const int8_t* w = p.weight + channel * depth + (ky * p.kernel_w + kx) * plan.group_in;
                if (p.per_pixel) {
                    const PixelGrid g = pixel_grid(p, o, ky, kx);
                    int tap[4] = {};
                    add_tap(x, w, depth, plan.group_in, count, plan.words, g.zero_point, tap);
#pragma unroll
                    for (int j = 0; j < 4; ++j) sums.f.v[j] += g.scale * static_cast<float>(tap[j]);
                } else {
                    add_tap(x, w, depth, plan.group_in, count, plan.words, zero_point, sums.i);
                }
            }
        TermsCache cache;
        finish4(p, plan, row, channel, sums, cache.of(p, o.n, channel), count, plan.vector_out && count == 4);
    }
};

__global__ void __launch_bounds__(kDirectThreads, 4)
    direct_kernel(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
    Direct::compute(p, plan, static_cast<int64_t>(blockIdx.x) * kDirectThreads + threadIdx.x);
}

// ---------------------------------------------------------------------------------------------------------- depthwise

// A block takes 64 channels of 64 neighbouring pixels of a row; a thread four channels of four pixels. The weights of
// the block's channels lie in shared memory as [tap][channel].
struct Depthwise {
    static constexpr int kChannels = 64, kPixels = 4, kRun = kDirectThreads / (kChannels / 4) * kPixels;
    static constexpr int kMaxTaps = 512;

    struct Place {
        int n, y, x, channel;
    };

    static PDN_HD Place place_of(const Problem& p, const Plan& plan, uint32_t block) {
        const uint32_t channels = block % plan.tiles_n;
        block /= plan.tiles_n;
        const uint32_t x = block % plan.tiles_m;
        block /= plan.tiles_m;
        return {static_cast<int>(block / p.out_h), static_cast<int>(block % p.out_h), static_cast<int>(x * kRun),
                static_cast<int>(channels * kChannels)};
    }

    static PDN_HD void stage(const Problem& p, const Place& place, int thread, int8_t* shared) {
        const int taps = p.kernel_h * p.kernel_w;
        for (int i = thread; i < taps * kChannels; i += kDirectThreads) {
            const int channel = place.channel + i / taps;
            shared[i % taps * kChannels + i / taps] =
                channel < p.out_channels ? p.weight[static_cast<int64_t>(channel) * taps + i % taps] : 0;
        }
    }

    static PDN_HD void compute(const Problem& p, const Plan& plan, const Place& place, int thread,
                               const int8_t* shared) {
        const int quad = thread % (kChannels / 4) * 4, channel = place.channel + quad;
        const int x = place.x + thread / (kChannels / 4) * kPixels;
        const int count = p.out_channels - channel < 4 ? p.out_channels - channel : 4;
        if (count <= 0 || x >= p.out_w) return;
        const int zero_point = p.zero_point && !p.per_pixel ? *p.zero_point : 0;
        Sums sums[kPixels] = {};
        for (int ky = 0; ky < p.kernel_h; ++ky)
            for (int kx = 0; kx < p.kernel_w; ++kx) {
                const uint32_t w = load_word(shared + (ky * p.kernel_w + kx) * kChannels + quad);
#pragma unroll
                for (int i = 0; i < kPixels; ++i)
                    add_tap(p, plan, {place.n, place.y, x + i}, ky, kx, channel, count, zero_point, w, sums[i]);
            }
        TermsCache cache;
        const ChannelTerms& terms = cache.of(p, place.n, channel);
        const int64_t row = (static_cast<int64_t>(place.n) * p.out_h + place.y) * p.out_w + x;
#pragma unroll
        for (int i = 0; i < kPixels; ++i)
            if (x + i < p.out_w)
                finish4(p, plan, row + i, channel, sums[i], terms, count, plan.vector_out && count == 4);
    }

    static PDN_HD void add_tap(const Problem& p, const Plan& plan, const Position& o, int ky, int kx, int channel,
                               int count, int zero_point, uint32_t w, Sums& sums) {
        int iy, ix;
        if (!source_pixel(p, o.y, o.x, ky, kx, iy, ix)) return;
        const int8_t* from = pixel_address(p, o.n, iy, ix);
        uint32_t codes = 0;
        if (plan.words) {
            codes = load_word(from + channel);
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (j < count) codes |= (from[(channel + j) / plan.group_out] & 0xffu) << (8 * j);
        }
        if (p.per_pixel) {
            const PixelGrid g = pixel_grid(p, o, ky, kx);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                sums.f.v[j] += g.scale * static_cast<float>((signed_byte(codes, j) - g.zero_point) * signed_byte(w, j));
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums.i[j] += (signed_byte(codes, j) - zero_point) * signed_byte(w, j);
        }
    }
};

__global__ void __launch_bounds__(kDirectThreads, 2)
    depthwise_kernel(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
    extern __shared__ __align__(16) int8_t weights[];
    const Depthwise::Place place = Depthwise::place_of(p, plan, blockIdx.x);
    Depthwise::stage(p, place, threadIdx.x, weights);
    __syncthreads();
    Depthwise::compute(p, plan, place, threadIdx.x, weights);
}

// ------------------------------------------------------------------------------------------------------- split depths

// Adds the splits' sums, always in the same order, and finishes them: a thread takes four channels of one pixel.
struct Reduce {
    static PDN_HD void compute(const Problem& p, const Plan& plan, int64_t item) {
        const int quads = (p.out_channels + 3) / 4;
        const int64_t row = item / quads;
        if (row >= plan.rows) return;
        const int channel = static_cast<int>(item % quads) * 4;
        const int count = p.out_channels - channel < 4 ? p.out_channels - channel : 4;
        const bool vector = plan.vector_out && count == 4;
        const int64_t slab = static_cast<int64_t>(plan.rows) * p.out_channels;
        const float* from = static_cast<const float*>(p.workspace) + row * p.out_channels + channel;
        Sums sums{};
        for (int split = 0; split < plan.splits; ++split, from += slab) {
            Sums part;
            part.f = load4_any(from, Element::float32, 0, count, vector);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (plan.per_tap)
                    sums.f.v[j] += part.f.v[j];
                else
                    sums.i[j] += part.i[j];
            }
        }
        TermsCache cache;
        const int n = static_cast<int>(row / (p.out_h * p.out_w));
        finish4(p, plan, row, channel, sums, cache.of(p, n, channel), count, vector);
    }
};

__global__ void __launch_bounds__(kDirectThreads, 4)
    reduce_kernel(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
    Reduce::compute(p, plan, static_cast<int64_t>(blockIdx.x) * kDirectThreads + threadIdx.x);
}

}  // namespace
}  // namespace pdn
