// The register tile: M adjoining positions of scratch times N vectors of output channels stay in registers while all
// taps and channels stream through them.
#pragma once

#include "plan.inl"

namespace pdn {
namespace int8_conv2d {
namespace {

struct TileTask {
    const char* codes;       // of the tile's first position at tap 0, step 0
    const int32_t* offsets;  // [taps * steps]: bytes from there
    const char* weights;     // [taps * steps][N * kWidth][4 bytes]
    int64_t steps;           // of all taps, or of one tap where taps are rescaled one by one
    const char* ahead;       // weights that will be needed next, to be fetched into L2 on the way
    int64_t ahead_step;      // bytes per step
    // Rescaling per pixel only:
    int64_t taps;
    const float* scales;  // of the tile's first position at tap 0
    const int32_t* zeros;
    const int32_t* weight_sums;  // [taps][N * kWidth]
};

template <int M, int N>
PDN_INLINE void accumulate(vi (&acc)[M][N], const char* codes, const int32_t* offsets, const char* weights,
                           int64_t steps, const char* ahead, int64_t ahead_step) {
    for (int64_t s = 0; s < steps; ++s) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += ahead_step;
        const char* x = codes + offsets[s];
        vi w[N];
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) w[j] = load_lanes(weights + j * kWidth * 4);
#pragma GCC unroll 14
        for (int m = 0; m < M; ++m) {
            const vi a = operand(x + m * 4);
#pragma GCC unroll 2
            for (int j = 0; j < N; ++j) acc[m][j] = dot(acc[m][j], a, w[j]);
        }
        weights += N * kWidth * 4;
    }
}

// sums [M][N * kWidth]: sum of weight * stored code.
template <int M, int N>
void integer_tile(const TileTask& t, void* sums) {
    vi acc[M][N];
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) acc[m][j] = vi{};
    accumulate<M, N>(acc, t.codes, t.offsets, t.weights, t.steps, t.ahead, t.ahead_step);
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) store_lanes(static_cast<int32_t*>(sums) + (m * N + j) * kWidth, acc[m][j]);
}

// sums [M][N * kWidth]: sum over taps of the pixel's scale times sum of weight * (code - the pixel's zero point), in
// float32.
template <int M, int N>
void scaled_tile(const TileTask& t, void* sums) {
    vf total[M][N];
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) total[m][j] = vf{};
    for (int64_t tap = 0; tap < t.taps; ++tap) {
        vi acc[M][N];
        const int32_t position = t.offsets[tap * t.steps] / 4;
        const int32_t* weight_sums = t.weight_sums + tap * N * kWidth;
#pragma GCC unroll 14
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
            for (int j = 0; j < N; ++j)
                acc[m][j] = load_lanes(weight_sums + j * kWidth) * splat_lanes(-(kOffset + t.zeros[position + m]));
        accumulate<M, N>(acc, t.codes, t.offsets + tap * t.steps, t.weights + tap * t.steps * N * kWidth * 4, t.steps,
                         t.ahead + tap * t.steps * t.ahead_step, t.ahead_step);
#pragma GCC unroll 14
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
            for (int j = 0; j < N; ++j)
                total[m][j] += __builtin_convertvector(acc[m][j], vf) * splat(t.scales[position + m]);
    }
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) store(static_cast<float*>(sums) + (m * N + j) * kWidth, total[m][j]);
}

using TileFunction = void (*)(const TileTask& t, void* sums);

// By pixels - 1 and vectors - 1.
constexpr TileFunction kIntegerTiles[][kBlock] = {
    {integer_tile<1, 1>, integer_tile<1, 2>},   {integer_tile<2, 1>, integer_tile<2, 2>},
    {integer_tile<3, 1>, integer_tile<3, 2>},   {integer_tile<4, 1>, integer_tile<4, 2>},
    {integer_tile<5, 1>, integer_tile<5, 2>},   {integer_tile<6, 1>, integer_tile<6, 2>},
#if defined(__AVX512F__)
    {integer_tile<7, 1>, integer_tile<7, 2>},   {integer_tile<8, 1>, integer_tile<8, 2>},
    {integer_tile<9, 1>, integer_tile<9, 2>},   {integer_tile<10, 1>, integer_tile<10, 2>},
    {integer_tile<11, 1>, integer_tile<11, 2>}, {integer_tile<12, 1>, integer_tile<12, 2>},
    {integer_tile<13, 1>, integer_tile<13, 2>}, {integer_tile<14, 1>, integer_tile<14, 2>},
#endif
};
static_assert(sizeof kIntegerTiles / sizeof kIntegerTiles[0] == kTile);

// Half as many pixels: the sums of floats need registers too.
constexpr int kScaledTile = kTile / 2;
constexpr TileFunction kScaledTiles[][kBlock] = {
    {scaled_tile<1, 1>, scaled_tile<1, 2>}, {scaled_tile<2, 1>, scaled_tile<2, 2>},
    {scaled_tile<3, 1>, scaled_tile<3, 2>},
#if defined(__AVX512F__)
    {scaled_tile<4, 1>, scaled_tile<4, 2>}, {scaled_tile<5, 1>, scaled_tile<5, 2>},
    {scaled_tile<6, 1>, scaled_tile<6, 2>}, {scaled_tile<7, 1>, scaled_tile<7, 2>},
#endif
};
static_assert(sizeof kScaledTiles / sizeof kScaledTiles[0] == kScaledTile);

}  // namespace
}  // namespace int8_conv2d
}  // namespace pdn
