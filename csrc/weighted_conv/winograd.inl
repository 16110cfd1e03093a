// Winograd F(4x4, 3x3): each 4x4 patch of the output costs 36 products per channel pair instead of 144. Included once
// per ISA level.
//
// The transforms use the points 0, +-a, +-b and infinity with a = 1/sqrt(2), b = sqrt(2). The rounding error is about a
// quarter of that of the usual 0, +-1, +-2 at the same number of operations: a^2, b^2 and a*b are exact. With
//   A^T = [1 p p^2 p^3] by columns,  G = [1 p p^2] / N_p by rows,  B^T = the coefficients of prod_{q != p} (x - q),
// y = A^T [(G w G^T) * (B^T d B)] A. A non-finite input value therefore spreads over its whole 6x6 patch.
//
// A work item is (group, block of tiles, block of output channels). The transformed input of a block of tiles stays in
// scratch, sized for the L2 cache, and is reused by the items of the same block that follow on the same thread.
#pragma once

#include "../core/epilogue.inl"
#include "params.h"

namespace pdn {
namespace weighted_conv {
namespace {

constexpr int kWinogradRows = kWidth == 16 ? 14 : 6;  // tiles per register block
constexpr int kWinogradVectors = 2;                   // output vectors per register block
constexpr int kWinogradPoints = 36;
constexpr int kWinogradLanes = kWinogradVectors * kWidth;
constexpr int64_t kWinogradPackStep = 16;  // input channels per packing item
constexpr int64_t kWinogradScratch = 512 * 1024;
constexpr float kRootHalf = 0.70710678118654752f, kRootTwo = 1.41421356237309505f;

struct WinogradPlan {
    int64_t tile_columns, tiles_per_image, tiles;
    int64_t block, blocks;    // tiles of the largest block, number of blocks
    int64_t columns;          // blocks of output channels
    int64_t channel_vectors;  // of the input
    int64_t v_step, m_step;   // floats between two of the 36 points in the transformed input and in the products
    int64_t column_floats;    // packed weight of one full column
    int64_t group_floats;     // packed weight of one group
};

PDN_INLINE int64_t winograd_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

PDN_INLINE WinogradPlan winograd_plan(const ConvParams& p) {
    WinogradPlan plan;
    plan.tile_columns = winograd_ceil(p.axis[2].out_size, 4);
    plan.tiles_per_image = plan.tile_columns * winograd_ceil(p.axis[1].out_size, 4);
    plan.tiles = plan.tiles_per_image * p.batch;
    plan.columns = winograd_ceil(p.out_channels, kWinogradLanes);
    plan.channel_vectors = winograd_ceil(p.in_channels, kWidth);
    const int64_t tile_bytes = kWinogradPoints * 4 * (plan.channel_vectors * kWidth + kWinogradLanes);
    int64_t most = kWinogradScratch / tile_bytes / kWinogradRows;         // in register blocks
    const int64_t spread = winograd_ceil(plan.tiles, 8 * kWinogradRows);  // leave items for several threads
    if (most > spread) most = spread;
    if (most < 1) most = 1;
    plan.blocks = winograd_ceil(plan.tiles, most * kWinogradRows);
    plan.block = plan.blocks > 0 ? winograd_ceil(plan.tiles, plan.blocks) : 0;
    // An odd number of vectors between points keeps the 36 streams of the transforms in different cache sets.
    plan.v_step = (plan.channel_vectors * plan.block | 1) * kWidth;
    plan.m_step = (plan.block * kWinogradVectors | 1) * kWidth;
    plan.column_floats = kWinogradPoints * p.in_channels * kWinogradLanes;
    plan.group_floats = kWinogradPoints * p.in_channels * winograd_ceil(p.out_channels, kWidth) * kWidth;
    return plan;
}

// Vectors of output channels in one column: the last one may hold fewer.
PDN_INLINE int winograd_column_vectors(const ConvParams& p, int64_t column) {
    const int64_t left = winograd_ceil(p.out_channels - column * kWinogradLanes, kWidth);
    return static_cast<int>(left < kWinogradVectors ? left : kWinogradVectors);
}

// ------------------------------------------------------------------------------------------------------ weight

// G u with G = [1 0 0; (1 +-a 1/2) / -1.5; (1 +-b 2) / 6; 0 0 1], for `lanes` independent filters.
PDN_INLINE void winograd_filter_1d(const double* u0, const double* u1, const double* u2, double* const r[6],
                                   int lanes) {
    const double a = 0.70710678118654752440, b = 1.41421356237309504880;
    for (int l = 0; l < lanes; ++l) {
        const double even_a = u0[l] * (-2.0 / 3) + u2[l] * (-1.0 / 3), odd_a = u1[l] * (a * -2.0 / 3);
        const double even_b = u0[l] * (1.0 / 6) + u2[l] * (1.0 / 3), odd_b = u1[l] * (b / 6);
        r[0][l] = u0[l];
        r[1][l] = even_a + odd_a;
        r[2][l] = even_a - odd_a;
        r[3][l] = even_b + odd_b;
        r[4][l] = even_b - odd_b;
        r[5][l] = u2[l];
    }
}

// The transformed weight lies as [group][column][point][input channel][lane of the column].
void winograd_pack_channel(const ConvParams& p, const WeightView& view, int64_t group, int64_t column, int64_t channel,
                           float* out, int64_t point_step) {
    const int lanes = winograd_column_vectors(p, column) * kWidth;
    const float* weight = static_cast<const float*>(view.weight) + group * view.group_stride + channel * view.in_stride;
    const float* density = static_cast<const float*>(view.density);
    double w[9][kWinogradLanes], half[18][kWinogradLanes], full[6][kWinogradLanes];
    for (int tap = 0; tap < 9; ++tap) {
        const double factor = density ? density[tap * view.tap_stride] : 1.0;
        for (int l = 0; l < lanes; ++l) {
            const int64_t o = column * kWinogradLanes + l;
            w[tap][l] = o < p.out_channels ? factor * weight[o * view.out_stride + tap * view.tap_stride] : 0.0;
        }
    }
    for (int x = 0; x < 3; ++x) {
        double* const rows[6] = {half[x], half[3 + x], half[6 + x], half[9 + x], half[12 + x], half[15 + x]};
        winograd_filter_1d(w[x], w[3 + x], w[6 + x], rows, lanes);
    }
    for (int i = 0; i < 6; ++i) {
        double* const rows[6] = {full[0], full[1], full[2], full[3], full[4], full[5]};
        winograd_filter_1d(half[3 * i], half[3 * i + 1], half[3 * i + 2], rows, lanes);
        for (int j = 0; j < 6; ++j) {
            float* to = out + (i * 6 + j) * point_step;
            for (int l = 0; l < lanes; ++l) to[l] = static_cast<float>(full[j][l]);
        }
    }
}

void winograd_pack(const ConvParams& p, const WeightView& view, void* packed, int64_t begin, int64_t end) {
    const WinogradPlan plan = winograd_plan(p);
    const int64_t steps = winograd_ceil(p.in_channels, kWinogradPackStep);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t column = item / steps % plan.columns, group = item / steps / plan.columns;
        const int64_t lanes = winograd_column_vectors(p, column) * kWidth;
        float* out = static_cast<float*>(packed) + group * plan.group_floats + column * plan.column_floats;
        const int64_t first = item % steps * kWinogradPackStep;
        for (int64_t c = first; c < p.in_channels && c < first + kWinogradPackStep; ++c) {
            winograd_pack_channel(p, view, group, column, c, out + c * lanes, p.in_channels * lanes);
        }
    }
}

// ------------------------------------------------------------------------------------------------------- input

// Rows 0, 1, 2 of B^T d, from d[0] to d[4].
PDN_INLINE void winograd_input_low(const vf d[6], vf r[3]) {
    const vf even = d[4] - 2.f * d[2], odd = d[3] - 2.f * d[1];
    r[0] = (d[0] + d[4]) - 2.5f * d[2];
    r[1] = even + kRootHalf * odd;
    r[2] = even - kRootHalf * odd;
}

// Rows 3, 4, 5, from d[1] to d[5].
PDN_INLINE void winograd_input_high(const vf d[6], vf r[3]) {
    const vf even = d[4] - 0.5f * d[2], odd = d[3] - 0.5f * d[1];
    r[0] = even + kRootTwo * odd;
    r[1] = even - kRootTwo * odd;
    r[2] = (d[1] + d[5]) - 2.5f * d[3];
}

// One tile, one vector of channels. Bit i of `rows` and bit j of `columns` tell whether position (i, j) of the patch is
// in the input; kInside: all are. Position (0, 0) is in[at], which may lie outside the tensor. kFull: all lanes are
// channels, else the first `lanes` are. Never inlined: in the loop over channels the compiler would compute all 72
// addresses up front and spill them, which costs a fifth of the time.
template <bool kInside, bool kFull>
__attribute__((noinline)) void winograd_input_tile(const float* in, int64_t at, int64_t row_step, int64_t column_step,
                                                   int rows, int columns, int lanes, float* v, int64_t v_step) {
    // In two halves that each load the patch: 18 intermediate vectors fit the registers of AVX-512, 36 would not.
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        vf t[3][6];
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) {
            vf d[6] = {}, r[3];
#pragma GCC unroll 5
            for (int i = half; i < half + 5; ++i) {
                if (kInside || ((rows >> i) & (columns >> j) & 1)) {
                    const float* from = in + (at + i * row_step + j * column_step);
                    d[i] = kFull ? load(from) : load_partial(from, lanes);
                }
            }
            if (half == 0) {
                winograd_input_low(d, r);
            } else {
                winograd_input_high(d, r);
            }
#pragma GCC unroll 3
            for (int i = 0; i < 3; ++i) t[i][j] = r[i];
        }
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
            float* to = v + (half * 3 + i) * 6 * v_step;
            vf r[6];
            winograd_input_low(t[i], r);
            winograd_input_high(t[i], r + 3);
#pragma GCC unroll 6
            for (int j = 0; j < 6; ++j) store(to + j * v_step, r[j]);
        }
    }
}

