// Index maps of the int8 convolution as a matrix product: rows are output pixels, the depth is (tap, channel).
//
// Depth positions are those of the weight's memory: tap * channels + channel. Threads copy 16 bytes at a time, so a
// group's channels are a multiple of 16 here. A depth block of BK bytes holds BK / 16 chunks, and a thread always
// copies the same one of them, for several rows; its (tap, channel) is kept up by addition.
#pragma once

#include "../core/cuda_quantize.cuh"
#include "cuda.h"

namespace pdn {
namespace {

using int8_conv2d::cuda::Problem;

// How a problem is cut into blocks.
struct Plan {
    int kind;  // one of Kind
    int tiles_m, tiles_n, splits;
    int group_in, group_out;  // channels of one group
    int rows;                 // output pixels
    int wrap;                 // depth bytes from one tap to the next: group_in, or that rounded up to whole blocks
    int depth_blocks, blocks_per_split;
    int64_t blocks;
    bool per_tap;     // a scale per pixel and more than one tap: taps are scaled as they are added
    bool vector_out;  // four channels of output and residual in one access
    bool words;       // four channels of input and weight in one access
};

struct Position {
    int n, y, x;
};

PDN_HD Position position_of(const Problem& p, uint32_t row) {
    const uint32_t x = row % p.out_w, rest = row / p.out_w;
    return {static_cast<int>(rest / p.out_h), static_cast<int>(rest % p.out_h), static_cast<int>(x)};
}

// The pixel that a tap of an output reads, as stored; false outside the image.
PDN_HD bool source_pixel(const Problem& p, int y, int x, int ky, int kx, int& iy, int& ix) {
    iy = y * p.stride_h - p.top + ky * p.dilation_h, ix = x * p.stride_w - p.left + kx * p.dilation_w;
    const bool inside = static_cast<unsigned>(iy) < static_cast<unsigned>(p.in_h << p.upsample_shift) &&
                        static_cast<unsigned>(ix) < static_cast<unsigned>(p.in_w << p.upsample_shift);
    iy >>= p.upsample_shift, ix >>= p.upsample_shift;
    return inside;
}

PDN_HD const int8_t* pixel_address(const Problem& p, int n, int iy, int ix) {
    return p.input + n * p.in_stride_n + iy * p.in_stride_h + ix * p.in_stride_w;
}

// Scale and zero point of the pixel that a tap reads; a scale of 0 outside the image, where nothing is added.
struct PixelGrid {
    float scale;
    int zero_point;
};

PDN_HD PixelGrid pixel_grid(const Problem& p, const Position& o, int ky, int kx) {
    int iy, ix;
    if (!source_pixel(p, o.y, o.x, ky, kx, iy, ix)) return {0.f, 0};
    const int64_t i = (static_cast<int64_t>(o.n) * p.in_h + iy) * p.in_w + ix;
    return {p.input_scale[i], p.zero_point ? p.zero_point[i] : 0};
}

// Which tile a block computes; tiles along the channels are neighbours, so that they share input pixels in the cache.
struct TilePlace {
    int row, channel;  // first output pixel, first channel within the group
    int group, split;
};

template <int BM, int BN>
PDN_HD TilePlace place_of(const Problem& p, const Plan& plan, uint32_t block) {
    const uint32_t n = block % plan.tiles_n;
    block /= plan.tiles_n;
    const uint32_t m = block % plan.tiles_m;
    block /= plan.tiles_m;
    return {static_cast<int>(m * BM), static_cast<int>(n * BN), static_cast<int>(block % p.groups),
            static_cast<int>(block / p.groups)};
}

// One thread's share of the copies of a block: ROWS_A pixels, ROWS_B weight rows, one chunk of each per depth block.
template <int BK, int ROWS_A, int ROWS_B>
struct Gather {
    static constexpr int kChunks = BK / 16;
    const int8_t* image[ROWS_A];  // of the row's batch and group
    int y[ROWS_A], x[ROWS_A];     // output pixel; rows beyond the last lie far outside every image
    const int8_t* weight;         // row of this thread's first output channel
    int rows_left;                // weight rows from that one on
    int channel, ky, kx;

    // `row` and `weight_row` are this thread's first; the others follow `step` rows apart.
    PDN_HD void start(const Problem& p, const Plan& plan, const TilePlace& tile, int first_block, int chunk, int row,
                      int step) {
#pragma unroll
        for (int i = 0; i < ROWS_A; ++i) {
            const int m = tile.row + row + i * step;
            const bool exists = m < plan.rows;
            const Position o = position_of(p, exists ? m : 0);
            image[i] = p.input + o.n * p.in_stride_n + tile.group * plan.group_in;
            y[i] = exists ? o.y * p.stride_h - p.top : -(1 << 30);
            x[i] = o.x * p.stride_w - p.left;
        }
        const int64_t depth = static_cast<int64_t>(p.kernel_h) * p.kernel_w * plan.group_in;
        const int first = tile.channel + row;
        rows_left = plan.group_out - first;
        weight = p.weight + (static_cast<int64_t>(tile.group) * plan.group_out + (rows_left > 0 ? first : 0)) * depth;
        const uint32_t position = static_cast<uint32_t>(first_block) * BK + chunk * 16;
        const uint32_t tap = position / plan.wrap;
        channel = static_cast<int>(position % plan.wrap);
        ky = static_cast<int>(tap / p.kernel_w), kx = static_cast<int>(tap % p.kernel_w);
    }

    // Copies this thread's chunks of the current depth block through copy(i, is_weight, source, exists), then moves on
    // to the next block. `padding` holds 16 zero points.
#pragma nv_exec_check_disable  // the host check's copies are host functions
    template <typename Copy>
    PDN_HD void next(const Problem& p, const Plan& plan, const int8_t* padding, int step, Copy&& copy) {
        const bool exists = channel < plan.group_in && ky < p.kernel_h;
        const int dy = ky * p.dilation_h, dx = kx * p.dilation_w;
        const unsigned high = p.in_h << p.upsample_shift, wide = p.in_w << p.upsample_shift;
#pragma unroll
        for (int i = 0; i < ROWS_A; ++i) {
            const int iy = y[i] + dy, ix = x[i] + dx;
            const bool inside = static_cast<unsigned>(iy) < high && static_cast<unsigned>(ix) < wide;
            const int8_t* from = image[i] + (iy >> p.upsample_shift) * p.in_stride_h +
                                 (ix >> p.upsample_shift) * p.in_stride_w + channel;
            copy(i, false, inside && exists ? from : padding, exists);
        }
        const int64_t depth = static_cast<int64_t>(p.kernel_h) * p.kernel_w * plan.group_in;
        const int8_t* from = weight + ((ky * p.kernel_w + kx) * plan.group_in + channel);
#pragma unroll
        for (int i = 0; i < ROWS_B; ++i) {
            const bool taken = exists && i * step < rows_left;
            copy(i, true, taken ? from + i * step * depth : padding, taken);
        }
        channel += BK;
        while (channel >= plan.wrap) {
            channel -= plan.wrap;
            if (++kx == p.kernel_w) kx = 0, ++ky;
        }
    }
};

}  // namespace
}  // namespace pdn
