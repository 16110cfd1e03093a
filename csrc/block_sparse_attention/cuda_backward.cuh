// Gradients of block-sparse attention on mma.sync: one kernel for those of queries, one for those of keys and values.
//
// Both recompute the probabilities from the scores and the forward's log-sum-exp. The first walks over the blocks of
// keys that a block of queries keeps; the second over the blocks of queries that read a block of keys, of all heads
// that share it, with rows and columns exchanged: a warp owns 16 keys, so that transposed probabilities are already the
// left operand of its products. Each sum has one owner and one order: results do not depend on the schedule.
#pragma once

#include "../core/cuda_attention.cuh"
#include "cuda.h"

namespace pdn {
namespace {

using block_sparse_attention::cuda::BackwardProblem;
using cuda::Element;

// 16 rows a warp, ROWS rows a thread block, STEP tokens of the other side a step, in two buffers. Padding of D to SIZE
// is zeros.
template <typename T_, int SIZE_, int ROWS_, int STEP_>
struct BackwardTile {
    using T = T_;
    static constexpr int SIZE = SIZE_, ROWS = ROWS_, STEP = STEP_, NT = STEP / 8, DT = SIZE / 8;
    static constexpr int kChunks = SIZE * static_cast<int>(sizeof(T)) / 16, kPitch = round_up(kChunks * 16, 128);
    static constexpr int kThreads = ROWS * 2, kRowsBytes = ROWS * kPitch, kStepBytes = STEP * kPitch;
    static constexpr int kStages = 2 * kRowsBytes;            // two tiles of rows, then the stages
    static constexpr int kFloats = kStages + 4 * kStepBytes;  // two tiles each; then log-sum-exps and deltas of a stage
    static constexpr int kSharedBytes = kFloats + 2 * 2 * STEP * 4;
    static constexpr bool SPLIT = SIZE > 128;  // registers hold the sums of keys or of values, not both
    static constexpr int kResident = (SIZE > 64 && sizeof(T) == 4) || SIZE > 128 ? 1 : 2;
};

// exp2(score - lse); 0 where the log-sum-exp is -infinity.
PDN_DEVICE float probability(float score, float factor, float lse) {
    return lse == negative_infinity() ? 0.f : exp2_fast(fmaf(score, factor, -lse * kLog2E));
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    query_grad_kernel(const __grid_constant__ BackwardProblem p) {
    using T = typename Tile::T;
    constexpr int NT = Tile::NT, DT = Tile::DT, KEYS = Tile::STEP;
    PDN_SHARED(memory);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const Place at = place_of(blockIdx.x, p.heads, p.query_blocks, p.log_block, Tile::ROWS, p.queries);
    if (at.rows <= 0) return;
    const int kv_head = at.head / (p.heads / p.kv_heads), length = length_of(p.key_lengths, at.batch, p.keys);
    const int chunks = p.size * static_cast<int>(sizeof(T)) / 16;
    const uint32_t base = shared_address(memory);
    const char *keys = rows_of<T>(p.key, at.batch, kv_head), *values = rows_of<T>(p.value, at.batch, kv_head);
    const int64_t key_bytes = row_bytes<T>(p.key), value_bytes = row_bytes<T>(p.value);

    const KeptTokens kept = kept_tokens(p.kept, at.batch, at.head, at.block, p.log_block, length);
    const int steps = kept.steps(KEYS);
    Step<KEYS> loading;
    loading.begin(kept);
    auto copy = [&] {
        if (loading.number < steps) {
            const uint32_t to = base + Tile::kStages + (loading.number & 1) * 2 * Tile::kStepBytes;
            const int first = loading.first(kept), existing = loading.existing(kept);
            copy_rows<KEYS, Tile::kChunks, Tile::kThreads>(to, Tile::kPitch, keys + first * key_bytes, key_bytes,
                                                           existing, chunks, thread);
            copy_rows<KEYS, Tile::kChunks, Tile::kThreads>(to + Tile::kStepBytes, Tile::kPitch,
                                                           values + first * value_bytes, value_bytes, existing, chunks,
                                                           thread);
        }
        copies_commit();
    };
    copy_rows<Tile::ROWS, Tile::kChunks, Tile::kThreads>(
        base, Tile::kPitch, rows_of<T>(p.query, at.batch, at.head) + at.row * row_bytes<T>(p.query),
        row_bytes<T>(p.query), at.rows, chunks, thread);
    copy_rows<Tile::ROWS, Tile::kChunks, Tile::kThreads>(
        base + Tile::kRowsBytes, Tile::kPitch, rows_of<T>(p.grad, at.batch, at.head) + at.row * row_bytes<T>(p.grad),
        row_bytes<T>(p.grad), at.rows, chunks, thread);
    copy();

    float lse[2], delta[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = warp * 16 + h * 8 + lane / 4;
        const int64_t from = (static_cast<int64_t>(at.batch) * p.heads + at.head) * p.queries + at.row + row;
        lse[h] = row < at.rows ? __ldg(p.lse + from) : negative_infinity();
        delta[h] = row < at.rows ? __ldg(p.delta + from) : 0.f;
    }
    const float factor = p.scale * kLog2E;
    const uint32_t own = base + warp * 16 * Tile::kPitch;
    const bool active = warp * 16 < at.rows;
    float acc[1][DT][4];
    clear(acc);
    for (int step = 0; step < steps; ++step) {
        const int existing = loading.existing(kept);
        copies_wait<0>();
        __syncthreads();  // the step has arrived, and every warp is done with the one before
        loading.advance(kept);
        copy();
        if (!active) continue;
        const uint32_t stage = base + Tile::kStages + (step & 1) * 2 * Tile::kStepBytes;
        float scores[1][NT][4], inner[1][NT][4];
        clear(scores), clear(inner);
        product_nt(T{}, scores, own, stage, Tile::kPitch, Tile::kChunks / 2, lane);
        product_nt(T{}, inner, own + Tile::kRowsBytes, stage + Tile::kStepBytes, Tile::kPitch, Tile::kChunks / 2, lane);
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float weight = probability(scores[0][j][r], factor, lse[r / 2]);
                inner[0][j][r] = weight * (inner[0][j][r] - delta[r / 2]);
            }
        if (existing < KEYS)
#pragma unroll
            for (int j = 0; j < NT; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    if (score_column(lane, j) + r % 2 >= existing) inner[0][j][r] = 0.f;
        product_nn(acc, LeftOperand<T, 1, NT>(inner), stage, Tile::kPitch, lane);
    }
    copies_wait<0>();
    __syncthreads();  // every warp is done with its queries, and the results take their place
    const float scale[1][2] = {{p.scale, p.scale}};
    stage_rows<T>(memory + warp * 16 * Tile::kPitch, Tile::kPitch, acc, scale, lane);
    __syncthreads();
    char* to = const_cast<char*>(rows_of<T>(p.grad_query, at.batch, at.head)) + at.row * row_bytes<T>(p.grad_query);
    write_rows<Tile::kChunks, Tile::kThreads>(memory, Tile::kPitch, at.rows, to, row_bytes<T>(p.grad_query), chunks,
                                              thread);
}

// A walk over the queries that read a block of keys, N at a time, head after head of those that share the keys.
template <int N>
struct ReaderWalk {
    int head, last_head, steps;
    KeptTokens kept;
    Step<N> step;

    PDN_DEVICE void open(const BackwardProblem& p, const Place& at) {
        kept = kept_tokens(p.readers, at.batch, head, at.block, p.log_block, p.queries);
        steps = kept.steps(N);
        step.begin(kept);
    }
    PDN_DEVICE void skip_empty(const BackwardProblem& p, const Place& at) {
        while (step.number >= steps && head < last_head) ++head, open(p, at);
    }
    PDN_DEVICE void begin(const BackwardProblem& p, const Place& at) {
        const int group = p.heads / p.kv_heads;
        head = at.head * group, last_head = head + group - 1;
        open(p, at);
        skip_empty(p, at);
    }
    PDN_DEVICE void advance(const BackwardProblem& p, const Place& at) {
        step.advance(kept);
        skip_empty(p, at);
    }
    PDN_DEVICE bool ended() const { return step.number >= steps; }
};

// Sums of keys that do not exist become 0, and the results go to memory through `tile`, a place for the block's rows.
template <class Tile>
PDN_DEVICE void write_sums(char* tile, float (&acc)[1][Tile::DT][4], float factor, const Place& at, int existing,
                           const cuda::Tokens& to, int size, int thread) {
    using T = typename Tile::T;
    const int lane = thread % 32, warp = thread / 32;
#pragma unroll
    for (int h = 0; h < 2; ++h)
        if (warp * 16 + h * 8 + lane / 4 >= existing)
#pragma unroll
            for (int j = 0; j < Tile::DT; ++j) acc[0][j][h * 2] = acc[0][j][h * 2 + 1] = 0.f;
    const float factors[1][2] = {{factor, factor}};
    stage_rows<T>(tile + warp * 16 * Tile::kPitch, Tile::kPitch, acc, factors, lane);
    __syncthreads();
    char* out = const_cast<char*>(rows_of<T>(to, at.batch, at.head)) + at.row * row_bytes<T>(to);
    write_rows<Tile::kChunks, Tile::kThreads>(tile, Tile::kPitch, at.rows, out, row_bytes<T>(to),
                                              size * static_cast<int>(sizeof(T)) / 16, thread);
}

// Where registers are short (SPLIT), blockIdx.y chooses: 0 values, 1 keys.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    key_grad_kernel(const __grid_constant__ BackwardProblem p) {
    using T = typename Tile::T;
    constexpr int NT = Tile::NT, DT = Tile::DT, QUERIES = Tile::STEP;
    PDN_SHARED(memory);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const Place at = place_of(blockIdx.x, p.kv_heads, p.key_blocks, p.log_block, Tile::ROWS, p.keys);
    if (at.rows <= 0) return;
    const bool want_values = !Tile::SPLIT || blockIdx.y == 0, want_keys = !Tile::SPLIT || blockIdx.y == 1;
    const int existing_keys = length_of(p.key_lengths, at.batch, p.keys) - at.row;
    const int chunks = p.size * static_cast<int>(sizeof(T)) / 16;
    const uint32_t base = shared_address(memory);

    ReaderWalk<QUERIES> loading;
    loading.begin(p, at);
    auto copy = [&](int stage) {
        if (!loading.ended() && existing_keys > 0) {
            const uint32_t to = base + Tile::kStages + stage * 2 * Tile::kStepBytes;
            const uint32_t floats = base + Tile::kFloats + stage * 2 * QUERIES * 4;
            const int64_t query_bytes = row_bytes<T>(p.query),
                          grad_bytes = row_bytes<T>(p.grad);  // here: registers are short
            const int first = loading.step.first(loading.kept), existing = loading.step.existing(loading.kept);
            copy_rows<QUERIES, Tile::kChunks, Tile::kThreads>(
                to, Tile::kPitch, rows_of<T>(p.query, at.batch, loading.head) + first * query_bytes, query_bytes,
                existing, chunks, thread);
            copy_rows<QUERIES, Tile::kChunks, Tile::kThreads>(
                to + Tile::kStepBytes, Tile::kPitch, rows_of<T>(p.grad, at.batch, loading.head) + first * grad_bytes,
                grad_bytes, existing, chunks, thread);
            const int64_t from = (static_cast<int64_t>(at.batch) * p.heads + loading.head) * p.queries + first;
            for (int i = thread; i < 2 * QUERIES; i += Tile::kThreads) {
                const int row = i % QUERIES;
                copy4(floats + i * 4, (i < QUERIES ? p.lse : p.delta) + from + row, row < existing);
            }
        }
        copies_commit();
    };
    copy_rows<Tile::ROWS, Tile::kChunks, Tile::kThreads>(
        base, Tile::kPitch, rows_of<T>(p.key, at.batch, at.head) + at.row * row_bytes<T>(p.key), row_bytes<T>(p.key),
        existing_keys, chunks, thread);
    copy_rows<Tile::ROWS, Tile::kChunks, Tile::kThreads>(
        base + Tile::kRowsBytes, Tile::kPitch, rows_of<T>(p.value, at.batch, at.head) + at.row * row_bytes<T>(p.value),
        row_bytes<T>(p.value), existing_keys, chunks, thread);
    copy(0);

    const float factor = p.scale * kLog2E;
    const uint32_t own = base + warp * 16 * Tile::kPitch;
    const bool active = warp * 16 < existing_keys;
    float first_sums[1][DT][4], second_sums[1][Tile::SPLIT ? 1 : DT][4];  // of values and keys, or of what is wanted
    clear(first_sums), clear(second_sums);
    for (int stage = 0; !loading.ended() && existing_keys > 0; stage ^= 1) {
        const int existing = loading.step.existing(loading.kept);
        copies_wait<0>();
        __syncthreads();  // the step has arrived, and every warp is done with the one before
        loading.advance(p, at);
        copy(stage ^ 1);
        if (!active) continue;
        const uint32_t queries = base + Tile::kStages + stage * 2 * Tile::kStepBytes,
                       grads = queries + Tile::kStepBytes;
        const float* lse = reinterpret_cast<const float*>(memory + Tile::kFloats + stage * 2 * QUERIES * 4);
        float weights[1][NT][4];
        clear(weights);
        product_nt(T{}, weights, own, queries, Tile::kPitch, Tile::kChunks / 2, lane);
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int column = score_column(lane, j) + r % 2;
                const float weight = probability(weights[0][j][r], factor, lse[column]);
                weights[0][j][r] = column < existing ? weight : 0.f;
            }
        if (want_values) product_nn(first_sums, LeftOperand<T, 1, NT>(weights), grads, Tile::kPitch, lane);
        if (!want_keys) continue;
        float inner[1][NT][4];
        clear(inner);
        product_nt(T{}, inner, own + Tile::kRowsBytes, grads, Tile::kPitch, Tile::kChunks / 2, lane);
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r)
                inner[0][j][r] = weights[0][j][r] * (inner[0][j][r] - lse[QUERIES + score_column(lane, j) + r % 2]);
        if constexpr (Tile::SPLIT)
            product_nn(first_sums, LeftOperand<T, 1, NT>(inner), queries, Tile::kPitch, lane);
        else
            product_nn(second_sums, LeftOperand<T, 1, NT>(inner), queries, Tile::kPitch, lane);
    }
    copies_wait<0>();
    __syncthreads();  // every warp is done with its keys and values, and the results take their place
    if constexpr (Tile::SPLIT) {
        write_sums<Tile>(memory, first_sums, want_keys ? p.scale : 1.f, at, existing_keys,
                         want_keys ? p.grad_key : p.grad_value, p.size, thread);
    } else {
        write_sums<Tile>(memory + Tile::kRowsBytes, first_sums, 1.f, at, existing_keys, p.grad_value, p.size, thread);
        write_sums<Tile>(memory, second_sums, p.scale, at, existing_keys, p.grad_key, p.size, thread);
    }
}

