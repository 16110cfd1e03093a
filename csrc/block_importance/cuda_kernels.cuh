// Importance of blocks on mma.sync: the scores of a block of queries with all keys, in two passes that keep none of
// them.
//
// The first pass finds each row's log-sum-exp over the keys before and from block `first_generated` on; what the caller
// gives is not computed. The second forms the scores again and adds up the probabilities of each block of keys.
#pragma once

#include "../core/cuda_attention.cuh"
#include "../core/cuda_quantize.cuh"
#include "cuda.h"

namespace pdn {
namespace {

using ImportanceProblem = block_importance::cuda::Problem;

// MT x 16 rows a warp, at most ROWS rows at a time, KEYS keys a step, in two buffers. Padding of D to SIZE is zeros.
template <typename T_, int SIZE_, int MT_, int ROWS_, int KEYS_>
struct ImportanceTile {
    using T = T_;
    static constexpr int MT = MT_, ROWS = ROWS_, KEYS = KEYS_, NT = KEYS / 8;
    static constexpr int kChunks = SIZE_ * static_cast<int>(sizeof(T)) / 16, kPitch = round_up(kChunks * 16, 128);
    static constexpr int kThreads = ROWS / (16 * MT) * 32, kWarps = kThreads / 32, kStep = KEYS * kPitch;
    static constexpr int kSums = ROWS * kPitch + 2 * kStep;  // two sums of each warp, in two buffers
    static constexpr int kSharedBytes = kSums + 2 * kWarps * 2 * 4, kResident = kSharedBytes >= 64 << 10 ? 2 : 3;
};

// The log-sum-exps of a problem: over all keys, and over those from `first_generated` on.
struct RowSums {
    bool find_all, find_generated;  // or given, or the same
    float *found_all, *found_generated;
    const float *all, *generated;
    int64_t floats;  // of the workspace

    PDN_HD explicit RowSums(const ImportanceProblem& p) {
        const int64_t rows = static_cast<int64_t>(p.batch) * p.heads * p.queries;
        find_all = p.lse == nullptr, find_generated = p.first_generated > 0 && p.first_generated < p.key_blocks;
        floats = rows * ((find_all ? 1 : 0) + (find_generated ? 1 : 0));
        found_all = p.workspace, found_generated = find_all && find_generated ? p.workspace + rows : p.workspace;
        all = find_all ? found_all : p.lse, generated = find_generated ? found_generated : all;
    }
};

PDN_DEVICE float log_add(float x, float y) {  // log(exp(x) + exp(y))
    if (x != x || y != y) return x + y;
    const float low = fminf(x, y), high = fmaxf(x, y);
    return low == negative_infinity() ? high : high + log1pf(expf(low - high));
}

// Copies of a stream of keys, and the products of queries with them.
template <class Tile>
struct ScoreStream {
    using T = typename Tile::T;
    const char* keys;
    int64_t key_bytes;
    uint32_t base;
    int chunks, length, thread;

