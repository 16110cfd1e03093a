// Block-sparse attention on wgmma (sm_90a), for blocks of 128 and heads of at most 128 numbers of 16 bits.
//
// A thread block has two warpgroups of 64 queries each, and one that copies: half of its warps keys, half values, each
// through two buffers. The products of the next keys run while the softmax of the last ones is computed, and with them
// those of the last weights and values. Copies are 16-byte cp.async, as in the other kernels: rows from a batch's
// length on become zeros, which the bulk copy engine could not promise. Barriers between one warpgroup and the copying
// warps let the two warpgroups run apart.
#pragma once

#include <type_traits>

#include "../core/cuda_wgmma.cuh"
#include "cuda_forward.cuh"

namespace pdn {
namespace {

// Tiles of 128 rows lie as panels of 128 bytes a row, 128-byte swizzled; padding of D to SIZE is zeros.
template <typename T_, int SIZE_, bool CODES_>
struct WgmmaForward {
    using T = T_;
    static constexpr int SIZE = SIZE_, ROWS = 128, KEYS = 128, NT = KEYS / 8, DT = SIZE / 8;
    static constexpr bool CODES = CODES_;  // scores from int8 codes
    static constexpr int kPanel = ROWS * 128;
    static constexpr int kChunks = SIZE / 8, kScoreChunks = CODES ? SIZE / 16 : kChunks;
    static constexpr int kTile = (kChunks + 7) / 8 * kPanel, kScoreTile = (kScoreChunks + 7) / 8 * kPanel;
    static constexpr int kQueries = kTile;  // the results take the place of the queries
    static constexpr int kKeys = kQueries, kValues = kKeys + 2 * kScoreTile;
    static constexpr int kSharedBytes = kValues + 2 * kTile + 1024;  // aligned to 1024 by the kernel
    static constexpr int kThreads = 384, kCopyThreads = 64;
    using Sum = std::conditional_t<CODES, int, float>;
    using Score = std::conditional_t<CODES, int8_t, T>;
};

PDN_HD int panel_offset(int row, int chunk) { return (chunk >> 3) * (128 * 128) + swizzled128(row, chunk & 7); }

// Barriers: a tile has come (for each warpgroup), and a tile is used up (by both).
PDN_HD int came(bool value, int buffer, int group) { return 1 + (value ? 4 : 0) + buffer * 2 + group; }
PDN_HD int used_up(bool value, int buffer) { return 9 + (value ? 2 : 0) + buffer; }
PDN_HD int own_group(int group) { return 13 + group; }
constexpr int kCameThreads = 128 + 64, kUsedThreads = 256 + 64;

// Starts copies of 128 rows by the threads of two warps. Rows from `existing` on, and chunks from `chunks` on, become
// zero.
template <int CHUNKS>
PDN_DEVICE void copy_panels(uint32_t to, const char* from, int64_t row_bytes, int existing, int chunks, int thread) {
    constexpr int kStep = 64 / CHUNKS;
    const int first = thread / CHUNKS, chunk = thread % CHUNKS, end = chunk < chunks ? existing : 0;
    const uint32_t at = to + panel_offset(first, chunk);
    const char* source = from + first * row_bytes + chunk * 16;
#pragma unroll 4
    for (int row = 0; row < 128; row += kStep) {
        copy16((at ^ ((row & 7) << 4)) + row * 128, source, first + row < end);
        source += kStep * row_bytes;
    }
}

// What the copying warps do: warps 0 and 1 of them queries and keys, 2 and 3 values.
template <class Tile>
PDN_DEVICE void copy_tiles(const ForwardProblem& p, const Place& at, const KeptTokens& kept, uint32_t base,
                           int thread) {
    using T = typename Tile::T;
    if (kept.count == 0) return;  // nobody would wait for the queries
    const bool value = thread >= Tile::kCopyThreads;
    const int kv_head = at.head / (p.heads / p.kv_heads), index = thread % Tile::kCopyThreads;
    const char* from = rows_of<T>(value ? p.value : p.key, at.batch, kv_head);
    int64_t bytes = row_bytes<T>(value ? p.value : p.key);
    int chunks = p.size / 8;
    if (!value) {
        const char* queries = rows_of<T>(p.query, at.batch, at.head);
        int64_t query_bytes = row_bytes<T>(p.query);
        if constexpr (Tile::CODES) {
            const Codes codes(p);
            queries = reinterpret_cast<const char*>(codes.query + (static_cast<int64_t>(at.batch) * p.heads + at.head) *
                                                                      p.queries * codes.pitch);
            from = reinterpret_cast<const char*>(codes.key + (static_cast<int64_t>(at.batch) * p.kv_heads + kv_head) *
                                                                 p.keys * codes.pitch);
            query_bytes = bytes = codes.pitch, chunks = codes.pitch / 16;
        }
        copy_panels<Tile::kScoreChunks>(base, queries + at.row * query_bytes, query_bytes, at.rows, chunks, index);
    }
    Step<Tile::KEYS> step;
    step.begin(kept);
    while (step.number < kept.count) {
        const int buffer = step.number & 1;
        if (step.number >= 2) barrier_wait(used_up(value, buffer), kUsedThreads);
        const char* source = from + step.first(kept) * bytes;
        if (value)
            copy_panels<Tile::kChunks>(base + Tile::kValues + buffer * Tile::kTile, source, bytes, step.existing(kept),
                                       chunks, index);
        else
            copy_panels<Tile::kScoreChunks>(base + Tile::kKeys + buffer * Tile::kScoreTile, source, bytes,
                                            step.existing(kept), chunks, index);
        copies_commit();
        step.advance(kept);
        copies_wait<0>();
        fence_copies();
        barrier_arrive(came(value, buffer, 0), kCameThreads);
        barrier_arrive(came(value, buffer, 1), kCameThreads);
    }
}

template <class Tile>
PDN_DEVICE void start_scores(typename Tile::Sum (&sums)[Tile::NT][4], uint32_t base, int group, int buffer) {
    fence_products();
#pragma unroll
    for (int k = 0; k < Tile::kScoreChunks / 2; ++k) {
        const uint32_t along = (k >> 2) * Tile::kPanel + (k & 3) * 32;
        product_async(typename Tile::Score{}, sums, operand_descriptor(base + group * 64 * 128 + along),
                      operand_descriptor(base + Tile::kKeys + buffer * Tile::kScoreTile + along), k > 0);
    }
    commit_products();
}

template <class Tile>
PDN_DEVICE void start_values(float (&acc)[Tile::DT][4], const LeftOperand<typename Tile::T, 1, Tile::NT>& weights,
                             uint32_t base, int buffer) {
    fence_products();
#pragma unroll
    for (int k = 0; k < Tile::KEYS / 16; ++k)
        product_async(typename Tile::T{}, acc, weights.r[0][k],
                      operand_descriptor(base + Tile::kValues + buffer * Tile::kTile + k * 16 * 128, Tile::kPanel));
    commit_products();
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) wgmma_forward_kernel(const __grid_constant__ ForwardProblem p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(PDN_EMULATED_CUDA)
    using T = typename Tile::T;
    constexpr int NT = Tile::NT, DT = Tile::DT, KEYS = Tile::KEYS;
    PDN_SHARED(unaligned);
    char* memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
    const uint32_t base = shared_address(memory);
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    const Place at = place_of(blockIdx.x, p.heads, p.query_blocks, p.log_block, Tile::ROWS, p.queries);
    const int length = length_of(p.key_lengths, at.batch, p.keys);
    const KeptTokens kept = kept_tokens(p.kept, at.batch, at.head, at.block, p.log_block, length);
    if (group == 2) {
        give_registers<40>();
        copy_tiles<Tile>(p, at, kept, base, thread);
        return;
    }
    take_registers<232>();

    const int kv_head = at.head / (p.heads / p.kv_heads), steps = kept.count;
    const int64_t head_index = static_cast<int64_t>(at.batch) * p.heads + at.head;
    float factor = p.scale * kLog2E;
    const float* key_scales = nullptr;
    if constexpr (Tile::CODES) {
        const Codes codes(p);
        factor *= __ldg(codes.query_scale + head_index * p.query_blocks + at.block);
        key_scales = codes.key_scale + (static_cast<int64_t>(at.batch) * p.kv_heads + kv_head) * p.key_blocks;
    }
    Step<KEYS> step;
    step.begin(kept);
    typename Tile::Sum sums[NT][4];
    float scores[1][NT][4], acc[DT][4], shrink[1][2];
#pragma unroll
    for (int j = 0; j < DT; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
    SoftmaxRows<1> rows;
    rows.start();
    // From products to weights, all but their sums with values.
    auto weigh = [&] {
        float scale = factor;
        if constexpr (Tile::CODES) scale *= __ldg(key_scales + (step.start >> p.log_block));
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) scores[0][j][r] = static_cast<float>(sums[j][r]) * scale;
        const int existing = step.existing(kept);
        if (existing < KEYS) mask_columns(existing, lane, scores);
        step.advance(kept);
        return rows.add(scores, shrink);
    };
    auto release = [&](bool value, int number) {  // for the copies of two steps later, if there are any
        if (number + 2 < steps) barrier_arrive(used_up(value, number & 1), kUsedThreads);
    };
    if (steps > 0) {
        barrier_wait(came(false, 0, group), kCameThreads);
        start_scores<Tile>(sums, base, group, 0);
        wait_products<0>();
        settle(sums);
        release(false, 0);
        weigh();
        LeftOperand<T, 1, NT> weights(scores);
        for (int number = 1; number < steps; ++number) {
            const int buffer = number & 1;
            barrier_wait(came(false, buffer, group), kCameThreads);
            start_scores<Tile>(sums, base, group, buffer);
            barrier_wait(came(true, buffer ^ 1, group), kCameThreads);
            start_values<Tile>(acc, weights, base, buffer ^ 1);
            wait_products<1>();
            settle(sums);
            release(false, number);
            const bool changed = weigh();
            wait_products<0>();
            settle(acc);
            release(true, number - 1);
            if (changed)
#pragma unroll
                for (int j = 0; j < DT; ++j)
#pragma unroll
                    for (int r = 0; r < 4; ++r) acc[j][r] *= shrink[0][r / 2];
            weights = LeftOperand<T, 1, NT>(scores);
        }
        barrier_wait(came(true, (steps - 1) & 1, group), kCameThreads);
        start_values<Tile>(acc, weights, base, (steps - 1) & 1);
        wait_products<0>();
        settle(acc);
    }

    rows.finish();
    barrier_wait(own_group(group), 128);  // its products are done with the queries, whose place the results take
    const int first = group * 64 + warp * 16;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float inverse = rows.sum[0][h] == 0.f ? 0.f : 1.f / rows.sum[0][h];
        const int row = first + h * 8 + lane / 4;
#pragma unroll
        for (int j = 0; j < DT; ++j) {
            const int byte = score_column(lane, j) * 2;
            store_two(reinterpret_cast<T*>(memory + panel_offset(row, byte / 16) + byte % 16), acc[j][h * 2] * inverse,
                      acc[j][h * 2 + 1] * inverse);
        }
        if (lane % 4 || row >= at.rows) continue;
        const int64_t to = head_index * p.queries + at.row + row;
        float lse = rows.log_sum(0, h);
        if constexpr (Tile::CODES) lse += p.scale * Codes(p).query_mean[to];
        p.lse[to] = lse;
    }
    barrier_wait(own_group(group), 128);
    char* output = const_cast<char*>(rows_of<T>(p.output, at.batch, at.head)) + at.row * row_bytes<T>(p.output);
    for (int i = thread; i < 64 * Tile::kChunks; i += 128) {
        const int row = group * 64 + i / Tile::kChunks, chunk = i % Tile::kChunks;
        if (row < at.rows && chunk * 8 < p.size)
            *reinterpret_cast<Float4*>(output + row * row_bytes<T>(p.output) + chunk * 16) =
                *reinterpret_cast<const Float4*>(memory + panel_offset(row, chunk));
    }
#endif
}

// ------------------------------------------------------------------------------------------------------------- shapes

inline bool fits_wgmma(const ForwardProblem& p) {
    return p.type != Element::float32 && p.log_block == 7 && p.size <= 128;
}

template <typename T, typename F>
auto with_wgmma_tile(const ForwardProblem& p, const F& f) {
    if (p.size <= 64) return p.int8_scores ? f(WgmmaForward<T, 64, true>{}) : f(WgmmaForward<T, 64, false>{});
    return p.int8_scores ? f(WgmmaForward<T, 128, true>{}) : f(WgmmaForward<T, 128, false>{});
}

// The launch of what fits_wgmma; as in launch_codes.
template <typename Launch>
const char* launch_wgmma(const ForwardProblem& p, const Launch& launch) {
    const auto launch_tile = [&](auto tile) {
        using Tile = decltype(tile);
        const int64_t blocks = static_cast<int64_t>(p.batch) * p.heads * p.query_blocks;
        return launch(wgmma_forward_kernel<Tile>, blocks, 1, Tile::kThreads, Tile::kSharedBytes, p);
    };
    return p.type == Element::bfloat16 ? with_wgmma_tile<BFloat16>(p, launch_tile)
                                       : with_wgmma_tile<Float16>(p, launch_tile);
}

// Every launch of a forward pass; `wgmma`: the device and this library have it.
template <typename Launch>
const char* launch_forward(const ForwardProblem& p, bool wgmma, const Launch& launch) {
    if (const char* why = launch_codes(p, launch)) return why;
    return wgmma && fits_wgmma(p) ? launch_wgmma(p, launch) : launch_mma(p, launch);
}

}  // namespace
}  // namespace pdn
