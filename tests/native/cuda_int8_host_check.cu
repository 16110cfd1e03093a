// Runs the int8 CUDA kernels' arithmetic on the host: index maps, swizzles, fragment layouts, zero points, scales and
// epilogues, with ldmatrix and the matrix instructions emulated from the manual's tables, against a naive convolution.
// What it cannot show is what only a GPU does: barriers, asynchronous copies, shuffles and the instructions themselves.
// Prints one line per case; exits 1 if any is wrong.
//
//   nvcc -std=c++20 -O1 -gencode=arch=compute_80,code=sm_80 tests/native/cuda_int8_host_check.cu -o check && ./check
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/int8_conv2d/cuda.cu"

namespace {

using namespace pdn;

uint32_t state = 12345;
uint32_t draw() { return state = state * 1664525u + 1013904223u; }
double uniform() { return static_cast<int32_t>(draw()) / 2147483648.0; }  // in [-1, 1)

std::vector<int8_t> random_codes(int64_t n) {
    std::vector<int8_t> v(static_cast<size_t>(n));
    for (auto& x : v) x = static_cast<int8_t>(draw() >> 24);
    return v;
}

std::vector<float> random_floats(int64_t n, double low, double high) {
    std::vector<float> v(static_cast<size_t>(n));
    for (auto& x : v) x = static_cast<float>(low + (high - low) * (uniform() + 1) / 2);
    return v;
}

double act(double x, int a) {
    if (a == 1) return x < 0 ? 0 : x;
    if (a == 2) return x / (1 + std::exp(-x));
    if (a == 3) return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    if (a == 4) return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    return a >= 5 && x < 0 ? x * (a == 5 ? 0.01 : a == 6 ? 0.1 : 0.2) : x;
}

// ------------------------------------------------------------------------------------------- instructions, emulated

using Words = std::vector<std::vector<uint32_t>>;  // [lane][register]

// Four 8 x 8 matrices of 16-bit elements: lanes 8 i .. 8 i + 7 give the rows of matrix i, and lane l gets word l % 4 of
// row l / 4 of each.
void load_matrices_on_host(const int8_t* memory, const int (&offset)[32], uint32_t (&out)[32][4]) {
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) std::memcpy(&out[lane][i], memory + offset[8 * i + lane / 4] + lane % 4 * 4, 4);
}

// m16n8k32: register r of A holds row lane / 4 + 8 (r % 2), depths 4 (lane % 4) + 16 (r / 2); register r of B holds
// column lane / 4, depths 4 (lane % 4) + 16 r; D holds rows lane / 4 + 8 (i / 2), columns 2 (lane % 4) + i % 2.
void multiply_on_host(int (*d)[4], const uint32_t (*a)[4], const uint32_t (*b)[4], int first) {
    int8_t left[16][32], right[8][32];
    for (int lane = 0; lane < 32; ++lane) {
        for (int r = 0; r < 4; ++r)
            std::memcpy(&left[lane / 4 + 8 * (r % 2)][lane % 4 * 4 + 16 * (r / 2)], &a[lane][r], 4);
        for (int r = 0; r < 2; ++r) std::memcpy(&right[lane / 4][lane % 4 * 4 + 16 * r], &b[lane][first + r], 4);
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < 32; ++k) d[lane][i] += left[lane / 4 + 8 * (i / 2)][k] * right[lane % 4 * 2 + i % 2][k];
}

// ------------------------------------------------------------------------------------------------------ mma.sync tile

template <class Tile>
struct WarpOnHost {
    int sums[Tile::MT][Tile::NT][32][4] = {};
    int weights[Tile::NT][32] = {};
    float total[Tile::MT][Tile::NT][32][4] = {};

