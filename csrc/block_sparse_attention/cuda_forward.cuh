// Block-sparse attention on mma.sync (sm_80 and later): one thread block for each block of queries, or slice of one.
//
// Tiles of keys and values come through a ring of three buffers in the order K0 V0 K1 V1 ...: while one is multiplied,
// the next two are under way, so that every copy has a whole step's time. Softmax is the running one; scores and their
// exponentials never leave the registers.
#pragma once

#include "cuda_codes.cuh"

namespace pdn {
namespace {

// What a thread block keeps in shared memory, since registers are short.
struct alignas(16) ForwardPlace {
    Place at;
    const char *keys, *values;
};

// MT x 16 rows a warp, at most ROWS rows a thread block, KEYS keys a step. Padding of D to SIZE is zeros.
template <typename T_, int SIZE_, int MT_, int ROWS_, int KEYS_, bool CODES_>
struct ForwardTile {
    using T = T_;
    static constexpr int SIZE = SIZE_, MT = MT_, ROWS = ROWS_, KEYS = KEYS_;
    static constexpr bool CODES = CODES_;  // scores from int8 codes
    static constexpr int NT = KEYS / 8, DT = SIZE / 8;
    static constexpr int kChunks = SIZE * static_cast<int>(sizeof(T)) / 16, kPitch = round_up(kChunks * 16, 128);
    static constexpr int kScoreChunks = CODES ? SIZE / 16 : kChunks, kScorePitch = round_up(kScoreChunks * 16, 128);
    static constexpr int kSlot = KEYS * kPitch, kSlots = 3;
    static constexpr int kThreads = ROWS / (16 * MT) * 32;
    static constexpr int kSharedBytes = ROWS * kPitch + kSlots * kSlot + static_cast<int>(sizeof(ForwardPlace));
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000  // thread blocks of a multiprocessor; three would spill here
    static constexpr int kResident = 2;
#else
    static constexpr int kResident = SIZE <= 64 && sizeof(T) == 2 ? 3 : 2;
#endif
    static_assert(kScorePitch <= kPitch && kThreads >= 32);
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    forward_kernel(const __grid_constant__ ForwardProblem p) {
    using T = typename Tile::T;
    constexpr int MT = Tile::MT, NT = Tile::NT, DT = Tile::DT, KEYS = Tile::KEYS;
    PDN_SHARED(memory);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const Place at = place_of(blockIdx.x, p.heads, p.query_blocks, p.log_block, Tile::ROWS, p.queries);
    if (at.rows <= 0) return;
    const int kv_head = at.head / (p.heads / p.kv_heads);
    const int length = length_of(p.key_lengths, at.batch, p.keys);
    const uint32_t base = shared_address(memory), ring = base + Tile::ROWS * Tile::kPitch;

    const int64_t head_index = static_cast<int64_t>(at.batch) * p.heads + at.head;
    const int64_t kv_index = static_cast<int64_t>(at.batch) * p.kv_heads + kv_head;
    const int chunks = p.size * static_cast<int>(sizeof(T)) / 16;
    const char *queries, *keys, *values = rows_of<T>(p.value, at.batch, kv_head);
    int64_t query_bytes, key_bytes;
    int score_chunks;
    const int64_t value_bytes = row_bytes<T>(p.value);
    if constexpr (Tile::CODES) {
        const Codes codes(p);
        queries = reinterpret_cast<const char*>(codes.query + head_index * p.queries * codes.pitch);
        keys = reinterpret_cast<const char*>(codes.key + kv_index * p.keys * codes.pitch);
        query_bytes = key_bytes = codes.pitch, score_chunks = codes.pitch / 16;
    } else {
        queries = rows_of<T>(p.query, at.batch, at.head), keys = rows_of<T>(p.key, at.batch, kv_head);
        query_bytes = row_bytes<T>(p.query), key_bytes = row_bytes<T>(p.key), score_chunks = chunks;
    }

    ForwardPlace* stored = reinterpret_cast<ForwardPlace*>(memory + Tile::kSharedBytes - sizeof(ForwardPlace));
    if (thread == 0) *stored = {at, keys, values};
    const KeptTokens kept = kept_tokens(p.kept, at.batch, at.head, at.block, p.log_block, length);
    const int steps = kept.steps(KEYS);
    Step<KEYS> loading, computing;
    loading.begin(kept);
    int slot = 0;  // of the tile to multiply with
    auto copy_keys = [&](int to, const char* keys) {
        if (loading.number < steps)
            copy_rows<KEYS, Tile::kScoreChunks, Tile::kThreads>(ring + to * Tile::kSlot, Tile::kScorePitch,
                                                                keys + loading.first(kept) * key_bytes, key_bytes,
                                                                loading.existing(kept), score_chunks, thread);
        copies_commit();
    };
    auto copy_values = [&](int to, const char* values) {
        if (loading.number < steps)
            copy_rows<KEYS, Tile::kChunks, Tile::kThreads>(ring + to * Tile::kSlot, Tile::kPitch,
                                                           values + loading.first(kept) * value_bytes, value_bytes,
                                                           loading.existing(kept), chunks, thread);
        copies_commit();
        computing = loading;
        loading.advance(kept);
    };
    copy_rows<Tile::ROWS, Tile::kScoreChunks, Tile::kThreads>(base, Tile::kScorePitch, queries + at.row * query_bytes,
                                                              query_bytes, at.rows, score_chunks, thread);
    copy_keys(0, keys);
    copy_values(1, values);

    float factor = p.scale * kLog2E;
    if constexpr (Tile::CODES) factor *= __ldg(Codes(p).query_scale + head_index * p.query_blocks + at.block);
    const uint32_t own_queries = base + warp * 16 * MT * Tile::kScorePitch;
    float acc[MT][DT][4], shrink[MT][2];
    clear(acc);
    SoftmaxRows<MT> rows;
    rows.start();
    for (int step = 0; step < steps; ++step) {
        float scores[MT][NT][4];
        copies_wait<1>();
        __syncthreads();  // the keys have arrived, and every warp is done with the values before
        copy_keys(slot == 0 ? 2 : slot - 1, stored->keys);
        if constexpr (Tile::CODES) {
            int sums[MT][NT][4];
            clear(sums);
            product_nt(sums, own_queries, ring + slot * Tile::kSlot, Tile::kScorePitch, Tile::SIZE / 32, lane);
            const float* scales = Codes(p).key_scale + kv_index * p.key_blocks;
            const float step_factor = factor * __ldg(scales + (computing.start >> p.log_block));
#pragma unroll
            for (int i = 0; i < MT; ++i)
#pragma unroll
                for (int j = 0; j < NT; ++j)
#pragma unroll
                    for (int r = 0; r < 4; ++r) scores[i][j][r] = static_cast<float>(sums[i][j][r]) * step_factor;
        } else {
            clear(scores);
            product_nt(T{}, scores, own_queries, ring + slot * Tile::kSlot, Tile::kScorePitch, Tile::kChunks / 2, lane);
            scale_all(scores, factor);
        }
        slot = slot == 2 ? 0 : slot + 1;
        const int existing = computing.existing(kept);
        if (existing < KEYS) mask_columns(existing, lane, scores);
        if (rows.add(scores, shrink))
#pragma unroll
            for (int i = 0; i < MT; ++i)
#pragma unroll
                for (int j = 0; j < DT; ++j)
#pragma unroll
                    for (int r = 0; r < 4; ++r) acc[i][j][r] *= shrink[i][r / 2];
        const LeftOperand<T, MT, NT> weights(scores);
        copies_wait<1>();
        __syncthreads();  // the values have arrived, and every warp is done with the keys
        copy_values(slot == 0 ? 2 : slot - 1, stored->values);
        product_nn(acc, weights, ring + slot * Tile::kSlot, Tile::kPitch, lane);
        slot = slot == 2 ? 0 : slot + 1;
    }
    copies_wait<0>();
    __syncthreads();  // every warp is done with its queries, and the results take their place

    rows.finish();
    const Place place = stored->at;
    const int64_t place_index = static_cast<int64_t>(place.batch) * p.heads + place.head;
    float inverse[MT][2];
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            inverse[i][h] = rows.sum[i][h] == 0.f ? 0.f : 1.f / rows.sum[i][h];
            const int row = (warp * MT + i) * 16 + h * 8 + lane / 4;
            if (lane % 4 || row >= place.rows) continue;
            const int64_t to = place_index * p.queries + place.row + row;
            float lse = rows.log_sum(i, h);
            if constexpr (Tile::CODES) lse += p.scale * Codes(p).query_mean[to];
            p.lse[to] = lse;
        }
    stage_rows<T>(memory + warp * 16 * MT * Tile::kPitch, Tile::kPitch, acc, inverse, lane);
    __syncthreads();
    char* output =
        const_cast<char*>(rows_of<T>(p.output, place.batch, place.head)) + place.row * row_bytes<T>(p.output);
    write_rows<Tile::kChunks, Tile::kThreads>(memory, Tile::kPitch, place.rows, output, row_bytes<T>(p.output), chunks,
                                              thread);
}

// ------------------------------------------------------------------------------------------------------------- shapes

// Every tile needs at most 96 KiB of shared memory, and no more keys a step than a block has.
template <typename T, bool CODES, typename F>
auto with_forward_tile(int size, int log_block, const F& f) {
    if constexpr (sizeof(T) == 4) {
        if (size <= 64) return f(ForwardTile<T, 64, 2, 64, 16, CODES>{});
        return size <= 128 ? f(ForwardTile<T, 128, 1, 64, 16, CODES>{}) : f(ForwardTile<T, 256, 1, 32, 16, CODES>{});
    } else if (log_block >= 6) {
        if (size > 128) return f(ForwardTile<T, 256, 1, 64, 32, CODES>{});
        if (log_block == 6)
            return size <= 64 ? f(ForwardTile<T, 64, 2, 64, 64, CODES>{}) : f(ForwardTile<T, 128, 2, 64, 64, CODES>{});
        return size <= 64 ? f(ForwardTile<T, 64, 2, 128, 64, CODES>{}) : f(ForwardTile<T, 128, 2, 128, 64, CODES>{});
    } else {
        if (size <= 64) return f(ForwardTile<T, 64, 2, 32, 16, CODES>{});
        return size <= 128 ? f(ForwardTile<T, 128, 2, 32, 16, CODES>{}) : f(ForwardTile<T, 256, 1, 32, 16, CODES>{});
    }
}

// Calls `f` with the tile for `p`.
template <typename F>
auto with_forward_tile(const ForwardProblem& p, const F& f) {
    const int size = p.size, log_block = p.log_block;
    if (p.type == Element::float32)
        return p.int8_scores ? with_forward_tile<float, true>(size, log_block, f)
                             : with_forward_tile<float, false>(size, log_block, f);
    if (p.type == Element::bfloat16)
        return p.int8_scores ? with_forward_tile<BFloat16, true>(size, log_block, f)
                             : with_forward_tile<BFloat16, false>(size, log_block, f);
    return p.int8_scores ? with_forward_tile<Float16, true>(size, log_block, f)
                         : with_forward_tile<Float16, false>(size, log_block, f);
}

// What comes before the forward kernel: launch(kernel, thread blocks in x and y, threads, bytes of shared memory, p)
// returns why it failed, or null.
template <typename Launch>
const char* launch_codes(const ForwardProblem& p, const Launch& launch) {
    if (!p.int8_scores) return nullptr;
    const int64_t heads = static_cast<int64_t>(p.batch) * p.heads,
                  kv_heads = static_cast<int64_t>(p.batch) * p.kv_heads;
    const int parts = Codes(p).parts, sums_bytes = kCodeThreads * 8 * 4;
    const char* why = launch(key_sums_kernel, kv_heads * parts, 1, kCodeThreads, sums_bytes, p);
    if (!why) why = launch(key_mean_kernel, kv_heads, 1, kCodeThreads, 0, p);
    if (!why) why = launch(codes_kernel<true>, kv_heads * p.key_blocks, 1, kCodeThreads, 64, p);
    if (!why) why = launch(codes_kernel<false>, heads * p.query_blocks, 1, kCodeThreads, 64, p);
    return why;
}

template <typename Launch>
const char* launch_mma(const ForwardProblem& p, const Launch& launch) {
    return with_forward_tile(p, [&](auto tile) {
        using Tile = decltype(tile);
        const int64_t blocks =
            slices_of(static_cast<int64_t>(p.batch) * p.heads, p.query_blocks, p.log_block, Tile::ROWS);
        return launch(forward_kernel<Tile>, blocks, 1, Tile::kThreads, Tile::kSharedBytes, p);
    });
}

}  // namespace
}  // namespace pdn