template <bool kInside>
void winograd_input_channels(const float* in, int64_t at, int64_t row_step, int64_t column_step, int rows, int columns,
                             int64_t channels, float* v, int64_t v_step, int64_t vector_step) {
    int64_t c = 0;
    for (; c + kWidth <= channels; c += kWidth, v += vector_step) {
        winograd_input_tile<kInside, true>(in, at + c, row_step, column_step, rows, columns, kWidth, v, v_step);
    }
    if (c < channels) {
        const int lanes = static_cast<int>(channels - c);
        winograd_input_tile<kInside, false>(in, at + c, row_step, column_step, rows, columns, lanes, v, v_step);
    }
}

// Bit i: first + i lies in [0, size).
PDN_INLINE int winograd_inside(int64_t first, int64_t size) {
    int bits = 0;
    for (int i = 0; i < 6; ++i) bits |= (first + i >= 0 && first + i < size) << i;
    return bits;
}

// Tiles [first, first + count) of one group into v: [point][channel vector][tile][lane].
void winograd_input(const ConvParams& p, const WinogradPlan& plan, int64_t group, int64_t first, int64_t count,
                    float* v) {
    const Axis &y = p.axis[1], &x = p.axis[2];
    const float* input = static_cast<const float*>(p.input) + group * p.in_channels;
    for (int64_t t = 0; t < count; ++t) {
        const int64_t image = (first + t) / plan.tiles_per_image, tile = (first + t) % plan.tiles_per_image;
        const int64_t row = tile / plan.tile_columns * 4 + y.offset, column = tile % plan.tile_columns * 4 + x.offset;
        const int64_t at = image * p.in_batch_stride + row * y.in_stride + column * x.in_stride;
        const int rows = winograd_inside(row, y.in_size), columns = winograd_inside(column, x.in_size);
        float* to = v + t * kWidth;
        const auto body = (rows & columns) == 63 ? winograd_input_channels<true> : winograd_input_channels<false>;
        body(input, at, y.in_stride, x.in_stride, rows, columns, p.in_channels, to, plan.v_step, plan.block * kWidth);
    }
}