// ------------------------------------------------------------------------------------------------------------- shapes

// Every tile needs at most 97 KiB of shared memory, and no more tokens a step than a block has.
template <typename T, typename F>
auto with_backward_tile(int size, int log_block, const F& f) {
    if constexpr (sizeof(T) == 4) {
        if (size <= 64) return f(BackwardTile<T, 64, 64, 16>{});
        return size <= 128 ? f(BackwardTile<T, 128, 64, 16>{}) : f(BackwardTile<T, 256, 16, 16>{});
    } else {
        if (size > 128) return f(BackwardTile<T, 256, 64, 16>{});
        if (log_block < 6) return size <= 64 ? f(BackwardTile<T, 64, 32, 16>{}) : f(BackwardTile<T, 128, 32, 16>{});
        return size <= 64 ? f(BackwardTile<T, 64, 64, 64>{}) : f(BackwardTile<T, 128, 64, 32>{});
    }
}

template <typename F>
auto with_backward_tile(const BackwardProblem& p, const F& f) {
    if (p.type == Element::float32) return with_backward_tile<float>(p.size, p.log_block, f);
    return p.type == Element::bfloat16 ? with_backward_tile<BFloat16>(p.size, p.log_block, f)
                                       : with_backward_tile<Float16>(p.size, p.log_block, f);
}

// Both launches: launch(kernel, thread blocks in x and y, threads, bytes of shared memory, p) returns why it failed, or
// null.
template <typename Launch>
const char* launch_backward(const BackwardProblem& p, const Launch& launch) {
    return with_backward_tile(p, [&](auto tile) {
        using Tile = decltype(tile);
        const int64_t heads = static_cast<int64_t>(p.batch) * p.heads,
                      kv_heads = static_cast<int64_t>(p.batch) * p.kv_heads;
        const char* why = launch(query_grad_kernel<Tile>, slices_of(heads, p.query_blocks, p.log_block, Tile::ROWS), 1,
                                 Tile::kThreads, Tile::kSharedBytes, p);
        if (why) return why;
        return launch(key_grad_kernel<Tile>, slices_of(kv_heads, p.key_blocks, p.log_block, Tile::ROWS),
                      Tile::SPLIT ? 2 : 1, Tile::kThreads, Tile::kSharedBytes, p);
    });
}

}  // namespace
}  // namespace pdn
