// Copying a strip's input into scratch: [step][position], each entry the kChannels codes of one step of one pixel. A
// tile of adjoining positions is then adjoining in memory, whatever the stride, the dilation and the borders are.
#pragma once

#include "plan.inl"

namespace pdn {
namespace int8_conv2d {
namespace {

// Up to kWidth steps of one pixel; `channels` > 0 of them exist in memory, the rest comes out as anything.
PDN_INLINE vi pixel_steps(const int8_t* x, int64_t channels) {
    constexpr int kCodes = kWidth * kChannels;
#if defined(__AVX512VNNI__)
    const __mmask64 mask = channels >= kCodes ? ~0ull : (1ull << channels) - 1;
    return (vi)_mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, x), _mm512_set1_epi8(static_cast<char>(0x80)));
#else
    int8_t codes[kCodes];
    if (channels < kCodes) {
        std::memset(codes, 0, sizeof codes);
        std::memcpy(codes, x, static_cast<size_t>(channels));
        x = codes;
    }
#if defined(__AVXVNNI__)
    vi narrow;
    std::memcpy(&narrow, x, sizeof narrow);
    return narrow ^ splat_lanes(static_cast<int32_t>(0x80808080u));
#else
    typedef int8_t Narrow __attribute__((vector_size(kCodes)));
    typedef int16_t Wide __attribute__((vector_size(kCodes * 2)));
    Narrow narrow;
    std::memcpy(&narrow, x, sizeof narrow);
    return (vi) __builtin_convertvector(narrow, Wide);
#endif
#endif
}

// out[i] lane j = in[j] lane i.
PDN_INLINE void transpose(vi (&r)[kWidth]) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#pragma GCC unroll 4
    for (int round = 0; round < 4; ++round) {
        vi next[kWidth];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            next[2 * i] = (vi)_mm512_permutex2var_epi32((__m512i)r[i], low, (__m512i)r[i + 8]);
            next[2 * i + 1] = (vi)_mm512_permutex2var_epi32((__m512i)r[i], high, (__m512i)r[i + 8]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) r[i] = next[i];
    }
#elif defined(__AVX2__)
    __m256i pair[8], quad[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        pair[2 * i] = _mm256_unpacklo_epi32((__m256i)r[2 * i], (__m256i)r[2 * i + 1]);
        pair[2 * i + 1] = _mm256_unpackhi_epi32((__m256i)r[2 * i], (__m256i)r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        quad[i] = _mm256_unpacklo_epi64(pair[i], pair[i + 2]);
        quad[i + 1] = _mm256_unpackhi_epi64(pair[i], pair[i + 2]);
        quad[i + 2] = _mm256_unpacklo_epi64(pair[i + 1], pair[i + 3]);
        quad[i + 3] = _mm256_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = (vi)_mm256_permute2x128_si256(quad[i], quad[i + 4], 0x20);
        r[i + 4] = (vi)_mm256_permute2x128_si256(quad[i], quad[i + 4], 0x31);
    }
#else
    vi next[kWidth];
    for (int i = 0; i < kWidth; ++i)
        for (int j = 0; j < kWidth; ++j) next[i][j] = r[j][i];
    for (int i = 0; i < kWidth; ++i) r[i] = next[i];
#endif
}

// The pixels that `pointers` name, `pitch` of them, as [step][pitch].
void copy_codes(const int8_t* const* pointers, int64_t pitch, int64_t channels, char* codes) {
    constexpr int64_t kCodes = kWidth * kChannels;
    const int64_t steps = ceil_div(channels, kChannels);
    for (int64_t first = 0; first < channels; first += kCodes) {
        const int64_t left = channels - first, step = first / kChannels;
        const int kept = static_cast<int>(min64(kWidth, steps - step));
        for (int64_t at = 0; at < pitch; at += kWidth) {
            vi r[kWidth];
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i) r[i] = pixel_steps(pointers[at + i] + first, left);
            transpose(r);
            char* to = codes + (step * pitch + at) * 4;
            if (kept == kWidth) {
#pragma GCC unroll 16
                for (int i = 0; i < kWidth; ++i) store_lanes(to + i * pitch * 4, r[i]);
                continue;
            }
            for (int i = 0; i < kept; ++i) store_lanes(to + i * pitch * 4, r[i]);
        }
    }
}