    void stage(const int8_t* memory, int warp) {
        for (int step = 0; step < Tile::BK / 32; ++step) {
            uint32_t a[Tile::MT][32][4], b[Tile::NT / 2][32][4];
            int offset[32];
            for (int i = 0; i < Tile::MT; ++i) {
                for (int lane = 0; lane < 32; ++lane) offset[lane] = Tile::a_offset(warp, lane, i, step);
                load_matrices_on_host(memory, offset, a[i]);
            }
            for (int j = 0; j < Tile::NT / 2; ++j) {
                for (int lane = 0; lane < 32; ++lane) offset[lane] = Tile::b_offset(warp, lane, j, step);
                load_matrices_on_host(memory, offset, b[j]);
            }
            for (int i = 0; i < Tile::MT; ++i)
                for (int j = 0; j < Tile::NT; ++j) multiply_on_host(sums[i][j], a[i], b[j / 2], j % 2 * 2);
            for (int j = 0; j < Tile::NT; ++j)
                for (int lane = 0; lane < 32; ++lane)
                    for (int r = 0; r < 2; ++r)
                        weights[j][lane] = dot4(b[j / 2][lane][j % 2 * 2 + r], 0x01010101u, weights[j][lane]);
        }
    }
    int weight_sum(int j, int lane, int c) const {  // after the exchange: lanes 4 q .. 4 q + 3 hold column q
        const int column = (lane & 3) * 2 + c;
        int sum = 0;
        for (int i = 0; i < 4; ++i) sum += weights[j][column * 4 + i];
        return sum;
    }
};

template <class Tile>
void run_tile_on_host(const Problem& p, const Plan& plan, int64_t block) {
    std::vector<int8_t> memory(Tile::kSharedBytes + 16, 77);
    int8_t* ring = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
    const TilePlace tile = place_of<Tile::BM, Tile::BN>(p, plan, static_cast<uint32_t>(block));
    const DepthRange depth = depth_range(plan, tile.split);
    std::vector<int8_t> padding(16, static_cast<int8_t>(p.zero_point && !p.per_pixel ? *p.zero_point : 0));
    std::vector<typename Tile::Loader> loaders(Tile::kThreads);
    for (int t = 0; t < Tile::kThreads; ++t)
        loaders[t].start(p, plan, tile, depth.begin, t % (Tile::BK / 16), t / (Tile::BK / 16), Tile::kRowStep);
    std::vector<WarpOnHost<Tile>> warps(Tile::kThreads / 32);
    const int blocks = depth.end - depth.begin, blocks_per_tap = plan.wrap / Tile::BK;
    for (int i = 0; i < blocks; ++i) {
        int8_t* stage = ring + i % Tile::kStages * Tile::kStageBytes;
        for (int t = 0; t < Tile::kThreads; ++t)
            loaders[t].next(p, plan, padding.data(), Tile::kRowStep,
                            [&](int k, bool is_weight, const int8_t* from, bool exists) {
                                int8_t* to = stage + Tile::copy_offset(t, k, is_weight);
                                if (exists)
                                    std::memcpy(to, from, 16);
                                else
                                    std::memset(to, 0, 16);
                            });
        for (int w = 0; w < Tile::kThreads / 32; ++w) {
            warps[w].stage(stage, w);
            const int next = depth.begin + i + 1;
            if (!Tile::PER_TAP || next % blocks_per_tap) continue;
            const int tap = next / blocks_per_tap - 1;
            for (int mt = 0; mt < Tile::MT; ++mt)
                for (int lane = 0; lane < 32; ++lane)
                    for (int r = 0; r < 4; ++r) {
                        const int row = tile.row + Tile::sum_row(w, lane, mt, r / 2);
                        if (row >= plan.rows) continue;
                        const PixelGrid g = pixel_grid(p, position_of(p, row), tap / p.kernel_w, tap % p.kernel_w);
                        for (int nt = 0; nt < Tile::NT; ++nt)
                            warps[w].total[mt][nt][lane][r] +=
                                scaled_sum(g, warps[w].sums[mt][nt][lane][r], warps[w].weight_sum(nt, lane, r % 2));
                    }
            std::memset(warps[w].sums, 0, sizeof warps[w].sums);
            std::memset(warps[w].weights, 0, sizeof warps[w].weights);
        }
    }
    int* sums = reinterpret_cast<int*>(ring);
    const int zero_point = p.zero_point && !p.per_pixel ? *p.zero_point : 0;
    for (int w = 0; w < Tile::kThreads / 32; ++w)
        for (int mt = 0; mt < Tile::MT; ++mt)
            for (int nt = 0; nt < Tile::NT; ++nt)
                for (int lane = 0; lane < 32; ++lane)
                    for (int r = 0; r < 4; ++r) {
                        const int row = Tile::sum_row(w, lane, mt, r / 2), acc = warps[w].sums[mt][nt][lane][r];
                        const int weight_sum = warps[w].weight_sum(nt, lane, r % 2);
                        int offset = zero_point;
                        if (p.per_pixel && tile.row + row < plan.rows)
                            offset = pixel_grid(p, position_of(p, tile.row + row), 0, 0).zero_point;
                        sums[row * Tile::kPitch + Tile::sum_column(w, lane, nt) + r % 2] =
                            Tile::PER_TAP ? bit_copy<int>(warps[w].total[mt][nt][lane][r]) : acc - offset * weight_sum;
                    }
    for (int t = 0; t < Tile::kThreads; ++t)
        finish_tile<Tile::BM, Tile::BN, Tile::kThreads>(p, plan, tile, t, sums, Tile::kPitch);
}