    PDN_DEVICE ScoreStream(const ImportanceProblem& p, const Place& at, uint32_t shared, int index) {
        keys = rows_of<T>(p.key, at.batch, at.head / (p.heads / p.kv_heads)), key_bytes = row_bytes<T>(p.key);
        base = shared, chunks = p.size * static_cast<int>(sizeof(T)) / 16, thread = index;
        length = length_of(p.key_lengths, at.batch, p.keys);
    }
    PDN_DEVICE void copy_queries(const ImportanceProblem& p, const Place& at) {
        copy_rows<Tile::ROWS, Tile::kChunks, Tile::kThreads>(
            base, Tile::kPitch, rows_of<T>(p.query, at.batch, at.head) + at.row * row_bytes<T>(p.query),
            row_bytes<T>(p.query), at.rows, chunks, thread);
    }
    PDN_DEVICE void copy_keys(int step) {  // nothing where no key exists
        if (step * Tile::KEYS < length)
            copy_rows<Tile::KEYS, Tile::kChunks, Tile::kThreads>(
                base + Tile::ROWS * Tile::kPitch + (step & 1) * Tile::kStep, Tile::kPitch,
                keys + step * Tile::KEYS * key_bytes, key_bytes, length - step * Tile::KEYS, chunks, thread);
        copies_commit();
    }
    PDN_DEVICE void multiply(int step, float (&scores)[Tile::MT][Tile::NT][4]) {
        clear(scores);
        product_nt(T{}, scores, base + thread / 32 * 16 * Tile::MT * Tile::kPitch,
                   base + Tile::ROWS * Tile::kPitch + (step & 1) * Tile::kStep, Tile::kPitch, Tile::kChunks / 2,
                   thread % 32);
    }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    row_sums_kernel(const __grid_constant__ ImportanceProblem p) {
    constexpr int MT = Tile::MT, NT = Tile::NT, KEYS = Tile::KEYS;
    PDN_SHARED(memory);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const Place at = place_of(blockIdx.x, p.heads, p.query_blocks, p.log_block, Tile::ROWS, p.queries);
    if (at.rows <= 0) return;
    const RowSums to(p);
    ScoreStream<Tile> stream(p, at, shared_address(memory), thread);
    const int border = (p.first_generated << p.log_block) / KEYS;  // steps before the generated keys
    const int first = to.find_all ? 0 : border, end = (stream.length + KEYS - 1) / KEYS;
    const float factor = p.scale * kLog2E;
    const bool active = warp * 16 * MT < at.rows;
    stream.copy_queries(p, at);
    stream.copy_keys(first);

    SoftmaxRows<MT> rows;
    float before[MT][2], unused[MT][2];  // log-sum-exp of what comes before the border
#pragma unroll
    for (int i = 0; i < MT; ++i) before[i][0] = before[i][1] = negative_infinity();
    rows.start();
    for (int step = first; step < end; ++step) {
        copies_wait<0>();
        __syncthreads();  // the step has arrived, and every warp is done with the one before
        stream.copy_keys(step + 1);
        if (!active) continue;
        if (step == border) {
            rows.finish();
#pragma unroll
            for (int i = 0; i < MT; ++i) before[i][0] = rows.log_sum(i, 0), before[i][1] = rows.log_sum(i, 1);
            rows.start();
        }
        float scores[MT][NT][4];
        stream.multiply(step, scores);
        scale_all(scores, factor);
        const int existing = stream.length - step * KEYS;
        if (existing < KEYS) mask_columns(existing, lane, scores);
        rows.add(scores, unused);
    }
    copies_wait<0>();
    rows.finish();
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = (warp * MT + i) * 16 + h * 8 + lane / 4;
            if (lane % 4 || row >= at.rows) continue;
            const int64_t index = (static_cast<int64_t>(at.batch) * p.heads + at.head) * p.queries + at.row + row;
            const float last = rows.log_sum(i, h);
            if (to.find_all) to.found_all[index] = log_add(before[i][h], last);
            if (to.find_generated) to.found_generated[index] = end > border ? last : negative_infinity();
        }
}

// Adds a step's probabilities to `sum`, and those times the power of two of the row's `beyond` to `other`.
template <int MT, int NT>
PDN_DEVICE void add_weights(const float (&scores)[MT][NT][4], const float (&lse)[MT][2], const float (&beyond)[MT][2],
                            float factor, int existing, int lane, float& sum, float& other) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (lse[i][h] == negative_infinity()) continue;  // a row without keys, or none
            float row = 0.f;
#pragma unroll
            for (int j = 0; j < NT; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float weight = exp2_fast(fmaf(scores[i][j][h * 2 + e], factor, -lse[i][h]));
                    row += score_column(lane, j) + e < existing ? weight : 0.f;
                }
            sum += row, other = fmaf(row, exp2_fast(beyond[i][h]), other);
        }
}

