// int8 convolution on mma.sync m16n8k32 (sm_80 and later): a matrix product whose left operand is gathered from the
// image.
//
// A block computes BM pixels x BN channels. Depth blocks of 64 bytes go through a ring of kStages buffers, filled by
// 16-byte cp.async; rows of 64 bytes are swizzled so that neither the copies nor ldmatrix meet a bank twice. Outside
// the image the operand holds the zero point, copied from a small table: then acc = sum w x - zp * sum w, and the sums
// of the weights are formed from the fragments as they pass (dp4a), so that nothing depends on prepared weights.
//
// PER_TAP: a scale per pixel. Depth blocks do not cross taps; after a tap's last block its integers are scaled, each
// row by its own pixel, and added up in float32.
#pragma once

#include "../core/cuda_mma.cuh"
#include "cuda_epilogue.cuh"

namespace pdn {
namespace {

// ------------------------------------------------------------------------------------------------------------ padding

// A 16-byte row for every zero point.
struct PaddingTable {
    alignas(16) int8_t rows[256][16];
    constexpr PaddingTable() : rows{} {
        for (int z = -128; z < 128; ++z)
            for (int i = 0; i < 16; ++i) rows[z + 128][i] = static_cast<int8_t>(z);
    }
};
__device__ const PaddingTable padding_table{};

__device__ __forceinline__ const int8_t* padding_row(const Problem& p) {
    const int zero_point = p.zero_point && !p.per_pixel ? *p.zero_point : 0;  // a device value, which nobody checked
    return padding_table.rows[(zero_point < -128 ? -128 : zero_point > 127 ? 127 : zero_point) + 128];
}

// ------------------------------------------------------------------------------------------------------------- shapes

// Where chunk `chunk` of row `row` lies in an operand's buffer with rows of 64 bytes.
PDN_HD int swizzled64(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4); }

template <int BM_, int BN_, int WARPS_M, int WARPS_N, bool PER_TAP_>
struct MmaTile {
    static constexpr int BM = BM_, BN = BN_, BK = 64, kStages = 4;
    static constexpr bool PER_TAP = PER_TAP_;
    static constexpr int kThreads = 32 * WARPS_M * WARPS_N;
    static constexpr int MT = BM / WARPS_M / 16, NT = BN / WARPS_N / 8;  // 16 x 8 tiles of a warp
    static constexpr int kStageBytes = (BM + BN) * BK;
    static constexpr int kRowStep = kThreads / (BK / 16);  // between a thread's copies
    static constexpr int kPitch = BN + 4;                  // words of a row of sums
    static constexpr int kRingBytes = kStages * kStageBytes, kSumBytes = BM * kPitch * 4;
    static constexpr int kSharedBytes = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;
    using Loader = Gather<BK, BM / kRowStep, BN / kRowStep>;
    static_assert(BM % kRowStep == 0 && BN % kRowStep == 0 && NT % 2 == 0);

