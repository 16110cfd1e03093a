// The register tile that finishes its own sums: the commonest epilogue (float32 output, at most ReLU, at most a float32
// residual, full vectors) without the way through memory.
#pragma once

#include "finish.inl"
#include "tile.inl"

namespace pdn {
namespace int8_conv2d {
namespace {

bool is_fusable(const FinishTask& t, Sums sums, DType out, int width) {
    return sums == Sums::integer && out == DType::float32 && t.lanes == width &&
           (t.activation == Activation::none || t.activation == Activation::relu) &&
           (t.residual == nullptr || t.residual_dtype == DType::float32);
}

template <int M, int N>
void fused_tile(const TileTask& t, const FinishTask& f) {
    vi acc[M][N];
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) {
        const vi correction = load_lanes(f.channels->correction + j * kWidth);
#pragma GCC unroll 14
        for (int m = 0; m < M; ++m) acc[m][j] = correction;
    }
    accumulate<M, N>(acc, t.codes, t.offsets, t.weights, t.steps, t.ahead, t.ahead_step);
    vf y[M][N];
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) {
        const vf scale = load(f.channels->scale + j * kWidth), shift = load(f.channels->shift + j * kWidth);
#pragma GCC unroll 14
        for (int m = 0; m < M; ++m) y[m][j] = __builtin_convertvector(acc[m][j], vf) * scale + shift;
    }
    if (f.activation == Activation::relu) {
#pragma GCC unroll 14
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
            for (int j = 0; j < N; ++j) y[m][j] = relu(y[m][j]);
    }
    if (f.residual) {
        const float* residual = static_cast<const float*>(f.residual);
#pragma GCC unroll 14
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
            for (int j = 0; j < N; ++j) y[m][j] += load(residual + m * f.residual_stride + j * kWidth);
    }
    float* to = static_cast<float*>(f.output);
    if (f.streamed) {
#pragma GCC unroll 14
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
            for (int j = 0; j < N; ++j) store_past(to + m * f.out_stride + j * kWidth, y[m][j]);
        return;
    }
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) store(to + m * f.out_stride + j * kWidth, y[m][j]);
}

using FusedFunction = void (*)(const TileTask& t, const FinishTask& f);

// By pixels - 1 and vectors - 1.
constexpr FusedFunction kFusedTiles[][kBlock] = {
    {fused_tile<1, 1>, fused_tile<1, 2>},   {fused_tile<2, 1>, fused_tile<2, 2>},
    {fused_tile<3, 1>, fused_tile<3, 2>},   {fused_tile<4, 1>, fused_tile<4, 2>},
    {fused_tile<5, 1>, fused_tile<5, 2>},   {fused_tile<6, 1>, fused_tile<6, 2>},
#if defined(__AVX512F__)
    {fused_tile<7, 1>, fused_tile<7, 2>},   {fused_tile<8, 1>, fused_tile<8, 2>},
    {fused_tile<9, 1>, fused_tile<9, 2>},   {fused_tile<10, 1>, fused_tile<10, 2>},
    {fused_tile<11, 1>, fused_tile<11, 2>}, {fused_tile<12, 1>, fused_tile<12, 2>},
    {fused_tile<13, 1>, fused_tile<13, 2>}, {fused_tile<14, 1>, fused_tile<14, 2>},
#endif
};
static_assert(sizeof kFusedTiles / sizeof kFusedTiles[0] == kTile);

}  // namespace
}  // namespace int8_conv2d
}  // namespace pdn