// ---------------------------------------------------------------------------------------------------- products

template <int kRows, int kVectors>
PDN_INLINE void winograd_rank1(vf acc[kRows][kVectors], const float* v, const float* u) {
    vf right[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) right[n] = load(u + n * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
        const vf left = splat(v[r * kWidth]);
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) acc[r][n] += left * right[n];
    }
}

// Pixels to bring into the L2 cache on the side. Spread evenly over the products, fetches cost next to nothing; bursts
// would fill the core's miss buffers and stall it.
struct WinogradFetch {
    const char* const* pixels;
    int64_t count;
};

// m[r][n] = sum over channels c of v[c / width][r][c % width] * u[c][n].
template <int kRows, int kVectors>
void winograd_product(const float* v, int64_t vector_step, const float* u, int64_t channels, float* m,
                      WinogradFetch fetch) {
    vf acc[kRows][kVectors] = {};
    int64_t c = channels;
    for (; c >= kWidth; c -= kWidth, v += vector_step) {
        const int64_t done = channels - c;
        if (done % 16 == 0) {
            for (int64_t i = 0; i < fetch.count; ++i) __builtin_prefetch(fetch.pixels[i] + done * 4, 0, 2);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kWidth; ++i) {
            winograd_rank1<kRows, kVectors>(acc, v + i, u);
            u += kVectors * kWidth;
        }
    }
    for (; c > 0; --c, ++v, u += kVectors * kWidth) winograd_rank1<kRows, kVectors>(acc, v, u);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) store(m + (r * kVectors + n) * kWidth, acc[r][n]);
    }
}

