// What the attention kernels on CUDA share: tensors of tokens, lists of blocks, masks.
#pragma once

#include "cuda_attention.h"
#include "cuda_tiles.cuh"

namespace pdn {
namespace {

using cuda::BlockLists;
using cuda::Tokens;

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

PDN_HD float negative_infinity() { return -INFINITY; }

template <typename T>
PDN_HD const char* rows_of(const Tokens& t, int batch, int head) {
    return reinterpret_cast<const char*>(static_cast<const T*>(t.data) + batch * t.batch_stride + head * t.head_stride);
}

template <typename T>
PDN_HD int64_t row_bytes(const Tokens& t) {
    return t.row_stride * static_cast<int64_t>(sizeof(T));
}

PDN_HD int smaller(int x, int y) { return x < y ? x : y; }

// The tokens that one block reads: those of the listed blocks, in the list's order.
struct KeptTokens {
    const void* indices;
    bool wide;
    int count, log_block, length;  // blocks of the list, tokens of a block; tokens from `length` on do not exist

    PDN_DEVICE int block(int entry) const {
        return wide ? __ldg(static_cast<const int32_t*>(indices) + entry)
                    : __ldg(static_cast<const int16_t*>(indices) + entry);
    }
    PDN_DEVICE int steps(int tokens) const { return (count << log_block) / tokens; }  // blocks hold whole steps
};

PDN_DEVICE KeptTokens kept_tokens(const BlockLists& lists, int batch, int head, int row, int log_block, int length) {
    const int64_t at = batch * lists.batch_stride + head * lists.head_stride + row;
    const char* indices = static_cast<const char*>(lists.indices) + at * lists.longest * (lists.wide ? 4 : 2);
    return {indices, lists.wide, __ldg(lists.counts + at), log_block, length};
}

// A step of a walk over kept tokens, N at a time; a block's number is read when the walk comes to the step before it.
template <int N>
struct Step {
    int number, start;  // start: the first token of the step's block

    PDN_DEVICE void begin(const KeptTokens& kept) {
        number = 0, start = 0;
        if (kept.count > 0) start = kept.block(0) << kept.log_block;
    }
    PDN_DEVICE void advance(const KeptTokens& kept) {
        ++number;
        const int entry = number * N >> kept.log_block;
        if (inside(kept) == 0 && entry < kept.count) start = kept.block(entry) << kept.log_block;
    }
    PDN_DEVICE int inside(const KeptTokens& kept) const { return number * N & ((1 << kept.log_block) - 1); }
    PDN_DEVICE int first(const KeptTokens& kept) const { return start + inside(kept); }
    // How many of the step's tokens exist; all of them if N or more.
    PDN_DEVICE int existing(const KeptTokens& kept) const { return kept.length - first(kept); }
};

// The place of a thread block: blocks of rows of one head are cut into slices of at most `rows` rows.
struct Place {
    int batch, head, block, row, rows;  // rows: that exist; may be 0 or less
};

PDN_DEVICE Place place_of(uint32_t index, int heads, int blocks, int log_block, int rows, int length) {
    const uint32_t slices = ((1 << log_block) + rows - 1) / rows, slice = index % slices;
    index /= slices;
    const int block = static_cast<int>(index % static_cast<uint32_t>(blocks));
    index /= static_cast<uint32_t>(blocks);
    const int first = static_cast<int>(slice) * rows, row = (block << log_block) + first;
    const int size = smaller(rows, (1 << log_block) - first);
    return {static_cast<int>(index / static_cast<uint32_t>(heads)),
            static_cast<int>(index % static_cast<uint32_t>(heads)), block, row, smaller(size, length - row)};
}

// Thread blocks that cut `blocks` blocks of `heads` heads into slices of at most ROWS rows.
inline int64_t slices_of(int64_t heads, int blocks, int log_block, int rows) {
    return heads * blocks * (((1 << log_block) + rows - 1) / rows);
}

PDN_DEVICE int length_of(const int32_t* lengths, int batch, int all) {
    return lengths ? smaller(__ldg(lengths + batch), all) : all;
}

// Sums and largest values of a row are spread over the four lanes that hold it.
PDN_DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(kEveryLane, x, 1);
    return x + __shfl_xor_sync(kEveryLane, x, 2);
}
PDN_DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kEveryLane, x, 1));
    return fmaxf(x, __shfl_xor_sync(kEveryLane, x, 2));
}

// Scores of columns from `existing` on become -infinity.
template <int MT, int NT>
PDN_DEVICE void mask_columns(int existing, int lane, float (&scores)[MT][NT][4]) {
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            if (score_column(lane, j) + e < existing) continue;
#pragma unroll
            for (int i = 0; i < MT; ++i) scores[i][j][e] = scores[i][j][2 + e] = negative_infinity();
        }
}

template <int MT, int NT>
PDN_DEVICE void scale_all(float (&x)[MT][NT][4], float factor) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) x[i][j][r] *= factor;
}

// Running maxima and sums of exponentials of a warp's rows, to the base 2. The sums are each lane's share.
template <int MT>
struct SoftmaxRows {
    float max[MT][2], sum[MT][2];

    PDN_DEVICE void start() {
#pragma unroll
        for (int i = 0; i < MT; ++i) max[i][0] = max[i][1] = negative_infinity(), sum[i][0] = sum[i][1] = 0.f;
    }

    // Takes in scores, which become exp2(score - max). What was summed before shrinks by `shrink`; true if that is not
    // 1 for some row of the warp.
    template <int NT>
    PDN_DEVICE bool add(float (&scores)[MT][NT][4], float (&shrink)[MT][2]) {
        bool changed = false;
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float top = scores[i][0][h * 2];
#pragma unroll
                for (int j = 0; j < NT; ++j) top = fmaxf(top, fmaxf(scores[i][j][h * 2], scores[i][j][h * 2 + 1]));
                const float next = fmaxf(max[i][h], quad_max(top));
                const float shift = next == negative_infinity() ? 0.f : next;
                shrink[i][h] = exp2_fast(max[i][h] - shift);
                changed = changed || next != max[i][h];
                max[i][h] = next;
                float share = 0.f;
#pragma unroll
                for (int j = 0; j < NT; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float& x = scores[i][j][h * 2 + e];
                        x = exp2_fast(x - shift);
                        share += x;
                    }
                sum[i][h] = fmaf(sum[i][h], shrink[i][h], share);
            }
        return __any_sync(kEveryLane, changed);
    }

    PDN_DEVICE void finish() {
#pragma unroll
        for (int i = 0; i < MT; ++i) sum[i][0] = quad_sum(sum[i][0]), sum[i][1] = quad_sum(sum[i][1]);
    }
    // Natural logarithm of the sum; -infinity for a row that took in nothing.
    PDN_DEVICE float log_sum(int i, int h) const {
        return sum[i][h] == 0.f ? negative_infinity() : (max[i][h] + log2f(sum[i][h])) * kLn2;
    }
};

}  // namespace
}  // namespace pdn
