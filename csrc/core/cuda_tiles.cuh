// Tiles of rows in shared memory, and their products, for kernels that multiply tiles of tokens (attention).
//
// A warp computes MT x 16 rows of a result as 16 x 8 tiles: lane l holds rows l / 4 and l / 4 + 8 of each, two columns
// in either, as the tensor cores leave them (mma.sync m16n8k16, float32 sums). float32 has no instruction that keeps
// the digits of float32 (three products of TF32 come close, but the tensor cores cut off the sums' last bits, and long
// sums drift), so its products are plain multiplications and additions with the same division of labour.
#pragma once

#include "cuda_mma.cuh"

namespace pdn {
namespace {

PDN_HD constexpr int round_up(int x, int step) { return (x + step - 1) / step * step; }

// Where 16-byte chunk `chunk` of row `row` lies in a tile with rows of `pitch` bytes, a multiple of 128: eight rows'
// equal chunks lie in different banks.
PDN_HD int tile_offset(int pitch, int row, int chunk) { return row * pitch + ((chunk ^ (row & 7)) << 4); }

// From the address of chunk 0 or 1 of a row to that of chunk 0 or 1 of pair `pair`; tiles start at multiples of 128.
PDN_HD uint32_t along(uint32_t address, int pair) { return (address ^ ((pair & 3) << 5)) + (pair >> 2) * 128; }

// Starts copies of ROWS rows of CHUNKS chunks to a tile. Rows from `existing` on, and chunks from `chunks` on, become
// zero: their addresses are formed, but not read.
template <int ROWS, int CHUNKS, int THREADS>
PDN_DEVICE void copy_rows(uint32_t to, int pitch, const char* from, int64_t row_bytes, int existing, int chunks,
                          int thread) {
    if constexpr (THREADS % CHUNKS == 0) {  // a thread's copies lie below each other, kStep (a power of two) apart
        constexpr int kStep = THREADS / CHUNKS;
        const int first = thread / CHUNKS, chunk = thread % CHUNKS, end = chunk < chunks ? existing : 0;
        const uint32_t at = to + tile_offset(pitch, first, chunk);
        const char* source = from + first * row_bytes + chunk * 16;
#pragma unroll
        for (int row = 0; row < ROWS; row += kStep) {
            if (ROWS % kStep && first + row >= ROWS) break;
            copy16((at ^ ((row & 7) << 4)) + row * pitch, source, first + row < end);
            source += kStep * row_bytes;
        }
    } else {
#pragma unroll 4
        for (int k = 0; k < ROWS * CHUNKS; k += THREADS) {
            const int row = (thread + k) / CHUNKS, chunk = (thread + k) % CHUNKS;
            if (ROWS * CHUNKS % THREADS && row >= ROWS) break;
            const bool exists = row < existing && chunk < chunks;
            copy16(to + tile_offset(pitch, row, chunk), from + row * row_bytes + chunk * 16, exists);
        }
    }
}

// The two columns of a product_nt that a lane holds in tile `j` of a row; rows are lane / 4 and lane / 4 + 8.
PDN_HD int score_column(int lane, int j) { return j * 8 + (lane & 3) * 2; }

// The same of a product_nn: float32 reads four adjacent columns at a time.
template <typename T>
PDN_HD int value_column(int lane, int j) {
    return sizeof(T) == 4 ? (j >> 1) * 16 + (lane & 3) * 4 + (j & 1) * 2 : score_column(lane, j);
}

// --------------------------------------------------------------------------------------------------- 16-bit and int8

// acc += A B^T over `steps` x 32 bytes of depth: A has this warp's MT x 16 rows, B has NT x 8. Elements are T where the
// sums are floats, int8 where they are integers.
template <typename T, typename Sum, int MT, int NT>
PDN_DEVICE void product_nt_mma(Sum (&acc)[MT][NT][4], uint32_t a, uint32_t b, int pitch, int steps, int lane) {
    const uint32_t at_a = a + tile_offset(pitch, lane & 15, lane >> 4);
    const uint32_t at_b = b + tile_offset(pitch, (lane & 7) + (lane >> 4 << 3), lane >> 3 & 1);
#pragma unroll
    for (int step = 0; step < steps; ++step) {
        uint32_t left[MT][4];
#pragma unroll
        for (int i = 0; i < MT; ++i) load_matrices(left[i], along(at_a, step) + i * 16 * pitch);
#pragma unroll
        for (int j = 0; j < NT / 2; ++j) {
            uint32_t right[4];
            load_matrices(right, along(at_b, step) + j * 16 * pitch);
#pragma unroll
            for (int i = 0; i < MT; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if constexpr (sizeof(T) == 1)
                        multiply(acc[i][2 * j + half], left[i], right[half * 2], right[half * 2 + 1]);
                    else
                        multiply(T{}, acc[i][2 * j + half], left[i], right[half * 2], right[half * 2 + 1]);
                }
        }
    }
}

template <typename T, int MT, int NT>
PDN_DEVICE void product_nt(T, float (&acc)[MT][NT][4], uint32_t a, uint32_t b, int pitch, int steps, int lane) {
    product_nt_mma<T>(acc, a, b, pitch, steps, lane);
}

template <int MT, int NT>
PDN_DEVICE void product_nt(int (&acc)[MT][NT][4], uint32_t a, uint32_t b, int pitch, int steps, int lane) {
    product_nt_mma<int8_t>(acc, a, b, pitch, steps, lane);
}

// A result as the left operand of product_nn, its numbers rounded to T.
template <typename T, int MT, int KT>
struct LeftOperand {
    uint32_t r[MT][KT / 2][4];