using WinogradProduct = void (*)(const float*, int64_t, const float*, int64_t, float*, WinogradFetch);

template <int kVectors>
PDN_INLINE WinogradProduct winograd_product_of(int64_t rows) {
    switch (rows) {
        case 1:
            return winograd_product<1, kVectors>;
        case 2:
            return winograd_product<2, kVectors>;
        case 3:
            return winograd_product<3, kVectors>;
        case 4:
            return winograd_product<4, kVectors>;
        case 5:
            return winograd_product<5, kVectors>;
        case 6:
            return winograd_product<6, kVectors>;
#if defined(__AVX512F__)
        case 7:
            return winograd_product<7, kVectors>;
        case 8:
            return winograd_product<8, kVectors>;
        case 9:
            return winograd_product<9, kVectors>;
        case 10:
            return winograd_product<10, kVectors>;
        case 11:
            return winograd_product<11, kVectors>;
        case 12:
            return winograd_product<12, kVectors>;
        case 13:
            return winograd_product<13, kVectors>;
#endif
        default:
            return winograd_product<kWinogradRows, kVectors>;
    }
}

constexpr int64_t kWinogradFetches = 56;  // per tile: 6 rows of 4 pixels of the input, 4 x 4 of output and residual

PDN_INLINE int64_t winograd_clamp(int64_t i, int64_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }

// The pixels that tiles [first, first + count) will read, less those shared with the left neighbour, and write. Returns
// their number.
int64_t winograd_fetch_list(const ConvParams& p, const WinogradPlan& plan, int64_t group, int64_t first, int64_t count,
                            const char** list) {
    const Axis &y = p.axis[1], &x = p.axis[2];
    const float* input = static_cast<const float*>(p.input) + group * p.in_channels;
    const float* output = static_cast<const float*>(p.output) + group * p.out_channels;
    const float* residual = static_cast<const float*>(p.residual);
    int64_t n = 0;
    for (int64_t t = first; t < first + count; ++t) {
        const int64_t image = t / plan.tiles_per_image, tile = t % plan.tiles_per_image;
        const int64_t row = tile / plan.tile_columns * 4, column = tile % plan.tile_columns * 4;
        for (int i = 0; i < 6; ++i) {
            const int64_t at = image * p.in_batch_stride + winograd_clamp(row + i + y.offset, y.in_size) * y.in_stride;
            for (int j = 2; j < 6; ++j) {
                const int64_t pixel = at + winograd_clamp(column + j + x.offset, x.in_size) * x.in_stride;
                list[n++] = reinterpret_cast<const char*>(input + pixel);
            }
        }
        for (int i = 0; i < 4; ++i) {
            const int64_t r = winograd_clamp(row + i, y.out_size);
            for (int j = 0; j < 4; ++j) {
                const int64_t c = winograd_clamp(column + j, x.out_size);
                const int64_t to = image * p.out_batch_stride + r * y.out_stride + c * x.out_stride;
                list[n++] = reinterpret_cast<const char*>(output + to);
                if (!residual) continue;
                const int64_t from = image * p.residual_batch_stride + r * y.residual_stride + c * x.residual_stride;
                list[n++] = reinterpret_cast<const char*>(residual + group * p.out_channels + from);
            }
        }
    }
    return n;
}

// The 36 matrix products of one block of tiles with one column: m[point][tile][lane].
void winograd_products(const ConvParams& p, const WinogradPlan& plan, const float* v, const float* u, int vectors,
                       int64_t count, float* m, WinogradFetch fetch) {
    const int64_t total = fetch.count;
    int64_t calls = 0;
    const int64_t groups = winograd_ceil(count, kWinogradRows), lanes = vectors * kWidth;
    for (int point = 0; point < kWinogradPoints; ++point) {
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t t = g * count / groups, rows = (g + 1) * count / groups - t;
            const WinogradProduct product = vectors == 1 ? winograd_product_of<1>(rows) : winograd_product_of<2>(rows);
            const int64_t from = total * calls / (kWinogradPoints * groups);
            const int64_t to = total * ++calls / (kWinogradPoints * groups);
            const WinogradFetch share = {fetch.pixels + from, to - from};
            product(v + t * kWidth, plan.block * kWidth, u, p.in_channels, m + t * lanes, share);
        }
        v += plan.v_step;
        u += p.in_channels * lanes;
        m += plan.m_step;
    }
}