// --------------------------------------------------------------------------------------------------------- wgmma tile

// The byte of an operand that a descriptor names: rows of 128 bytes in groups of eight, address bits 4 to 6 combined
// with bits 7 to 9.
int8_t operand_byte(const int8_t* memory, uint64_t descriptor, int row, int depth) {
    const uint32_t start = (descriptor & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
    const uint32_t at = start + row / 8 * group + row % 8 * 128 + depth;
    if (descriptor >> 62 != 1) return 99;
    return memory[at ^ (at >> 7 & 7) << 4];
}

template <class Tile>
void run_wgmma_on_host(const Problem& p, const Plan& plan, int64_t block) {
    std::vector<int8_t> memory(Tile::kSharedBytes + 16, 77);
    int8_t* ring = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
    const TilePlace tile = place_of<Tile::BM, Tile::BN>(p, plan, static_cast<uint32_t>(block));
    const DepthRange depth = depth_range(plan, tile.split);
    std::vector<int8_t> padding(16, static_cast<int8_t>(p.zero_point && !p.per_pixel ? *p.zero_point : 0));
    std::vector<typename Tile::Loader> loaders(Tile::kThreads);
    for (int t = 0; t < Tile::kThreads; ++t)
        loaders[t].start(p, plan, tile, depth.begin, t % (Tile::BK / 16), t / (Tile::BK / 16), Tile::kRowStep);
    std::vector<int> acc(Tile::kThreads * Tile::BN / 2), weights(Tile::kThreads * Tile::kRowsB), weight_sums(Tile::BN);
    for (int i = 0; i < depth.end - depth.begin; ++i) {
        const int at = i % Tile::kStages * Tile::kStageBytes;
        for (int t = 0; t < Tile::kThreads; ++t)
            loaders[t].next(p, plan, padding.data(), Tile::kRowStep,
                            [&](int k, bool is_weight, const int8_t* from, bool exists) {
                                int8_t* to = ring + at + Tile::copy_offset(t, k, is_weight);
                                if (exists)
                                    std::memcpy(to, from, 16);
                                else
                                    std::memset(to, 0, 16);
                            });
        for (int step = 0; step < Tile::BK / 32; ++step) {
            const uint64_t b = operand_descriptor(at + Tile::b_offset(step));
            for (int t = 0; t < Tile::kThreads; ++t) {
                const uint64_t a = operand_descriptor(at + Tile::a_offset(t / 128, step));
                for (int d = 0; d < Tile::BN / 2; ++d) {
                    // m64nNk32: register 4 j + 2 h + c of lane l of warp w holds row 16 w + l / 4 + 8 h of the
                    // warpgroup's, column 8 j + 2 (l % 4) + c
                    const int row = t % 128 / 32 * 16 + t % 32 / 4 + d / 2 % 2 * 8,
                              column = d / 4 * 8 + t % 4 * 2 + d % 2;
                    for (int k = 0; k < 32; ++k)
                        acc[t * (Tile::BN / 2) + d] += operand_byte(ring, a, row, k) * operand_byte(ring, b, column, k);
                }
            }
        }
        for (int t = 0; t < Tile::kThreads; ++t)
            for (int k = 0; k < Tile::kRowsB; ++k)
                weights[t * Tile::kRowsB + k] =
                    sum_of_bytes(ring + at + Tile::copy_offset(t, k, true), weights[t * Tile::kRowsB + k]);
    }
    for (int t = 0; t < Tile::kThreads; ++t)
        for (int k = 0; k < Tile::kRowsB; ++k) weight_sums[t / 8 + k * Tile::kRowStep] += weights[t * Tile::kRowsB + k];
    int* sums = reinterpret_cast<int*>(ring);
    const int zero_point = p.zero_point && !p.per_pixel ? *p.zero_point : 0;
    for (int t = 0; t < Tile::kThreads; ++t)
        for (int d = 0; d < Tile::BN / 2; ++d) {
            const int row = Tile::sum_row(t / 32, t % 32, d / 2 % 2), column = Tile::sum_column(t % 32, d / 4) + d % 2;
            const int offset = tile.row + row < plan.rows ? row_zero_point(p, zero_point, tile.row + row) : 0;
            sums[row * Tile::kPitch + column] = acc[t * (Tile::BN / 2) + d] - offset * weight_sums[column];
        }
    for (int t = 0; t < Tile::kThreads; ++t)
        finish_tile<Tile::BM, Tile::BN, Tile::kThreads>(p, plan, tile, t, sums, Tile::kPitch);
}

// ---------------------------------------------------------------------------------------------------------- all kinds

void run_on_host(const Problem& p, const Plan& plan) {
    for (int64_t block = 0; block < plan.blocks; ++block) {
        switch (plan.kind) {
            case kLarge:
                run_tile_on_host<TileLarge>(p, plan, block);
                break;
            case kSmall:
                run_tile_on_host<TileSmall>(p, plan, block);
                break;
            case kTapLarge:
                run_tile_on_host<TileTapLarge>(p, plan, block);
                break;
            case kTapSmall:
                run_tile_on_host<TileTapSmall>(p, plan, block);
                break;
            case kWgmma64:
                run_wgmma_on_host<Wgmma64>(p, plan, block);
                break;
            case kWgmma128:
                run_wgmma_on_host<Wgmma128>(p, plan, block);
                break;
            case kWgmma160:
                run_wgmma_on_host<Wgmma160>(p, plan, block);
                break;
            case kDepthwise: {
                std::vector<uint32_t> shared(p.kernel_h * p.kernel_w * Depthwise::kChannels / 4);
                int8_t* weights = reinterpret_cast<int8_t*>(shared.data());
                const auto place = Depthwise::place_of(p, plan, static_cast<uint32_t>(block));
                for (int t = 0; t < kDirectThreads; ++t) Depthwise::stage(p, place, t, weights);
                for (int t = 0; t < kDirectThreads; ++t) Depthwise::compute(p, plan, place, t, weights);
                break;
            }
            default:
                for (int t = 0; t < kDirectThreads; ++t) Direct::compute(p, plan, block * kDirectThreads + t);
        }
    }
    if (plan.splits > 1)
        for (int64_t i = 0; i < plan.rows * divide_up(p.out_channels, 4); ++i) Reduce::compute(p, plan, i);
}

struct Case {
    const char* name;
    int kind;    // the kernel, or -1: the planner's choice
    int splits;  // 0: the planner's choice
    int batch, c_in, c_out, groups, h, w, kernel_h, kernel_w, stride, dilation, pad, upsample;
    bool zero_point, per_pixel;
    int fused;  // 0 nothing; 1 bias, residual; 2 bias, channel_bias, film, activation, residual
    int activation;
    Element out_type;
    int gap;  // bytes between pixels' channels
};

// The outputs before the cast.
std::vector<double> naive(const Problem& p) {
    const int group_in = p.in_channels / p.groups, group_out = p.out_channels / p.groups;
    std::vector<double> outputs;
    for (int n = 0; n < p.batch; ++n)
        for (int oy = 0; oy < p.out_h; ++oy)
            for (int ox = 0; ox < p.out_w; ++ox)
                for (int o = 0; o < p.out_channels; ++o) {
                    double sum = 0;
                    for (int ky = 0; ky < p.kernel_h; ++ky)
                        for (int kx = 0; kx < p.kernel_w; ++kx) {
                            int iy = oy * p.stride_h - p.top + ky * p.dilation_h;
                            int ix = ox * p.stride_w - p.left + kx * p.dilation_w;
                            if (iy < 0 || ix < 0 || iy >= p.in_h << p.upsample_shift ||
                                ix >= p.in_w << p.upsample_shift)
                                continue;
                            iy >>= p.upsample_shift, ix >>= p.upsample_shift;
                            const int64_t pixel =
                                p.per_pixel ? (static_cast<int64_t>(n) * p.in_h + iy) * p.in_w + ix : 0;
                            const int zp = p.zero_point ? p.zero_point[pixel] : 0;
                            int64_t tap = 0;
                            for (int c = 0; c < group_in; ++c)
                                tap += (p.input[n * p.in_stride_n + iy * p.in_stride_h + ix * p.in_stride_w +
                                                o / group_out * group_in + c] -
                                        zp) *
                                       p.weight[((static_cast<int64_t>(o) * p.kernel_h + ky) * p.kernel_w + kx) *
                                                    group_in +
                                                c];
                            const double scale = p.out_type == Element::int32 ? 1 : p.input_scale[pixel];
                            sum += scale * static_cast<double>(tap);
                        }
                    const int64_t at = static_cast<int64_t>(outputs.size());
                    if (p.out_type != Element::int32) {
                        const int64_t image = static_cast<int64_t>(n) * p.out_channels;
                        double y = sum * p.weight_scale[o] + (p.bias ? p.bias[o] : 0) +
                                   (p.channel_bias ? p.channel_bias[image + o] : 0);
                        if (p.film) y = y * (1 + p.film[2 * image + o]) + p.film[2 * image + p.out_channels + o];
                        y = act(y, p.activation);
                        if (p.residual) y += load_element(p.residual, p.residual_type, at);
                        sum = y;
                    }
                    outputs.push_back(sum);
                }
    return outputs;
}

bool run_case(const Case& c) {
    Problem p{};
    const int up = c.upsample ? 1 : 0;
    p.batch = c.batch, p.in_h = c.h, p.in_w = c.w, p.in_channels = c.c_in, p.out_channels = c.c_out,
    p.groups = c.groups;
    p.kernel_h = c.kernel_h, p.kernel_w = c.kernel_w, p.stride_h = p.stride_w = c.stride;
    p.dilation_h = p.dilation_w = c.dilation, p.top = p.left = c.pad, p.upsample_shift = up;
    p.out_h = ((c.h << up) + 2 * c.pad - c.dilation * (c.kernel_h - 1) - 1) / c.stride + 1;
    p.out_w = ((c.w << up) + 2 * c.pad - c.dilation * (c.kernel_w - 1) - 1) / c.stride + 1;
    p.in_stride_w = c.c_in + c.gap, p.in_stride_h = p.in_stride_w * c.w, p.in_stride_n = p.in_stride_h * c.h;
    p.activation = c.activation, p.per_pixel = c.per_pixel, p.out_type = c.out_type;
    const int64_t pixels = c.per_pixel ? static_cast<int64_t>(c.batch) * c.h * c.w : 1;
    const int64_t outputs = static_cast<int64_t>(c.batch) * p.out_h * p.out_w * c.c_out;
    const int taps = c.kernel_h * c.kernel_w;
    struct alignas(16) Chunk {
        int8_t v[16];
    };
    auto x = random_codes(p.in_stride_n * c.batch),
         w = random_codes(static_cast<int64_t>(c.c_out) * c.c_in / c.groups * taps);
    std::vector<Chunk> x_memory(x.size() / 16 + 1), w_memory(w.size() / 16 + 1), y_memory(outputs / 4 + 1);
    std::memcpy(x_memory.data(), x.data(), x.size()), std::memcpy(w_memory.data(), w.data(), w.size());
    std::memset(y_memory.data(), 0x5a, y_memory.size() * 16);
    const auto scales = random_floats(pixels, 0.01, 0.1), weight_scales = random_floats(c.c_out, 1e-3, 1e-2);
    std::vector<int32_t> zero_points(pixels);
    for (auto& z : zero_points) z = static_cast<int8_t>(draw() >> 24);
    const auto bias = random_floats(c.c_out, -1, 1), channel_bias = random_floats(c.batch * c.c_out, -1, 1);
    const auto film = random_floats(2 * c.batch * c.c_out, -0.5, 0.5), residual = random_floats(outputs, -1, 1);
    std::vector<BFloat16> residual16(outputs);
    for (int64_t i = 0; i < outputs; ++i) from_float(residual[i], residual16[i]);
    const float out_scale = 0.07f;
    const int32_t out_zero_point = -11;
    p.input = x_memory[0].v, p.weight = w_memory[0].v, p.output = y_memory.data();
    p.input_scale = scales.data(), p.weight_scale = weight_scales.data();
    p.zero_point = c.zero_point ? zero_points.data() : nullptr;
    if (c.fused >= 1) p.bias = bias.data(), p.residual = residual.data(), p.residual_type = Element::float32;
    if (c.fused >= 2) {
        p.channel_bias = channel_bias.data(), p.film = film.data();
        p.residual = residual16.data(), p.residual_type = Element::bfloat16;
    }
    p.out_scale = &out_scale, p.out_zero_point = c.fused >= 2 ? &out_zero_point : nullptr;

    const Device device{108, c.kind == kWgmma64 || c.kind == kWgmma128 || c.kind == kWgmma160};
    Plan plan;
    if (const char* why = make_plan(p, device, plan)) return std::printf("%s: %s WRONG\n", c.name, why), false;
    if (c.kind >= 0) {
        for (const Candidate& candidate : kHopper)
            if (candidate.kind == c.kind) cut(p, device, candidate, plan);
        for (const auto& candidates : {kPlain, kPerTap})
            for (int i = 0; i < 2; ++i)
                if (candidates[i].kind == c.kind) cut(p, device, candidates[i], plan);
        if (plan.kind != c.kind) return std::printf("%s: planned as %d WRONG\n", c.name, plan.kind), false;
    }
    if (c.splits > 0 && plan.wrap > 0) {
        plan.blocks = plan.blocks / plan.splits * c.splits, plan.splits = c.splits;
        const int64_t unit = plan.per_tap ? plan.wrap / 64 : 1;
        plan.blocks_per_split = static_cast<int>(divide_up(plan.depth_blocks / unit, c.splits) * unit);
    }
    std::vector<float> workspace(static_cast<size_t>(plan.splits * outputs), NAN);
    p.workspace = workspace.data();
    run_on_host(p, plan);

    const std::vector<double> expected = naive(p);
    double worst = 0, largest = 1e-30;
    for (double y : expected) largest = std::fmax(largest, std::fabs(y));
    for (int64_t i = 0; i < outputs; ++i) {
        const double y = expected[i];
        double error;
        if (c.out_type == Element::int32) {
            error = std::fabs(y - reinterpret_cast<const int32_t*>(p.output)[i]);
        } else if (c.out_type == Element::int8) {  // a tie may fall to either side
            const double steps = y / out_scale, low = p.out_zero_point ? -128 : -127;
            const double code =
                std::fmin(std::fmax(std::rint(steps) + (p.out_zero_point ? out_zero_point : 0), low), 127);
            const double off = std::fabs(code - reinterpret_cast<const int8_t*>(p.output)[i]);
            const bool tie = std::fabs(std::fabs(steps - std::floor(steps)) - 0.5) < 1e-3;
            error = off <= (tie ? 1 : 0) ? 0 : off;
        } else {
            // of the largest output, besides the cast
            const double rounding = c.out_type == Element::float32 ? 0 : c.out_type == Element::bfloat16 ? 4e-3 : 5e-4;
            error = std::fabs(y - load_element(p.output, c.out_type, i)) - rounding * std::fabs(y);
            error = std::isnan(error) ? error : std::fmax(0, error) / largest;
        }
        worst = std::isnan(error) ? INFINITY : std::fmax(worst, error);
    }
    const bool exact = c.out_type == Element::int32 || c.out_type == Element::int8;
    const bool good = worst <= (exact ? 0 : plan.per_tap ? 4e-6 : 1e-6);
    std::printf("%-28s kernel %d, %2d splits, %4d blocks: error %.1e %s\n", c.name, plan.kind, plan.splits,
                static_cast<int>(plan.blocks), worst, good ? "" : "WRONG");
    return good;
}

constexpr Element F32 = Element::float32, BF16 = Element::bfloat16, F16 = Element::float16, I8 = Element::int8,
                  I32 = Element::int32;
// clang-format off
const Case kCases[] = {
    // name, kernel, splits, batch, c_in, c_out, groups, h, w, kh, kw, stride, dilation, pad, upsample, zp, per pixel, fused, act, out, gap
    {"plain", kSmall, 1, 1, 64, 64, 1, 9, 8, 3, 3, 1, 1, 1, 0, false, false, 0, 0, I32, 0},
    {"zero point, padding", kSmall, 1, 2, 32, 72, 1, 7, 9, 3, 3, 1, 1, 1, 0, true, false, 0, 0, I32, 0},
    {"large tile", kLarge, 1, 2, 48, 136, 1, 12, 7, 3, 3, 1, 1, 1, 0, true, false, 0, 0, I32, 0},
    {"large tile, split", kLarge, 3, 1, 80, 128, 1, 8, 8, 3, 3, 1, 1, 1, 0, true, false, 1, 1, F32, 0},
    {"16 channels", kSmall, 1, 1, 16, 20, 1, 9, 9, 3, 3, 1, 1, 1, 0, true, false, 2, 2, BF16, 0},
    {"stride 2", kSmall, 1, 1, 32, 64, 1, 9, 11, 3, 3, 2, 1, 1, 0, true, false, 1, 3, F16, 0},
    {"leaky relu", kSmall, 1, 1, 32, 64, 1, 9, 11, 3, 3, 1, 1, 1, 0, true, false, 1, 5, F32, 0},
    {"dilated far", kSmall, 1, 1, 16, 32, 1, 5, 4, 3, 3, 1, 6, 6, 0, true, false, 0, 0, I32, 0},
    {"5x3, strided pixels", kSmall, 1, 1, 32, 32, 1, 8, 8, 5, 3, 1, 1, 2, 0, true, false, 1, 4, F32, 32},
    {"enlarged", kSmall, 1, 1, 32, 48, 1, 5, 6, 3, 3, 1, 1, 1, 1, true, false, 2, 2, I8, 0},
    {"enlarged, stride 2", kLarge, 1, 1, 32, 48, 1, 5, 6, 3, 3, 2, 1, 1, 1, true, false, 1, 0, I8, 0},
    {"groups of 32", kSmall, 1, 2, 96, 60, 3, 6, 5, 3, 3, 1, 1, 1, 0, true, false, 2, 2, F32, 0},
    {"odd channels out", kSmall, 2, 1, 64, 37, 1, 6, 6, 3, 3, 1, 1, 1, 0, true, false, 2, 2, F32, 0},
    {"split", kSmall, 5, 1, 160, 64, 1, 4, 4, 3, 3, 1, 1, 1, 0, true, false, 0, 0, I32, 0},
    {"planned, few tiles", -1, 0, 1, 640, 64, 1, 4, 4, 3, 3, 1, 1, 1, 0, true, false, 2, 2, F32, 0},
    {"pointwise", kSmall, 1, 1, 96, 64, 1, 1, 70, 1, 1, 1, 1, 0, 0, true, false, 1, 2, F32, 0},
    {"tokens, a scale each", kSmall, 1, 1, 96, 64, 1, 1, 70, 1, 1, 1, 1, 0, 0, true, true, 1, 2, F32, 0},
    {"tokens, split", kLarge, 2, 1, 144, 64, 1, 1, 150, 1, 1, 1, 1, 0, 0, true, true, 1, 0, F32, 0},
    {"pointwise per pixel, padded", kSmall, 1, 2, 32, 32, 1, 4, 5, 1, 1, 2, 1, 1, 1, true, true, 1, 0, F32, 0},
    {"per pixel", kTapSmall, 1, 2, 80, 64, 1, 6, 7, 3, 3, 1, 1, 1, 0, true, true, 2, 2, F32, 0},
    {"per pixel, large", kTapLarge, 1, 2, 64, 72, 1, 9, 10, 3, 3, 1, 1, 1, 0, true, true, 1, 0, BF16, 0},
    {"per pixel, symmetric, split", kTapSmall, 5, 1, 144, 32, 1, 6, 6, 3, 3, 2, 1, 1, 1, false, true, 1, 0, F32, 0},
    {"per pixel, groups", kTapSmall, 1, 1, 64, 64, 2, 6, 6, 3, 3, 1, 1, 1, 0, true, true, 0, 0, F32, 0},
    {"wgmma 64", kWgmma64, 1, 2, 64, 64, 1, 9, 8, 3, 3, 1, 1, 1, 0, true, false, 0, 0, I32, 0},
    {"wgmma 128, channels left over", kWgmma128, 1, 1, 48, 132, 1, 12, 7, 3, 3, 2, 1, 1, 1, true, false, 2, 2, F32, 0},
    {"wgmma 160, split", kWgmma160, 3, 1, 80, 320, 1, 8, 8, 3, 3, 1, 1, 1, 0, true, false, 1, 1, F32, 0},
    {"wgmma 160, a scale per token", kWgmma160, 1, 1, 96, 100, 1, 1, 150, 1, 1, 1, 1, 0, 0, true, true, 1, 2, BF16, 0},
    {"wgmma 64, groups", kWgmma64, 1, 1, 96, 60, 3, 6, 5, 3, 3, 1, 1, 1, 0, false, false, 2, 2, I8, 0},
    {"direct, 3 channels", kDirect, 1, 2, 3, 40, 1, 7, 9, 3, 3, 1, 1, 1, 0, true, false, 2, 1, F32, 0},
    {"direct, words", kDirect, 1, 1, 12, 21, 1, 7, 9, 3, 3, 2, 1, 1, 1, true, false, 0, 0, I32, 0},
    {"direct, groups", kDirect, 1, 1, 15, 30, 3, 7, 6, 3, 3, 1, 2, 2, 0, true, false, 1, 0, I8, 0},
    {"direct, per pixel", kDirect, 1, 1, 20, 8, 1, 5, 6, 3, 3, 1, 1, 1, 0, true, true, 1, 2, F32, 0},
    {"depthwise", kDepthwise, 1, 2, 72, 72, 72, 7, 9, 3, 3, 1, 1, 1, 0, true, false, 2, 2, F32, 0},
    {"depthwise, odd", kDepthwise, 1, 1, 35, 35, 35, 6, 70, 5, 5, 2, 1, 2, 0, true, false, 0, 0, I32, 0},
    {"depthwise, multiplier", kDepthwise, 1, 1, 6, 18, 6, 6, 5, 3, 3, 1, 1, 1, 1, true, false, 1, 0, I8, 0},
    {"depthwise, per pixel", kDepthwise, 1, 1, 16, 16, 16, 6, 5, 7, 7, 1, 1, 3, 0, true, true, 1, 0, F32, 0},
    {"gray first layer", kDepthwise, 1, 1, 1, 64, 1, 6, 5, 3, 3, 1, 1, 1, 0, true, false, 1, 1, I8, 0},
};
// clang-format on

}  // namespace

int main() {
    bool good = true;
    for (const Case& c : kCases) good = run_case(c) && good;
    return good ? 0 : 1;
}