    PDN_DEVICE explicit LeftOperand(const float (&p)[MT][KT][4]) {
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int k = 0; k < KT / 2; ++k)
#pragma unroll
                for (int q = 0; q < 4; ++q)
                    r[i][k][q] = pack2(T{}, p[i][2 * k + q / 2][q % 2 * 2], p[i][2 * k + q / 2][q % 2 * 2 + 1]);
    }
};

// acc += P B: B has KT x 8 rows of NT x 8 numbers.
template <typename T, int MT, int KT, int NT>
PDN_DEVICE void product_nn(float (&acc)[MT][NT][4], const LeftOperand<T, MT, KT>& p, uint32_t b, int pitch, int lane) {
    const uint32_t at_b = b + tile_offset(pitch, lane & 15, lane >> 4);
#pragma unroll
    for (int k = 0; k < KT / 2; ++k)
#pragma unroll
        for (int j = 0; j < NT / 2; ++j) {
            uint32_t right[4];
            load_matrices_transposed(right, along(at_b, j) + k * 16 * pitch);
#pragma unroll
            for (int i = 0; i < MT; ++i) {
                multiply(T{}, acc[i][2 * j], p.r[i][k], right[0], right[1]);
                multiply(T{}, acc[i][2 * j + 1], p.r[i][k], right[2], right[3]);
            }
        }
}

// ----------------------------------------------------------------------------------------------------------- float32

template <int MT, int NT>
PDN_DEVICE void product_nt(float, float (&acc)[MT][NT][4], uint32_t a, uint32_t b, int pitch, int steps, int lane) {
#pragma unroll 2
    for (int chunk = 0; chunk < steps * 2; ++chunk) {
        Float4 left[MT][2];
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                left[i][h] = load_shared4(a + tile_offset(pitch, i * 16 + h * 8 + (lane >> 2), chunk));
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const Float4 right = load_shared4(b + tile_offset(pitch, score_column(lane, j) + e, chunk));
#pragma unroll
                for (int d = 0; d < 4; ++d)
#pragma unroll
                    for (int i = 0; i < MT; ++i)
#pragma unroll
                        for (int h = 0; h < 2; ++h)
                            acc[i][j][h * 2 + e] = fmaf(left[i][h].v[d], right.v[d], acc[i][j][h * 2 + e]);
            }
    }
}

