// Reading the tokens of one head, in any of the dtypes. Included once per ISA level.
#pragma once

#include "../fp16.h"
#include "tile.inl"
#include "tokens.h"

namespace pdn {
namespace attention {
namespace {

PDN_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
PDN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#if defined(__AVX512F__)
PDN_INLINE vf widen(__m256i x, const bf16*) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
PDN_INLINE vf widen(__m256i x, const fp16*) { return (vf)_mm512_cvtph_ps(x); }
#endif

// Up to kWidth elements, the others zero.
template <class T>
PDN_INLINE vf load_some(const T* p, int64_t n) {
    if (n >= kWidth) return load(p);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 2) {  // quicker than by way of memory
        const __m256i some = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p);
        return widen(some, p);
    }
#endif
    return load_partial(p, static_cast<int>(n));
}

template <class T>
PDN_INLINE void store_some(T* p, vf v, int64_t n) {
    n >= kWidth ? store(p, v) : store_partial(p, v, static_cast<int>(n));
}

// Tokens of one head: `row(i)` is the first element of token i. Those from `count` on are not there and read as zeros.
template <class T>
struct Rows {
    const T* data;
    int64_t stride, count, size;

    Rows(const Tokens& tokens, int64_t image, int64_t head, int64_t tokens_read, int64_t elements)
        : data(static_cast<const T*>(tokens.data) + image * tokens.batch_stride + head * tokens.head_stride),
          stride(tokens.row_stride),
          count(tokens_read),
          size(elements) {}
    PDN_INLINE const T* row(int64_t i) const { return data + i * stride; }

    // kWidth elements of token i from `first` on, as floats; zeros past the end of tokens and of the head.
    PDN_INLINE vf elements(int64_t i, int64_t first) const {
        return i < count && first < size ? load_some(row(i) + first, size - first) : vf{};
    }
};

template <class Cells, class T>
struct Reader {
    // kWidth cells of token i from cell `first` on.
    static PDN_INLINE vf cells(const Rows<T>& rows, int64_t i, int64_t first) { return rows.elements(i, first); }
    // kWidth cells of keys: element `first` and further of the tokens that share the cell `cell`.
    static PDN_INLINE vf values(const Rows<T>& rows, int64_t cell, int64_t first) { return rows.elements(cell, first); }
};

#if defined(__AVX512BF16__)
template <>
struct Reader<Bf16Pairs, bf16> {
    static PDN_INLINE vf cells(const Rows<bf16>& rows, int64_t i, int64_t first) {
        const int64_t left = rows.size - 2 * first;
        if (i >= rows.count || left <= 0) return vf{};
        const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1u;
        return (vf)_mm512_maskz_loadu_epi16(mask, rows.row(i) + 2 * first);
    }
    static PDN_INLINE vf values(const Rows<bf16>& rows, int64_t cell, int64_t first) {
        const __m512i even = (__m512i)rows.elements(2 * cell, first), odd = (__m512i)rows.elements(2 * cell + 1, first);
        return (vf)_mm512_or_si512(_mm512_srli_epi32(even, 16), odd);  // widened bfloat16 end with 16 zeros
    }
};
#endif

}  // namespace
}  // namespace attention
}  // namespace pdn