    // Byte offsets in a stage at which `lane` of a warp addresses its ldmatrix: 16 pixels x 32 bytes of depth, and
    // 16 channels x 32 bytes. The four matrices come out as the registers of A, and as those of B for two tiles.
    static PDN_HD int a_offset(int warp, int lane, int tile, int step) {
        const int row = warp / WARPS_N * (MT * 16) + tile * 16 + (lane & 15);
        return swizzled64(row, step * 2 + (lane >> 4));
    }
    static PDN_HD int b_offset(int warp, int lane, int pair, int step) {
        const int row = warp % WARPS_N * (NT * 8) + pair * 16 + (lane & 7) + (lane >> 4 << 3);
        return BM * BK + swizzled64(row, step * 2 + (lane >> 3 & 1));
    }
    // Row and column of the sums d[half * 2 + {0, 1}] of a 16 x 8 tile, within the block's tile.
    static PDN_HD int sum_row(int warp, int lane, int tile, int half) {
        return warp / WARPS_N * (MT * 16) + tile * 16 + half * 8 + (lane >> 2);
    }
    static PDN_HD int sum_column(int warp, int lane, int tile) {
        return warp % WARPS_N * (NT * 8) + tile * 8 + (lane & 3) * 2;
    }
    static PDN_HD int copy_offset(int thread, int i, bool is_weight) {
        return (is_weight ? BM * BK : 0) + swizzled64(thread / (BK / 16) + i * kRowStep, thread % (BK / 16));
    }
};

struct DepthRange {
    int begin, end;
};

PDN_HD DepthRange depth_range(const Plan& plan, int split) {
    const int begin = split * plan.blocks_per_split, end = begin + plan.blocks_per_split;
    return {begin, end < plan.depth_blocks ? end : plan.depth_blocks};
}

// One row's sum of a tap, scaled by the pixel that the tap read.
PDN_HD float scaled_sum(const PixelGrid& g, int sum, int weight_sum) {
    return g.scale == 0.f ? 0.f : g.scale * static_cast<float>(sum - g.zero_point * weight_sum);
}

// ------------------------------------------------------------------------------------------------------------- kernel

template <class Tile>
struct MmaSums {
    int sums[Tile::MT][Tile::NT][4];
    int weights[Tile::NT];  // this lane's share of the weights' sum in column lane / 4
};

template <class Tile>
__device__ __forceinline__ void mma_stage(uint32_t stage, int warp, int lane, bool count_weights, MmaSums<Tile>& acc) {
#pragma unroll
    for (int step = 0; step < Tile::BK / 32; ++step) {
        uint32_t a[Tile::MT][4], b[Tile::NT / 2][4];
#pragma unroll
        for (int i = 0; i < Tile::MT; ++i) load_matrices(a[i], stage + Tile::a_offset(warp, lane, i, step));
#pragma unroll
        for (int j = 0; j < Tile::NT / 2; ++j) load_matrices(b[j], stage + Tile::b_offset(warp, lane, j, step));
#pragma unroll
        for (int i = 0; i < Tile::MT; ++i)
#pragma unroll
            for (int j = 0; j < Tile::NT; ++j)
                multiply(acc.sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        if (count_weights)
#pragma unroll
            for (int j = 0; j < Tile::NT; ++j) {
                acc.weights[j] = __dp4a(static_cast<int>(b[j / 2][j % 2 * 2]), 0x01010101, acc.weights[j]);
                acc.weights[j] = __dp4a(static_cast<int>(b[j / 2][j % 2 * 2 + 1]), 0x01010101, acc.weights[j]);
            }
    }
}

// The weights' sums of this lane's two columns of tile `j`, from the shares of the lanes that hold them.
template <class Tile>
__device__ __forceinline__ void weight_sums(const MmaSums<Tile>& acc, int j, int lane, int (&w)[2]) {
    int share = acc.weights[j];
    share += __shfl_xor_sync(kEveryLane, share, 1);
    share += __shfl_xor_sync(kEveryLane, share, 2);
    w[0] = __shfl_sync(kEveryLane, share, (lane & 3) * 8);
    w[1] = __shfl_sync(kEveryLane, share, (lane & 3) * 8 + 4);
}

// Adds a tap's sums, scaled row by row, and clears them.
template <class Tile>
__device__ __forceinline__ void add_tap(const Problem& p, const Plan& plan, const TilePlace& tile, int tap, int warp,
                                        int lane, MmaSums<Tile>& acc, float (&total)[Tile::MT][Tile::NT][4]) {
    const int ky = tap / p.kernel_w, kx = tap % p.kernel_w;
    int w[Tile::NT][2];
#pragma unroll
    for (int j = 0; j < Tile::NT; ++j) weight_sums(acc, j, lane, w[j]), acc.weights[j] = 0;
#pragma unroll
    for (int i = 0; i < Tile::MT; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = tile.row + Tile::sum_row(warp, lane, i, half);
            const PixelGrid g = row < plan.rows ? pixel_grid(p, position_of(p, row), ky, kx) : PixelGrid{0.f, 0};
#pragma unroll
            for (int j = 0; j < Tile::NT; ++j)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    total[i][j][half * 2 + c] += scaled_sum(g, acc.sums[i][j][half * 2 + c], w[j][c]);
                    acc.sums[i][j][half * 2 + c] = 0;
                }
        }
}

// Sums to shared memory, the zero point's share taken off.
template <class Tile>
__device__ __forceinline__ void stage_sums(const Problem& p, const Plan& plan, const TilePlace& tile, int warp,
                                           int lane, const MmaSums<Tile>& acc, int* shared) {
    const int zero_point = p.zero_point && !p.per_pixel ? *p.zero_point : 0;
    int w[Tile::NT][2];
#pragma unroll
    for (int j = 0; j < Tile::NT; ++j) weight_sums(acc, j, lane, w[j]);
#pragma unroll
    for (int i = 0; i < Tile::MT; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = Tile::sum_row(warp, lane, i, half);
            const int offset = tile.row + row < plan.rows ? row_zero_point(p, zero_point, tile.row + row) : 0;
#pragma unroll
            for (int j = 0; j < Tile::NT; ++j) {
                const int at = row * Tile::kPitch + Tile::sum_column(warp, lane, j);
                *reinterpret_cast<int2*>(shared + at) = {acc.sums[i][j][half * 2] - offset * w[j][0],
                                                         acc.sums[i][j][half * 2 + 1] - offset * w[j][1]};
            }
        }
}

template <class Tile>
__device__ __forceinline__ void stage_total(int warp, int lane, const float (&total)[Tile::MT][Tile::NT][4],
                                            int* shared) {
#pragma unroll
    for (int i = 0; i < Tile::MT; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int j = 0; j < Tile::NT; ++j) {
                const int at = Tile::sum_row(warp, lane, i, half) * Tile::kPitch + Tile::sum_column(warp, lane, j);
                *reinterpret_cast<int2*>(shared + at) = {__float_as_int(total[i][j][half * 2]),
                                                         __float_as_int(total[i][j][half * 2 + 1])};
            }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 512 / Tile::kThreads)
    mma_kernel(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
    extern __shared__ __align__(1024) int8_t ring[];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const TilePlace tile = place_of<Tile::BM, Tile::BN>(p, plan, blockIdx.x);
    const DepthRange depth = depth_range(plan, tile.split);
    const int blocks = depth.end - depth.begin;
    const int8_t* padding = padding_row(p);
    const uint32_t base = shared_address(ring);

    typename Tile::Loader loader;
    loader.start(p, plan, tile, depth.begin, thread % (Tile::BK / 16), thread / (Tile::BK / 16), Tile::kRowStep);
    auto load = [&](int block) {
        const uint32_t stage = base + block % Tile::kStages * Tile::kStageBytes;
        if (block < blocks)
            loader.next(p, plan, padding, Tile::kRowStep, [&](int i, bool is_weight, const int8_t* from, bool exists) {
                copy16(stage + Tile::copy_offset(thread, i, is_weight), from, exists);
            });
        copies_commit();
    };
    for (int block = 0; block < Tile::kStages - 1; ++block) load(block);

    MmaSums<Tile> acc{};
    float total[Tile::MT][Tile::NT][4];
    if constexpr (Tile::PER_TAP) memset(total, 0, sizeof total);
    const bool count_weights = p.zero_point != nullptr;
    const int blocks_per_tap = plan.wrap / Tile::BK;
    for (int block = 0; block < blocks; ++block) {
        copies_wait<Tile::kStages - 2>();
        __syncthreads();  // the block has arrived, and every warp is done with the one before
        load(block + Tile::kStages - 1);
        mma_stage<Tile>(base + block % Tile::kStages * Tile::kStageBytes, warp, lane, count_weights, acc);
        if constexpr (Tile::PER_TAP) {
            const int next = depth.begin + block + 1;
            if (next % blocks_per_tap == 0)  // splits end with a tap, too
                add_tap<Tile>(p, plan, tile, next / blocks_per_tap - 1, warp, lane, acc, total);
        }
    }
    copies_wait<0>();
    __syncthreads();
    int* sums = reinterpret_cast<int*>(ring);
    if constexpr (Tile::PER_TAP)
        stage_total<Tile>(warp, lane, total, sums);
    else
        stage_sums<Tile>(p, plan, tile, warp, lane, acc, sums);
    __syncthreads();
    finish_tile<Tile::BM, Tile::BN, Tile::kThreads>(p, plan, tile, thread, sums, Tile::kPitch);
}

using TileLarge = MmaTile<128, 128, 2, 4, false>;
using TileSmall = MmaTile<64, 64, 2, 2, false>;
using TileTapLarge = MmaTile<128, 64, 4, 2, true>;
using TileTapSmall = MmaTile<64, 64, 2, 2, true>;

}  // namespace
}  // namespace pdn