// ------------------------------------------------------------------------------------------------------ output

// A^T m.
PDN_INLINE void winograd_output_1d(const vf m[6], vf y[4]) {
    const vf even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + (even_a + even_b);
    y[1] = kRootHalf * odd_a + kRootTwo * odd_b;
    y[2] = 0.5f * even_a + 2.f * even_b;
    y[3] = (0.5f * kRootHalf) * odd_a + ((2.f * kRootTwo) * odd_b + m[5]);
}

struct WinogradPatch {  // where one tile goes
    float* out;
    const float* residual;
    int64_t out_row, out_column, residual_row, residual_column;
    int rows, columns;  // pixels of it that exist
};

PDN_INLINE void winograd_output_pixel(const WinogradPatch& patch, int i, int j, int lanes, vf y) {
    if (patch.residual) {
        const float* from = patch.residual + i * patch.residual_row + j * patch.residual_column;
        y += lanes == kWidth ? load(from) : load_partial(from, lanes);
    }
    float* to = patch.out + i * patch.out_row + j * patch.out_column;
    if (lanes == kWidth) {
        store(to, y);
    } else {
        store_partial(to, y, lanes);
    }
}

// How a tile ends. whole: all pixels and lanes, and no activation or ReLU; leaky: the same with a leaky ReLU.
enum class WinogradEnd { whole, leaky, any };

// One tile, one vector of channels. `bound` is ReLU's 0, or -inf for no activation; leaky: the slope.
template <WinogradEnd kEnd>
void winograd_output_tile(const float* m, int64_t m_step, const WinogradPatch& patch, vf bias, float bound,
                          int activation, int lanes) {
    vf t[4][6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
        vf d[6], r[4];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) d[i] = load(m + (i * 6 + j) * m_step);
        winograd_output_1d(d, r);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) t[i][j] = r[i];
    }
    if (kEnd != WinogradEnd::any) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            vf y[4];
            winograd_output_1d(t[i], y);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const vf x = y[j] + bias, low = splat(bound);
                winograd_output_pixel(patch, i, j, kWidth,
                                      kEnd == WinogradEnd::leaky ? leaky_relu(x, bound)
                                      : x < low                  ? low
                                                                 : x);
            }
        }
    } else {
        for (int i = 0; i < patch.rows; ++i) {
            vf y[4];
            winograd_output_1d(t[i], y);
            for (int j = 0; j < patch.columns; ++j) {
                winograd_output_pixel(patch, i, j, lanes, activate(y[j] + bias, activation));
            }
        }
    }
}

void winograd_output(const ConvParams& p, const WinogradPlan& plan, const float* m, int64_t group, int64_t column,
                     int vectors, int64_t first, int64_t count) {
    const Axis &y = p.axis[1], &x = p.axis[2];
    const int activation = static_cast<int>(p.activation);
    const bool leaky = is_leaky_relu(p.activation);
    const bool simple = leaky || p.activation == Activation::none || p.activation == Activation::relu;
    const float bound = leaky ? leaky_slope(p.activation) : p.activation == Activation::relu ? 0.f : -__builtin_inff();
    const float* bias_of_group = static_cast<const float*>(p.bias);
    const float* residual = static_cast<const float*>(p.residual);
    for (int64_t t = 0; t < count; ++t) {
        const int64_t image = (first + t) / plan.tiles_per_image, tile = (first + t) % plan.tiles_per_image;
        const int64_t row = tile / plan.tile_columns * 4, col = tile % plan.tile_columns * 4;
        for (int n = 0; n < vectors; ++n) {
            const int64_t o = column * kWinogradLanes + n * kWidth, channel = group * p.out_channels + o;
            const int lanes = static_cast<int>(p.out_channels - o < kWidth ? p.out_channels - o : kWidth);
            WinogradPatch patch;
            patch.rows = static_cast<int>(y.out_size - row < 4 ? y.out_size - row : 4);
            patch.columns = static_cast<int>(x.out_size - col < 4 ? x.out_size - col : 4);
            patch.out = static_cast<float*>(p.output) + image * p.out_batch_stride + row * y.out_stride +
                        col * x.out_stride + channel;
            patch.out_row = y.out_stride;
            patch.out_column = x.out_stride;
            patch.residual = residual ? residual + image * p.residual_batch_stride + row * y.residual_stride +
                                            col * x.residual_stride + channel
                                      : nullptr;
            patch.residual_row = y.residual_stride;
            patch.residual_column = x.residual_stride;
            const vf bias = bias_of_group ? load_partial(bias_of_group + channel, lanes) : vf{};
            const float* from = m + (t * vectors + n) * kWidth;
            const bool whole = simple && lanes == kWidth && patch.rows == 4 && patch.columns == 4;
            const auto body = !whole  ? winograd_output_tile<WinogradEnd::any>
                              : leaky ? winograd_output_tile<WinogradEnd::leaky>
                                      : winograd_output_tile<WinogradEnd::whole>;
            body(from, plan.m_step, patch, bias, bound, activation, lanes);
        }
    }
}

