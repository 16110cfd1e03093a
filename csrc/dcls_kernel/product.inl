// Small matrix products, one in each lane, and the lanes' way from and to row-major matrices. Included once per ISA
// level.
#pragma once

#include "../core/lanes.inl"

namespace pdn {
namespace dcls_kernel {
namespace {

// Rows and columns of sums that stay in registers.
constexpr int kTileRows = kWidth == 16 ? 3 : 2;
constexpr int kTileColumns = kWidth == 16 ? 6 : 4;

// Vectors of a factor: row i, term k lies at data + i * row + k * term. Strides count floats.
struct Operand {
    const float* data;
    int64_t row, term;
};

// out[i][j] = sum over the terms k of a[i][k] * b[j][k], for M by N vectors; added to what is there where Add.
template <int M, int N, bool Add>
PDN_INLINE void product_tile(Operand a, Operand b, int64_t terms, float* out, int64_t out_row) {
    vf sum[M][N];
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) sum[i][j] = Add ? load(out + i * out_row + j * kWidth) : vf{};
    for (int64_t k = 0; k < terms; ++k) {
        vf x[M];
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) x[i] = load(a.data + i * a.row + k * a.term);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
            const vf y = load(b.data + j * b.row + k * b.term);
#pragma GCC unroll 4
            for (int i = 0; i < M; ++i) sum[i][j] += x[i] * y;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) store(out + i * out_row + j * kWidth, sum[i][j]);
}

// The last columns, fewer than N + 1.
template <int M, int N, bool Add>
PDN_INLINE void product_rest(Operand a, Operand b, int64_t columns, int64_t terms, float* out, int64_t out_row) {
    if constexpr (N > 0) {
        if (columns == N) return product_tile<M, N, Add>(a, b, terms, out, out_row);
        product_rest<M, N - 1, Add>(a, b, columns, terms, out, out_row);
    }
}

template <int M, bool Add>
void product_rows(Operand a, Operand b, int64_t columns, int64_t terms, float* out, int64_t out_row) {
    for (; columns >= kTileColumns; columns -= kTileColumns) {
        product_tile<M, kTileColumns, Add>(a, b, terms, out, out_row);
        b.data += kTileColumns * b.row, out += kTileColumns * kWidth;
    }
    product_rest<M, kTileColumns - 1, Add>(a, b, columns, terms, out, out_row);
}

// out[i][j] for `rows` rows of a and `columns` rows of b; out is dense.
template <bool Add>
void product(Operand a, int64_t rows, Operand b, int64_t columns, int64_t terms, float* out) {
    const int64_t out_row = columns * kWidth;
    for (; rows >= kTileRows; rows -= kTileRows) {
        product_rows<kTileRows, Add>(a, b, columns, terms, out, out_row);
        a.data += kTileRows * a.row, out += kTileRows * out_row;
    }
    for (; rows > 0; --rows) {
        product_rows<1, Add>(a, b, columns, terms, out, out_row);
        a.data += a.row, out += out_row;
    }
}

// Columns up to whole blocks of vectors: what `to_lanes` writes and `from_lanes` may read.
PDN_INLINE int64_t padded(int64_t columns) { return (columns + kWidth - 1) / kWidth * kWidth; }

// Rows first, first + 1, ... of a matrix [rows, columns], row i to lane i of one vector per column; zeros where there
// are no more rows.
void to_lanes(const float* matrix, int64_t rows, int64_t columns, int64_t first, float* out) {
    for (int64_t j = 0; j < columns; j += kWidth) {
        const int count = columns - j < kWidth ? static_cast<int>(columns - j) : kWidth;
        vf block[kWidth];
        for (int i = 0; i < kWidth; ++i)
            block[i] = first + i < rows ? load_partial(matrix + (first + i) * columns + j, count) : vf{};
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) store(out + (j + i) * kWidth, block[i]);
    }
}

// And back.
void from_lanes(const float* in, int64_t rows, int64_t columns, int64_t first, float* matrix) {
    for (int64_t j = 0; j < columns; j += kWidth) {
        const int count = columns - j < kWidth ? static_cast<int>(columns - j) : kWidth;
        vf block[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) block[i] = load(in + (j + i) * kWidth);
        transpose(block);
        for (int i = 0; i < kWidth && first + i < rows; ++i)
            store_partial(matrix + (first + i) * columns + j, block[i], count);
    }
}

}  // namespace
}  // namespace dcls_kernel
}  // namespace pdn