// Where the generated keys get less than this share of a row (as a power of two), their probabilities are not those
// over all keys times a factor: the latter may be too small for a float.
constexpr float kSmallShare = 60.f;

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    block_sums_kernel(const __grid_constant__ ImportanceProblem p) {
    constexpr int MT = Tile::MT, NT = Tile::NT, KEYS = Tile::KEYS;
    PDN_SHARED(memory);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    // The whole block of queries: the thread block's rows, slice after slice.
    Place at = place_of(blockIdx.x, p.heads, p.query_blocks, p.log_block, 1 << p.log_block, p.queries);
    const int rows_end = at.row + at.rows;
    const RowSums from(p);
    ScoreStream<Tile> stream(p, at, shared_address(memory), thread);
    float* sums = reinterpret_cast<float*>(memory + Tile::kSums);
    const int64_t row_index = (static_cast<int64_t>(at.batch) * p.heads + at.head) * p.query_blocks + at.block;
    const int generated_blocks = p.key_blocks - p.first_generated, border = (p.first_generated << p.log_block) / KEYS;
    const int per_block = (1 << p.log_block) / KEYS, steps = p.key_blocks * per_block;
    const float factor = p.scale * kLog2E, mean = 1.f / static_cast<float>(1 << 2 * p.log_block);

    for (bool again = false; at.row < rows_end; at.row += Tile::ROWS, again = true) {
        at.rows = smaller(Tile::ROWS, rows_end - at.row);
        float all[MT][2], beyond[MT][2];  // log-sum-exps to the base 2; what those over generated keys lack to them
        bool small_share = false;
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = (warp * MT + i) * 16 + h * 8 + lane / 4;
                const int64_t index = (static_cast<int64_t>(at.batch) * p.heads + at.head) * p.queries + at.row + row;
                all[i][h] = row < at.rows ? __ldg(from.all + index) * kLog2E : negative_infinity();
                const float generated = row < at.rows ? __ldg(from.generated + index) * kLog2E : negative_infinity();
                beyond[i][h] = generated == negative_infinity() ? generated : all[i][h] - generated;
                small_share = small_share || beyond[i][h] > kSmallShare;
            }
        small_share = __any_sync(kEveryLane, small_share);
        // The sums of block `block` that the warps have left, by threads 0 (all) and 1 (generated).
        auto write_block = [&](int block) {
            if (thread > 1 || (thread == 1 && block < p.first_generated)) return;
            float total = 0.f;
            for (int w = 0; w < Tile::kWarps; ++w) total += sums[((block & 1) * Tile::kWarps + w) * 2 + thread];
            float* to = thread == 0 ? p.over_all + row_index * p.key_blocks + block
                                    : p.over_generated + row_index * generated_blocks + block - p.first_generated;
            *to = total * mean + (again ? *to : 0.f);
        };
        __syncthreads();  // every warp is done with the slice before
        stream.copy_queries(p, at);
        stream.copy_keys(0);
        const bool active = warp * 16 * MT < at.rows;
        float over_all = 0.f, over_generated = 0.f;
        for (int step = 0; step < steps; ++step) {
            copies_wait<0>();
            __syncthreads();  // the step has arrived; every warp is done with the one before, and has left its sums
            stream.copy_keys(step + 1);
            if (step > 0 && step % per_block == 0) write_block(step / per_block - 1);
            const int existing = stream.length - step * KEYS;
            if (active && existing > 0) {
                float scores[MT][NT][4];
                stream.multiply(step, scores);
                float share = 0.f, unused = 0.f;
                add_weights(scores, all, beyond, factor, existing, lane, over_all, share);
                if (step >= border && small_share) {
                    float generated[MT][2];
#pragma unroll
                    for (int i = 0; i < MT; ++i)
#pragma unroll
                        for (int h = 0; h < 2; ++h)
                            generated[i][h] =
                                beyond[i][h] == negative_infinity() ? negative_infinity() : all[i][h] - beyond[i][h];
                    share = 0.f;
                    add_weights(scores, generated, beyond, factor, existing, lane, share, unused);
                }
                if (step >= border) over_generated += share;
            }
            if ((step + 1) % per_block) continue;
            float* left = sums + ((step / per_block & 1) * Tile::kWarps + warp) * 2;
            over_all = warp_sum(over_all), over_generated = warp_sum(over_generated);
            if (lane == 0) left[0] = over_all, left[1] = over_generated;
            over_all = over_generated = 0.f;
        }
        copies_wait<0>();
        __syncthreads();
        write_block(p.key_blocks - 1);
    }
}

// ------------------------------------------------------------------------------------------------------------- shapes

// Every tile needs at most 97 KiB of shared memory, and no more keys a step than a block has.
template <typename T, typename F>
auto with_importance_tile(int size, int log_block, const F& f) {
    if constexpr (sizeof(T) == 4) {
        if (size <= 64) return f(ImportanceTile<T, 64, 2, 128, 16>{});
        return size <= 128 ? f(ImportanceTile<T, 128, 2, 128, 16>{}) : f(ImportanceTile<T, 256, 1, 32, 16>{});
    } else if (log_block >= 6) {
        if (size > 128) return f(ImportanceTile<T, 256, 2, 128, 32>{});
        if (log_block == 6)
            return size <= 64 ? f(ImportanceTile<T, 64, 2, 64, 64>{}) : f(ImportanceTile<T, 128, 2, 64, 64>{});
        return size <= 64 ? f(ImportanceTile<T, 64, 2, 128, 64>{}) : f(ImportanceTile<T, 128, 2, 128, 64>{});
    } else {
        if (size <= 64) return f(ImportanceTile<T, 64, 2, 32, 16>{});
        return size <= 128 ? f(ImportanceTile<T, 128, 2, 32, 16>{}) : f(ImportanceTile<T, 256, 2, 32, 16>{});
    }
}

template <typename F>
auto with_importance_tile(const ImportanceProblem& p, const F& f) {
    if (p.type == Element::float32) return with_importance_tile<float>(p.size, p.log_block, f);
    return p.type == Element::bfloat16 ? with_importance_tile<BFloat16>(p.size, p.log_block, f)
                                       : with_importance_tile<Float16>(p.size, p.log_block, f);
}

// Every launch: launch(kernel, thread blocks in x and y, threads, bytes of shared memory, p) returns why it failed, or
// null.
template <typename Launch>
const char* launch_importance(const ImportanceProblem& p, const Launch& launch) {
    return with_importance_tile(p, [&](auto tile) {
        using Tile = decltype(tile);
        const int64_t heads = static_cast<int64_t>(p.batch) * p.heads;
        const RowSums sums(p);
        const char* why = nullptr;
        if (sums.find_all || sums.find_generated)
            why = launch(row_sums_kernel<Tile>, slices_of(heads, p.query_blocks, p.log_block, Tile::ROWS), 1,
                         Tile::kThreads, Tile::kSharedBytes, p);
        if (why) return why;
        return launch(block_sums_kernel<Tile>, heads * p.query_blocks, 1, Tile::kThreads, Tile::kSharedBytes, p);
    });
}

}  // namespace
}  // namespace pdn