// --------------------------------------------------------------------------------------------------- interface

const char* winograd_unsupported(const ConvParams& p) {
    if (p.dtype != DType::float32) return "winograd: only float32";
    const Axis& z = p.axis[0];
    if (z.in_size != 1 || z.out_size != 1 || z.kernel != 1 || z.taps != 1 || z.offset != 0) return "winograd: only 2-D";
    for (int i = 1; i < 3; ++i) {
        const Axis& axis = p.axis[i];
        if (axis.kernel != 3 || axis.taps != 3 || axis.tap != 0 || axis.tap_step != 1) return "winograd: only 3x3";
        if (axis.step != 1 || axis.offset_step != 1) return "winograd: only stride 1 and dilation 1";
    }
    if (p.in_channels < 16 || p.out_channels < 16) return "winograd: fewer than 16 channels in or out per group";
    return nullptr;
}

int64_t winograd_packed_bytes(const ConvParams& p) { return p.groups * winograd_plan(p).group_floats * 4; }

int64_t winograd_pack_items(const ConvParams& p) {
    return p.groups * winograd_plan(p).columns * winograd_ceil(p.in_channels, kWinogradPackStep);
}

int64_t winograd_items(const ConvParams& p) {
    const WinogradPlan plan = winograd_plan(p);
    return p.groups * plan.blocks * plan.columns;
}

int64_t winograd_scratch_bytes(const ConvParams& p) {
    const WinogradPlan plan = winograd_plan(p);
    return kWinogradPoints * (plan.v_step + plan.m_step) * 4 + plan.block * kWinogradFetches * 8;
}

void winograd_run(const ConvParams& p, int64_t begin, int64_t end, void* scratch) {
    const WinogradPlan plan = winograd_plan(p);
    float* v = static_cast<float*>(scratch);
    float* m = v + kWinogradPoints * plan.v_step;
    const char** list = reinterpret_cast<const char**>(m + kWinogradPoints * plan.m_step);
    int64_t listed = 0;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t column = item % plan.columns, block = item / plan.columns;
        const int64_t group = block / plan.blocks, b = block % plan.blocks;
        const int64_t first = b * plan.tiles / plan.blocks, count = (b + 1) * plan.tiles / plan.blocks - first;
        if (item == begin || column == 0) {
            winograd_input(p, plan, group, first, count, v);
            listed = 0;
            if (item - column + plan.columns < end) {
                const int64_t next = (block + 1) % plan.blocks, from = next * plan.tiles / plan.blocks;
                const int64_t to = (next + 1) * plan.tiles / plan.blocks;
                listed = winograd_fetch_list(p, plan, (block + 1) / plan.blocks, from, to - from, list);
            }
        }
        const int64_t share = column * listed / plan.columns;
        const WinogradFetch fetch = {list + share, (column + 1) * listed / plan.columns - share};
        const int vectors = winograd_column_vectors(p, column);
        const float* u = static_cast<const float*>(p.packed) + group * plan.group_floats + column * plan.column_floats;
        winograd_products(p, plan, v, u, vectors, count, m, fetch);
        winograd_output(p, plan, m, group, column, vectors, first, count);
    }
}

constexpr Algorithm kWinograd = {"winograd",          winograd_unsupported, winograd_packed_bytes,  winograd_pack_items,
                                 winograd_pack,       winograd_items,       winograd_scratch_bytes, winograd_run,
                                 /*approximate=*/true};

}  // namespace
}  // namespace weighted_conv
}  // namespace pdn