// A strip: outputs [row, row + plan.rows) x [column, column + plan.columns) of image n and a group of channels. Its
// positions may reach past the last output; what lies there is read by nobody.
struct Strip {
    int64_t n, group, row, column;
};

// The positions of one part of one axis, clipped to the image: positions [low, high) of the part are inside.
struct Reach {
    int64_t at, low, high;  // at: image position (upsampled) of the part's first position; step apart
};

PDN_INLINE Reach reach_of(const ConvParams& p, const Axis& a, int64_t first_output, int64_t tap, int64_t length) {
    const int64_t at = first_output * a.step + a.offset + tap * a.dilation, size = a.in_size * p.upsample;
    const int64_t low = at >= 0 ? 0 : ceil_div(-at, a.step);
    const int64_t high = at >= size ? 0 : (size - 1 - at) / a.step + 1;
    return {at, min64(low, length), max64(min64(low, length), min64(high, length))};
}

struct Gather {
    const int8_t** pointers;
    float* scales;   // per_pixel only
    int32_t* zeros;  // per_pixel only
    const int8_t* border;

    // One row of scratch: its image row, or null if that lies outside.
    void row(const ConvParams& p, const Plan& plan, const Strip& s, const int8_t* image_row, int64_t pixel_row,
             int64_t position) const {
        const Axis& a = p.columns;
        const int shift = p.upsample == 2;
        each_part(a, plan.columns, plan.column_parts, [&](int64_t start, int64_t length, int64_t tap) {
            Reach reach = reach_of(p, a, s.column, tap, length);
            if (image_row == nullptr) reach.low = reach.high = length;
            const int8_t** to = pointers + position + start;
            for (int64_t i = 0; i < reach.low; ++i) to[i] = border;
            for (int64_t i = reach.high; i < length; ++i) to[i] = border;
            if (shift) {
                for (int64_t i = reach.low; i < reach.high; ++i)
                    to[i] = image_row + ((reach.at + i * a.step) >> 1) * a.in_stride;
            } else {
                for (int64_t i = reach.low; i < reach.high; ++i)
                    to[i] = image_row + (reach.at + i * a.step) * a.in_stride;
            }
            if (!p.per_pixel) return;
            for (int64_t i = 0; i < length; ++i) {
                const bool inside = i >= reach.low && i < reach.high;
                const int64_t pixel = pixel_row * a.in_size + ((reach.at + i * a.step) >> shift);
                scales[position + start + i] = inside ? p.input_scale[pixel] : 0.f;
                zeros[position + start + i] = inside && p.input_zero_point ? p.input_zero_point[pixel] : 0;
            }
        });
    }

    void strip(const ConvParams& p, const Plan& plan, const Strip& s) const {
        const Axis& a = p.rows;
        const int8_t* image = p.input + s.n * p.in_batch_stride + s.group * p.in_channels;
        each_part(a, plan.rows, plan.row_parts, [&](int64_t start, int64_t length, int64_t tap) {
            const Reach reach = reach_of(p, a, s.row, tap, length);
            for (int64_t i = 0; i < length; ++i) {
                const int64_t y = (reach.at + i * a.step) >> (p.upsample == 2);
                const bool inside = i >= reach.low && i < reach.high;
                row(p, plan, s, inside ? image + y * a.in_stride : nullptr, s.n * a.in_size + y,
                    (start + i) * plan.column_parts.length);
            }
        });
        for (int64_t i = plan.positions; i < plan.pitch; ++i) pointers[i] = border;
    }
};

}  // namespace
}  // namespace int8_conv2d
}  // namespace pdn
