// Sums of products in registers. Operands are cells of 32 bits: a float, or two bfloat16 that one instruction
// multiplies and adds up. Included once per ISA level.
#pragma once

#include "../epilogue.inl"
#include "../lanes.inl"

namespace pdn {
namespace attention {
namespace {

constexpr int kRows = 6;  // queries that share every load of keys and values
#if defined(__AVX512F__)
constexpr int kTile = 4;                     // vectors of sums beside each other
constexpr int kLaneRows = 3, kLaneSums = 8;  // queries, elements of a value: see `multiply_lanes`
#else
constexpr int kTile = 2;
constexpr int kLaneRows = 2, kLaneSums = 4;
#endif

struct Floats {
    static constexpr int kPerCell = 1;
    static PDN_INLINE vf repeated(const char* cell) { return splat(*reinterpret_cast<const float*>(cell)); }
    static PDN_INLINE vf add_product(vf sum, vf a, vf b) { return a * b + sum; }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
    static constexpr int kPerCell = 2;
    static PDN_INLINE vf repeated(const char* cell) {
        int32_t bits;
        std::memcpy(&bits, cell, sizeof bits);
        return (vf)_mm512_set1_epi32(bits);
    }
    static PDN_INLINE vf add_product(vf sum, vf a, vf b) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};
#endif

// sums[r][v] += sum over k < count of (the cell at a + r * row_bytes + k * step_bytes) * b[k * Vectors + v]. The cells
// of `a` may lie where they are in a tensor; `b` is packed. `between(k)` runs beside the products.
template <class Cells, int Vectors, int Rows, class Sum, class Between>
PDN_INLINE void add_products(const char* a, int64_t row_bytes, int64_t step_bytes, const float* b, int64_t count,
                             Sum (&sums)[Rows][Vectors], const Between& between) {
    for (int64_t k = 0; k < count; ++k) {
        between(k);
        vf row[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) row[v] = load(b + v * kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const Sum factor = Cells::repeated(a + r * row_bytes);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) sums[r][v] = Cells::add_product(sums[r][v], factor, (Sum)row[v]);
        }
        a += step_bytes;
        b += Vectors * kWidth;
    }
}

template <class Cells, int Vectors, int Rows, class Sum>
PDN_INLINE void add_products(const char* a, int64_t row_bytes, int64_t step_bytes, const float* b, int64_t count,
                             Sum (&sums)[Rows][Vectors]) {
    add_products<Cells, Vectors>(a, row_bytes, step_bytes, b, count, sums, [](int64_t) {});
}

// sums[r][v] = sum over k < count of a[k + r * row_step] * b[k * Vectors * kWidth + v * kWidth ...]
template <class Cells, int Vectors, int Rows>
PDN_INLINE void multiply(const float* a, int64_t row_step, const float* b, int64_t count, vf (&sums)[Rows][Vectors]) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sums[r][v] = vf{};
    add_products<Cells, Vectors>(reinterpret_cast<const char*>(a), 4 * row_step, 4, b, count, sums);
}

// The same with k in the lanes, for heads too small to fill a vector: lane l of sums[r] is the sum over k of
// a[k + r * RowStep] * b[k, l], the cells of `b` in the order [k / kWidth][l][k % kWidth].
template <class Cells, int RowStep>
PDN_INLINE void multiply_lanes(const float* a, const float* b, int64_t count, vf (&sums)[kLaneRows]) {
    vf lanes[kLaneRows][kLaneSums];
#pragma GCC unroll 3
    for (int r = 0; r < kLaneRows; ++r)
#pragma GCC unroll 8
        for (int l = 0; l < kLaneSums; ++l) lanes[r][l] = vf{};
    for (int64_t k = 0; k < count; k += kWidth) {
        vf factor[kLaneRows];
#pragma GCC unroll 3
        for (int r = 0; r < kLaneRows; ++r) factor[r] = load(a + r * RowStep);
#pragma GCC unroll 8
        for (int l = 0; l < kLaneSums; ++l) {
            const vf value = load(b + l * kWidth);
#pragma GCC unroll 3
            for (int r = 0; r < kLaneRows; ++r) lanes[r][l] = Cells::add_product(lanes[r][l], factor[r], value);
        }
        a += kWidth;
        b += kLaneSums * kWidth;
    }
#pragma GCC unroll 3
    for (int r = 0; r < kLaneRows; ++r) sums[r] = sums_of_lanes<kLaneSums>(lanes[r]);
}

}  // namespace
}  // namespace attention
}  // namespace pdn
