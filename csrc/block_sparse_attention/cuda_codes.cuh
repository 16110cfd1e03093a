// int8 codes of queries and of smoothed keys, one scale for each block.
//
// Keys are coded less their mean over the tokens that exist; the mean adds the same to all scores of a query, so that
// only the log-sum-exp has to know it.
#pragma once

#include "../core/cuda_attention.cuh"
#include "../core/cuda_quantize.cuh"
#include "cuda.h"

namespace pdn {
namespace {

using block_sparse_attention::cuda::ForwardProblem;

constexpr int kCodeThreads = 256, kMeanTokens = 512;  // tokens of a partial sum

// Places in the workspace, and its size.
struct Codes {
    int8_t *query, *key;              // [B, H, Lq, pitch], [B, Hkv, Lk, pitch]
    float *query_scale, *key_scale;   // for each block
    float *query_mean, *mean, *sums;  // query . mean for each query; [B, Hkv, D]; [B, Hkv, parts, D]
    int pitch, parts;
    int64_t bytes;

    PDN_HD Codes(const ForwardProblem& p) {
        const int64_t heads = static_cast<int64_t>(p.batch) * p.heads,
                      kv_heads = static_cast<int64_t>(p.batch) * p.kv_heads;
        pitch = round_up(p.size, 16), parts = (p.keys + kMeanTokens - 1) / kMeanTokens;
        char* at = static_cast<char*>(p.workspace);
        auto take = [&at](int64_t count, int64_t element) {
            char* here = at;
            at += (count * element + 15) / 16 * 16;
            return here;
        };
        query = reinterpret_cast<int8_t*>(take(heads * p.queries, pitch));
        key = reinterpret_cast<int8_t*>(take(kv_heads * p.keys, pitch));
        query_scale = reinterpret_cast<float*>(take(heads * p.query_blocks, 4));
        key_scale = reinterpret_cast<float*>(take(kv_heads * p.key_blocks, 4));
        query_mean = reinterpret_cast<float*>(take(heads * p.queries, 4));
        mean = reinterpret_cast<float*>(take(kv_heads * p.size, 4));
        sums = reinterpret_cast<float*>(take(kv_heads * parts * p.size, 4));
        bytes = at - static_cast<char*>(p.workspace);
    }
};

PDN_DEVICE const void* element_row(const Tokens& t, Element type, int batch, int head, int row) {
    const int64_t at = batch * t.batch_stride + head * t.head_stride + row * t.row_stride;
    return static_cast<const char*>(t.data) + at * (type == Element::float32 ? 4 : 2);
}

// Sums of keys over kMeanTokens tokens. A thread block does one part of one head; D <= kCodeThreads.
__global__ void __launch_bounds__(kCodeThreads) key_sums_kernel(const __grid_constant__ ForwardProblem p) {
    PDN_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    const Codes codes(p);
    const int part = blockIdx.x % codes.parts, index = blockIdx.x / codes.parts;
    const int batch = index / p.kv_heads, head = index % p.kv_heads, thread = threadIdx.x;
    const int length = length_of(p.key_lengths, batch, p.keys), groups = p.size / 8, rows = kCodeThreads / groups;
    const int end = smaller(length, (part + 1) * kMeanTokens), column = thread % groups;
    Float4 sum[2]{};
    if (thread < rows * groups)
        for (int row = part * kMeanTokens + thread / groups; row < end; row += rows) {
            Float4 x[2];
            load8(element_row(p.key, p.type, batch, head, row), p.type, column * 8, 8, true, x);
#pragma unroll
            for (int i = 0; i < 8; ++i) sum[i / 4].v[i % 4] += x[i / 4].v[i % 4];
        }
    if (thread < rows * groups)
#pragma unroll
        for (int i = 0; i < 8; ++i) shared[thread / groups * p.size + column * 8 + i] = sum[i / 4].v[i % 4];
    __syncthreads();
    if (thread >= p.size) return;
    float total = 0.f;
    for (int row = 0; row < rows; ++row) total += shared[row * p.size + thread];
    codes.sums[(static_cast<int64_t>(index) * codes.parts + part) * p.size + thread] = total;
}

__global__ void __launch_bounds__(kCodeThreads) key_mean_kernel(const __grid_constant__ ForwardProblem p) {
    const Codes codes(p);
    const int index = blockIdx.x, thread = threadIdx.x;
    if (thread >= p.size) return;
    const int length = length_of(p.key_lengths, index / p.kv_heads, p.keys);
    float total = 0.f;
    for (int part = 0; part < codes.parts; ++part)
        total += codes.sums[(static_cast<int64_t>(index) * codes.parts + part) * p.size + thread];
    codes.mean[static_cast<int64_t>(index) * p.size + thread] =
        divide(total, static_cast<float>(length > 0 ? length : 1));
}

// The largest magnitude of a thread block's numbers; NaN if one is NaN.
PDN_DEVICE float block_magnitude(float x, bool nan, float* shared) {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kEveryLane, x, step));
    nan = __any_sync(kEveryLane, nan);
    if (threadIdx.x % 32 == 0) shared[warp] = nan ? NAN : x;
    __syncthreads();
    float top = 0.f;
    for (int i = 0; i < kCodeThreads / 32; ++i) top = is_nan(top) || is_nan(shared[i]) ? NAN : fmaxf(top, shared[i]);
    return top;
}

