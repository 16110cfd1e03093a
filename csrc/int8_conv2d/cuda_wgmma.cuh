// int8 convolution on wgmma (sm_90a): the matrix product of cuda_mma.cuh, read by the tensor cores from shared memory.
//
// Two warpgroups take 64 of a block's 128 pixels each and all of its BN channels. Depth blocks of 128 bytes come by the
// same 16-byte cp.async (a gather, which the bulk copy engine cannot do for every stride and dilation), in the layout
// of a 128-byte swizzle. Two blocks share a multiprocessor: while one waits at its barrier, the other's products run.
#pragma once

#include "../core/cuda_wgmma.cuh"
#include "cuda_mma.cuh"

namespace pdn {
namespace {

// ------------------------------------------------------------------------------------------------------- instructions

// d += A B for 64 rows, N columns, 32 bytes of depth; A and B are descriptors of operands in shared memory.
template <int N>
__device__ __forceinline__ void multiply_async(int (&d)[N / 2], uint64_t a, uint64_t b);

template <>
__device__ __forceinline__ void multiply_async<64>(int (&d)[32], uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p;\n}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]),
          "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), "+r"(d[16]),
          "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]),
          "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31])
        : "l"(a), "l"(b), "r"(1));
#endif
}

template <>
__device__ __forceinline__ void multiply_async<128>(int (&d)[64], uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p;\n}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]),
          "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), "+r"(d[16]),
          "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]),
          "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]), "+r"(d[32]),
          "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]), "+r"(d[40]),
          "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]), "+r"(d[48]),
          "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]), "+r"(d[56]),
          "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63])
        : "l"(a), "l"(b), "r"(1));
#endif
}

template <>
__device__ __forceinline__ void multiply_async<160>(int (&d)[80], uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %82, 0;\nwgmma.mma_async.sync.aligned.m64n160k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79}, "
        "%80, %81, p;\n}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]),
          "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), "+r"(d[16]),
          "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]),
          "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]), "+r"(d[32]),
          "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]), "+r"(d[40]),
          "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]), "+r"(d[48]),
          "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]), "+r"(d[56]),
          "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63]), "+r"(d[64]),
          "+r"(d[65]), "+r"(d[66]), "+r"(d[67]), "+r"(d[68]), "+r"(d[69]), "+r"(d[70]), "+r"(d[71]), "+r"(d[72]),
          "+r"(d[73]), "+r"(d[74]), "+r"(d[75]), "+r"(d[76]), "+r"(d[77]), "+r"(d[78]), "+r"(d[79])
        : "l"(a), "l"(b), "r"(1));
#endif
}

// ------------------------------------------------------------------------------------------------------------- shapes

template <int BN_>
struct WgmmaTile {
    static constexpr int BM = 128, BN = BN_, BK = 128, kStages = 3;
    static constexpr int kThreads = 256;
    static constexpr int kStageBytes = (BM + BN) * BK;
    static constexpr int kRowStep = kThreads / (BK / 16);
    static constexpr int kRowsB = BN / kRowStep;
    static constexpr int kPitch = BN + 4;
    static constexpr int kRingBytes = kStages * kStageBytes, kSumBytes = (BM * kPitch + BN) * 4;
    static constexpr int kSharedBytes = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;
    using Loader = Gather<BK, BM / kRowStep, kRowsB>;
    static_assert(BN % kRowStep == 0 && kStageBytes % 1024 == 0);

    // Row and column of the sum d[tile * 4 + half * 2 + {0, 1}].
    static PDN_HD int sum_row(int warp, int lane, int half) { return warp * 16 + half * 8 + (lane >> 2); }
    static PDN_HD int sum_column(int lane, int tile) { return tile * 8 + (lane & 3) * 2; }
    static PDN_HD int copy_offset(int thread, int i, bool is_weight) {
        return (is_weight ? BM * BK : 0) + swizzled128(thread / (BK / 16) + i * kRowStep, thread % (BK / 16));
    }
    static PDN_HD int a_offset(int warpgroup, int step) { return warpgroup * 64 * BK + step * 32; }
    static PDN_HD int b_offset(int step) { return BM * BK + step * 32; }
};

PDN_HD int sum_of_bytes(const int8_t* p, int sum) {  // 16 bytes
    uint32_t words[4];
    const Float4 raw = shared4(reinterpret_cast<const float*>(p));
    memcpy(words, &raw, sizeof raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = dot4(words[i], 0x01010101u, sum);
    return sum;
}

// ------------------------------------------------------------------------------------------------------------- kernel

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    wgmma_kernel(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) int8_t ring[];  // operands must start at a multiple of 1024 bytes
    const uint32_t base = shared_address(ring);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const TilePlace tile = place_of<Tile::BM, Tile::BN>(p, plan, blockIdx.x);
    const DepthRange depth = depth_range(plan, tile.split);
    const int blocks = depth.end - depth.begin;
    const int8_t* padding = padding_row(p);

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

    int acc[Tile::BN / 2] = {}, weights[Tile::kRowsB] = {};
    const bool count_weights = p.zero_point != nullptr;
    for (int block = 0; block < blocks; ++block) {
        const int at = block % Tile::kStages * Tile::kStageBytes;
        copies_wait<Tile::kStages - 2>();
        fence_copies();
        __syncthreads();  // the block has arrived, and both warpgroups are done with the one before
        fence_products();
#pragma unroll
        for (int step = 0; step < Tile::BK / 32; ++step)
            multiply_async<Tile::BN>(acc, operand_descriptor(base + at + Tile::a_offset(warp / 4, step)),
                                     operand_descriptor(base + at + Tile::b_offset(step)));
        commit_products();
        load(block + Tile::kStages - 1);
        if (count_weights)  // each thread adds up the chunks that it copied itself
#pragma unroll
            for (int i = 0; i < Tile::kRowsB; ++i)
                weights[i] = sum_of_bytes(ring + at + Tile::copy_offset(thread, i, true), weights[i]);
        wait_products();
    }
    copies_wait<0>();
    __syncthreads();

    int *sums = reinterpret_cast<int*>(ring), *weight_sums = sums + Tile::BM * Tile::kPitch;
#pragma unroll
    for (int i = 0; i < Tile::kRowsB; ++i) {  // eight neighbouring lanes copied one weight row
        int share = weights[i];
#pragma unroll
        for (int step = 1; step < 8; step *= 2) share += __shfl_xor_sync(kEveryLane, share, step);
        if (lane % 8 == 0) weight_sums[thread / 8 + i * Tile::kRowStep] = share;
    }
    __syncthreads();
    const int zero_point = p.zero_point && !p.per_pixel ? *p.zero_point : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = Tile::sum_row(warp, lane, half);
        const int offset = tile.row + row < plan.rows ? row_zero_point(p, zero_point, tile.row + row) : 0;
#pragma unroll
        for (int j = 0; j < Tile::BN / 8; ++j) {
            const int column = Tile::sum_column(lane, j);
            const int2 w = *reinterpret_cast<const int2*>(weight_sums + column);
            *reinterpret_cast<int2*>(sums + row * Tile::kPitch + column) = {acc[j * 4 + half * 2] - offset * w.x,
                                                                            acc[j * 4 + half * 2 + 1] - offset * w.y};
        }
    }
    __syncthreads();
    finish_tile<Tile::BM, Tile::BN, Tile::kThreads>(p, plan, tile, thread, sums, Tile::kPitch);
#endif
}

}  // namespace
}  // namespace pdn
