// What a block of pixels reads, in float32 scratch: the mirrored image around it, and sigmas as factors of exponents.
// Included once per ISA level.
#pragma once

#include "../core/attention/softmax.inl"
#include "../core/fp16.h"
#include "../core/lanes.inl"
#include "params.h"

namespace pdn {
namespace adaptive_bilateral_filter {
namespace {

using attention::exp2_negative;

constexpr int kFixedChannels = 4;  // up to here the number of channels is known to the compiler
constexpr float kHalfLog2E = 0.72134752044448170f;
constexpr float kMinusTwoLn2 = -1.38629436111989062f;
constexpr float kSteepest = -1e30f;  // of a factor: times a difference of 0 it is still 0

PDN_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The place in [0, size) where the mirrored axis has `i`.
PDN_INLINE int64_t reflected(int64_t i, int64_t size) {
    if (i < 0) i = -i;
    if (i < size) return i;
    const int64_t period = 2 * (size - 1);
    if (period == 0) return 0;
    i %= period;
    return i < size ? i : period - i;
}

PDN_INLINE float widened(float x) { return x; }
PDN_INLINE float widened(bf16 x) { return from_bf16(x); }
PDN_INLINE float widened(fp16 x) { return from_fp16(x); }
PDN_INLINE void narrow(float x, float* to) { *to = x; }
PDN_INLINE void narrow(float x, bf16* to) { *to = to_bf16(x); }
PDN_INLINE void narrow(float x, fp16* to) { *to = to_fp16(x); }

// Columns [begin, end) of a row that lies inside the image.
template <class T>
PDN_INLINE void read_inside(float* to, const T* row, int64_t stride, int64_t begin, int64_t end) {
    int64_t i = begin;
    if (stride == 1)
        for (; i + kWidth <= end; i += kWidth) store(to + (i - begin), load(row + i));
    for (; i < end; ++i) to[i - begin] = widened(row[i * stride]);
}

// Columns [begin, end) of the mirrored row.
template <class T>
PDN_INLINE void read_mirrored(float* to, const T* row, int64_t stride, int64_t size, int64_t begin, int64_t end) {
    const int64_t first = begin > 0 ? begin : 0, last = end < size ? end : size;
    for (int64_t i = begin; i < first; ++i) to[i - begin] = widened(row[reflected(i, size) * stride]);
    read_inside(to + (first - begin), row, stride, first, last);
    for (int64_t i = last > first ? last : first; i < end; ++i)
        to[i - begin] = widened(row[reflected(i, size) * stride]);
}

template <class T>
void read_rows_of(const Params& p, const Image& image, int64_t number, int64_t channel, int64_t top, int64_t bottom,
                  int64_t left, int64_t right, float* to, int64_t pitch) {
    const T* plane = static_cast<const T*>(image.data) + number * image.stride[0] + channel * image.stride[1];
    for (int64_t y = top; y < bottom; ++y, to += pitch) {
        read_mirrored(to, plane + reflected(y, p.height) * image.stride[2], image.stride[3], p.width, left, right);
        for (int64_t i = right - left; i < pitch; ++i) to[i] = 0.f;
    }
}

// Rows [top, bottom) and columns [left, right) of one channel of the mirrored image; the rest of each row is 0.
PDN_INLINE void read_rows(const Params& p, const Image& image, int64_t number, int64_t channel, int64_t top,
                          int64_t bottom, int64_t left, int64_t right, float* to, int64_t pitch) {
    if (p.dtype == DType::float32)
        read_rows_of<float>(p, image, number, channel, top, bottom, left, right, to, pitch);
    else if (p.dtype == DType::bfloat16)
        read_rows_of<bf16>(p, image, number, channel, top, bottom, left, right, to, pitch);
    else
        read_rows_of<fp16>(p, image, number, channel, top, bottom, left, right, to, pitch);
}

template <class T>
PDN_INLINE void write_row_of(const Image& image, int64_t number, int64_t channel, int64_t y, int64_t left,
                             int64_t count, const float* from) {
    T* row = static_cast<T*>(image.data) + number * image.stride[0] + channel * image.stride[1] + y * image.stride[2] +
             left * image.stride[3];
    int64_t i = 0;
    if (image.stride[3] == 1)
        for (; i + kWidth <= count; i += kWidth) store(row + i, load(from + i));
    for (; i < count; ++i) narrow(from[i], row + i * image.stride[3]);
}

// `count` pixels of a row, from `left` on.
PDN_INLINE void write_row(const Params& p, const Image& image, int64_t number, int64_t channel, int64_t y, int64_t left,
                          int64_t count, const float* from) {
    if (p.dtype == DType::float32)
        write_row_of<float>(image, number, channel, y, left, count, from);
    else if (p.dtype == DType::bfloat16)
        write_row_of<bf16>(image, number, channel, y, left, count, from);
    else
        write_row_of<fp16>(image, number, channel, y, left, count, from);
}

// -log2(e) / (2 sigma^2), so that a weight is exp2 of factors times squares.
PDN_INLINE float factor(float sigma) {
    const float value = -kHalfLog2E / sigma / sigma;
    return value < kSteepest ? kSteepest : value;
}

// The factors of x, y and the range at columns [left, right) of row `y`, which are inside the image.
inline void read_factors(const Params& p, int64_t number, int64_t y, int64_t left, int64_t right, float* of_x,
                         float* of_y, float* of_range) {
    const int64_t across = p.width / p.tile_width;
    const float* sigma = p.sigma + (number * (p.height / p.tile_height) + y / p.tile_height) * across * 3;
    for (int64_t i = left; i < right;) {
        const int64_t tile = i / p.tile_width;
        const int64_t end = (tile + 1) * p.tile_width < right ? (tile + 1) * p.tile_width : right;
        const float x = factor(sigma[3 * tile]), v = factor(sigma[3 * tile + 1]), r = factor(sigma[3 * tile + 2]);
        for (; i < end; ++i) of_x[i - left] = x, of_y[i - left] = v, of_range[i - left] = r;
    }
}

inline void clear(float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = 0.f;
}

}  // namespace
}  // namespace adaptive_bilateral_filter
}  // namespace pdn