// COUNT x 8 columns of product_nn. Its sums are added up apart: a chain over all keys would lose digits.
template <int MT, int KT, int NT, int FIRST, int COUNT>
PDN_DEVICE void product_piece(float (&acc)[MT][NT][4], const float (&p)[MT][KT][4], uint32_t b, int pitch, int lane) {
    float sum[MT][COUNT][4] = {};
#pragma unroll
    for (int k = 0; k < KT; ++k)
#pragma unroll 1
        for (int owner = 0; owner < 4; ++owner)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float left[MT][2];
#pragma unroll
                for (int i = 0; i < MT; ++i)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        left[i][h] = __shfl_sync(kEveryLane, p[i][k][h * 2 + e], (lane & ~3) | owner);
#pragma unroll
                for (int j = 0; j < COUNT / 2; ++j) {
                    const int row = k * 8 + owner * 2 + e;
                    const Float4 right = load_shared4(b + tile_offset(pitch, row, FIRST * 2 + j * 4 + (lane & 3)));
#pragma unroll
                    for (int d = 0; d < 4; ++d)
#pragma unroll
                        for (int i = 0; i < MT; ++i)
#pragma unroll
                            for (int h = 0; h < 2; ++h) {
                                float& to = sum[i][2 * j + d / 2][h * 2 + d % 2];
                                to = fmaf(left[i][h], right.v[d], to);
                            }
                }
            }
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < COUNT; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) acc[i][FIRST + j][r] += sum[i][j][r];
}

template <int MT, int KT, int NT, int FIRST = 0>
PDN_DEVICE void product_pieces(float (&acc)[MT][NT][4], const float (&p)[MT][KT][4], uint32_t b, int pitch, int lane) {
    constexpr int kCount = NT > 16 ? 4 : 8;  // fewer where registers are short
    product_piece<MT, KT, NT, FIRST, kCount>(acc, p, b, pitch, lane);
    if constexpr (FIRST + kCount < NT) product_pieces<MT, KT, NT, FIRST + kCount>(acc, p, b, pitch, lane);
}

template <int MT, int KT>
struct LeftOperand<float, MT, KT> {
    const float (&p)[MT][KT][4];

    PDN_DEVICE explicit LeftOperand(const float (&x)[MT][KT][4]) : p(x) {}
};

template <int MT, int KT, int NT>
PDN_DEVICE void product_nn(float (&acc)[MT][NT][4], const LeftOperand<float, MT, KT>& left, uint32_t b, int pitch,
                           int lane) {
    product_pieces<MT, KT, NT>(acc, left.p, b, pitch, lane);
}

// ------------------------------------------------------------------------------------------------------------ results

PDN_DEVICE void store_two(BFloat16* to, float x, float y) {
    *reinterpret_cast<uint32_t*>(to) = pack2(BFloat16{}, x, y);
}
PDN_DEVICE void store_two(Float16* to, float x, float y) { *reinterpret_cast<uint32_t*>(to) = pack2(Float16{}, x, y); }
PDN_DEVICE void store_two(float* to, float x, float y) {
    struct alignas(8) Two {
        float v[2];
    };
    *reinterpret_cast<Two*>(to) = Two{{x, y}};
}

// A warp's result, each row times its factor, to a tile in shared memory whose rows of this warp start at `tile`.
template <typename T, int MT, int NT>
PDN_DEVICE void stage_rows(char* tile, int pitch, const float (&acc)[MT][NT][4], const float (&factor)[MT][2],
                           int lane) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int j = 0; j < NT; ++j) {
                const int byte = value_column<T>(lane, j) * static_cast<int>(sizeof(T));
                const int at = tile_offset(pitch, i * 16 + h * 8 + (lane >> 2), byte / 16) + byte % 16;
                store_two(reinterpret_cast<T*>(tile + at), acc[i][j][h * 2] * factor[i][h],
                          acc[i][j][h * 2 + 1] * factor[i][h]);
            }
}

// A staged tile's first `rows` rows, and `chunks` chunks of each, to memory.
template <int CHUNKS, int THREADS>
PDN_DEVICE void write_rows(const char* tile, int pitch, int rows, char* to, int64_t row_bytes, int chunks, int thread) {
    for (int i = thread; i < rows * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        if (chunk < chunks)
            *reinterpret_cast<Float4*>(to + row * row_bytes + chunk * 16) =
                *reinterpret_cast<const Float4*>(tile + tile_offset(pitch, row, chunk));
    }
}

template <int MT, int NT, typename T>
PDN_DEVICE void clear(T (&acc)[MT][NT][4]) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) acc[i][j][r] = 0;
}

}  // namespace
}  // namespace pdn