// Codes of one block of tokens of one head: keys less their mean, or queries with their products with it.
template <bool KEYS>
__global__ void __launch_bounds__(kCodeThreads) codes_kernel(const __grid_constant__ ForwardProblem p) {
    PDN_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    const Codes codes(p);
    const int heads = KEYS ? p.kv_heads : p.heads, all = KEYS ? p.keys : p.queries;
    const Place at =
        place_of(blockIdx.x, heads, KEYS ? p.key_blocks : p.query_blocks, p.log_block, 1 << p.log_block, all);
    const int thread = threadIdx.x;
    const int kv_head = KEYS ? at.head : at.head / (p.heads / p.kv_heads);
    const float* mean = codes.mean + (static_cast<int64_t>(at.batch) * p.kv_heads + kv_head) * p.size;
    const int exist = KEYS ? length_of(p.key_lengths, at.batch, p.keys) - at.row : at.rows;  // rows that count
    const Tokens& from = KEYS ? p.key : p.query;
    // Each row is the work of a warp; a lane takes eight numbers (D <= 256). Rows are read twice: they are in the
    // cache.
    const int column = thread % 32, warp = thread / 32, warps = kCodeThreads / 32;
    Float4 average[2]{};
    if (column * 8 < p.size) {
#pragma unroll
        for (int i = 0; i < 8; ++i) average[i / 4].v[i % 4] = mean[column * 8 + i];
    }
    auto load = [&](int row, Float4(&x)[2]) {
        const bool counts = row < exist && column * 8 < p.size;
        x[0] = Float4{}, x[1] = Float4{};
        if (counts) load8(element_row(from, p.type, at.batch, at.head, at.row + row), p.type, column * 8, 8, true, x);
        if (KEYS && counts)
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i / 4].v[i % 4] -= average[i / 4].v[i % 4];
    };
    float top = 0.f;
    bool nan = false;
    for (int row = warp; row < at.rows; row += warps) {
        Float4 x[2];
        load(row, x);
        float dot = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float v = x[i / 4].v[i % 4];
            top = fmaxf(top, fabsf(v)), nan = nan || is_nan(v);
            dot = fmaf(v, average[i / 4].v[i % 4], dot);
        }
        if (KEYS) continue;
        dot = warp_sum(dot);
        if (column == 0)
            codes.query_mean[(static_cast<int64_t>(at.batch) * heads + at.head) * all + at.row + row] = dot;
    }
    Grid grid{divide(block_magnitude(top, nan, shared), 127.f), 0, -127};
    if (grid.scale < kSmallestScale) grid.scale = 1.f;
    const int64_t head = static_cast<int64_t>(at.batch) * heads + at.head;
    if (thread == 0)
        (KEYS ? codes.key_scale : codes.query_scale)[head * (KEYS ? p.key_blocks : p.query_blocks) + at.block] =
            grid.scale;
    int8_t* to = (KEYS ? codes.key : codes.query) + (head * all + at.row) * codes.pitch;
    if (column * 8 >= codes.pitch) return;
    for (int row = warp; row < at.rows; row += warps) {
        Float4 x[2];
        load(row, x);
        store8_codes(to + row * codes.pitch + column * 8, x, grid, 0.f, 8, true);
    }
}

}  // namespace
}  // namespace pdn
