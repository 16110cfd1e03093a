// Stand-alone check and timing of csrc/int8_conv2d at one ISA level, without torch:
//   g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno [ISA flags] tests/native/int8_conv2d_harness.cpp -o harness
//   ./harness                                 all cases against a plain loop; exit 1 on a failure
//   ./harness time [THREADS]                  int8 layers of U-Nets: operations per second, fraction of the peak
//   ./harness time THREADS IN OUT HEIGHT WIDTH KERNEL BATCH
//   ./harness cold ...                        the same with other weights every time, more than caches hold
// With -mavx2 -mfma -mf16c -mavxvnni -DPDN_EVEX_VNNI the kernels of AVX-VNNI run on AVX-512 processors without it.
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/int8_conv2d/dense.inl"
#include "../../csrc/int8_conv2d/depthwise.inl"
#include "aligned.h"

using namespace pdn;
using namespace pdn::int8_conv2d;

namespace {

constexpr Algorithm kAlgorithms[] = {kDepthwise, kDense};

struct Side {
    int64_t size, kernel, stride = 1, padding = 0, dilation = 1, padding_after = -1;  // -1: as before
};

enum class Scale { tensor, pixel, pixel_symmetric };

constexpr int kNone = 1000;  // not a zero point: none is given
constexpr int kF32 = static_cast<int>(DType::float32), kB16 = static_cast<int>(DType::bfloat16),
              kF16 = static_cast<int>(DType::float16);

struct Options {
    DType out = DType::int32;
    int zero = 0;  // of the input
    Scale scale = Scale::tensor;
    Activation activation = Activation::none;
    bool bias = false, channel_bias = false, film = false;
    int residual = -1;  // a DType, or none
    int64_t upsample = 1, gap = 0;
    int out_zero = kNone;
    int threads = 2;
    bool extreme = false;  // all codes and weights are -128
};

struct Size {
    int64_t batch, groups, in_channels, out_channels;  // channels per group
};

struct Case {
    const char* why;
    Size size;
    Side rows, columns;
    Options with;
};

const Case kCases[] = {
    {"all tiles full", {1, 1, 64, 64}, {16, 3, 1, 1}, {28, 3, 1, 1}, {.zero = -7}},
    {"no zero point", {1, 1, 64, 32}, {5, 3, 1, 1}, {9, 3, 1, 1}, {.zero = kNone}},
    {"weights and codes of -128", {1, 1, 96, 33}, {4, 3, 1, 1}, {4, 3, 1, 1}, {.zero = 127, .extreme = true}},
    {"channels in the tail of a step", {2, 1, 37, 41}, {7, 3, 1, 1}, {31, 3, 1, 1}, {.zero = 100}},
    {"one channel in, one out", {1, 1, 1, 1}, {6, 3, 1, 1}, {5, 3, 1, 1}, {.zero = -128}},
    {"three channels in", {1, 1, 3, 40}, {12, 3, 1, 1}, {13, 3, 1, 1}, {.zero = 5}},
    {"channels just over a chunk of the copy", {1, 1, 65, 17}, {5, 3, 1, 1}, {17, 3, 1, 1}, {.zero = 3}},
    {"one vector in the last block", {2, 1, 16, 48}, {3, 3, 1, 1}, {15, 3, 1, 1}, {.zero = 3, .gap = 3}},
    {"stride 2", {1, 1, 20, 24}, {17, 3, 2, 1}, {23, 3, 2, 1}, {.zero = 9}},
    {"stride 2, even kernel", {1, 1, 8, 24}, {16, 4, 2, 1}, {22, 4, 2, 1}, {.zero = -9}},
    {"stride 3 and 2, dilation 2 and 3", {2, 1, 12, 16}, {29, 3, 3, 2, 2}, {33, 3, 2, 4, 3}, {.zero = 9}},
    {"stride larger than the kernel", {1, 1, 12, 16}, {29, 2, 5, 0}, {33, 1, 3, 0}, {.zero = 1}},
    {"dilation larger than the image", {1, 1, 16, 16}, {5, 3, 1, 8, 8}, {6, 3, 1, 9, 9}, {.zero = 11}},
    {"more padding than image", {1, 1, 8, 16}, {3, 3, 1, 6}, {2, 3, 1, 7}, {.zero = 11}},
    {"padding on one side", {1, 1, 8, 16}, {9, 3, 2, 0, 1, 1}, {8, 3, 2, 0, 1, 1}, {.zero = 11}},
    {"upsampled", {2, 1, 24, 32}, {7, 3, 1, 1}, {9, 3, 1, 1}, {.zero = 11, .upsample = 2}},
    {"upsampled, stride 2, dilation 2",
     {1, 1, 24, 32},
     {7, 3, 2, 1, 2},
     {9, 3, 2, 3, 2},
     {.zero = 11, .upsample = 2, .gap = 5}},
    {"groups", {2, 3, 20, 24}, {7, 3, 1, 1}, {10, 3, 1, 1}, {.zero = 2, .gap = 1}},
    {"small groups", {1, 8, 4, 4}, {7, 3, 1, 1}, {10, 3, 1, 1}, {.zero = 2}},
    {"depthwise", {2, 37, 1, 1}, {7, 3, 1, 1}, {10, 3, 1, 1}, {.zero = 2, .gap = 3}},
    {"depthwise, two outputs per channel", {1, 9, 1, 2}, {7, 3, 1, 1}, {10, 3, 1, 1}, {.zero = 2}},
    {"single pixel", {3, 1, 16, 16}, {1, 3, 1, 1}, {1, 3, 1, 1}, {.zero = 4}},
    {"1x1 kernel", {2, 1, 70, 50}, {5, 1}, {9, 1}, {.zero = 4}},
    {"1x1 kernel, stride 2", {1, 1, 64, 50}, {5, 1, 2}, {9, 1, 2}, {.zero = 4}},
    {"tokens", {1, 1, 320, 96}, {1, 1}, {77, 1}, {.zero = 4}},
    {"more tokens than a strip", {1, 1, 1030, 33}, {1, 1}, {150, 1}, {.zero = 4}},
    {"many rows, one column", {1, 1, 32, 32}, {60, 3, 1, 1}, {1, 3, 1, 1}, {.zero = 4}},
    {"wider than a strip", {1, 1, 8, 16}, {5, 3, 1, 1}, {200, 3, 1, 1}, {.zero = 4}},
    {"large kernel", {1, 1, 5, 16}, {9, 11, 1, 5}, {12, 7, 1, 3}, {.zero = 4}},
    {"one thread", {1, 1, 32, 64}, {20, 3, 1, 1}, {21, 3, 1, 1}, {.zero = 4, .threads = 1}},
    {"many threads", {1, 1, 32, 96}, {20, 3, 1, 1}, {21, 3, 1, 1}, {.zero = 4, .threads = 16}},
    {"no images", {0, 1, 16, 16}, {8, 3, 1, 1}, {8, 3, 1, 1}, {}},
    {"float32: scale alone", {1, 1, 64, 64}, {8, 3, 1, 1}, {8, 3, 1, 1}, {.out = DType::float32, .zero = 12}},
    {"float32: relu and residual in full vectors",
     {2, 1, 24, 80},
     {6, 3, 1, 1},
     {15, 3, 1, 1},
     {.out = DType::float32, .zero = 12, .activation = Activation::relu, .bias = true, .residual = kF32, .gap = 1}},
    {"float32: past the caches", {1, 1, 4, 64}, {190, 1}, {190, 1}, {.out = DType::float32, .zero = 12}},
    {"float32: everything",
     {2, 1, 32, 40},
     {6, 3, 1, 1},
     {15, 3, 1, 1},
     {.out = DType::float32,
      .zero = 12,
      .activation = Activation::silu,
      .bias = true,
      .channel_bias = true,
      .film = true,
      .residual = kF32,
      .gap = 2}},
    {"float32: relu, bfloat16 residual",
     {2, 1, 32, 33},
     {6, 3, 1, 1},
     {15, 3, 1, 1},
     {.out = DType::float32, .zero = 12, .activation = Activation::relu, .bias = true, .residual = kB16}},
    {"bfloat16: gelu, float16 residual",
     {2, 1, 32, 33},
     {6, 3, 1, 1},
     {15, 3, 1, 1},
     {.out = DType::bfloat16,
      .zero = -12,
      .activation = Activation::gelu,
      .bias = true,
      .channel_bias = true,
      .residual = kF16,
      .gap = 1}},
    {"float16: gelu_tanh, film",
     {2, 2, 32, 20},
     {6, 3, 2, 1},
     {15, 3, 2, 1},
     {.out = DType::float16, .zero = -12, .activation = Activation::gelu_tanh, .film = true}},
    {"float16 residual in full vectors",
     {1, 1, 32, 64},
     {6, 3, 1, 1},
     {15, 3, 1, 1},
     {.out = DType::float16, .zero = -12, .bias = true, .residual = kF16}},
    {"int8, affine",
     {1, 1, 64, 70},
     {6, 3, 1, 1},
     {15, 3, 1, 1},
     {.out = DType::int8,
      .zero = -100,
      .activation = Activation::silu,
      .bias = true,
      .channel_bias = true,
      .residual = kF32,
      .out_zero = -90}},
    {"int8, symmetric",
     {1, 1, 64, 64},
     {6, 3, 1, 1},
     {15, 3, 1, 1},
     {.out = DType::int8, .zero = -100, .activation = Activation::relu, .bias = true}},
    {"int8, leaky relu",
     {1, 1, 64, 70},
     {6, 3, 1, 1},
     {15, 3, 1, 1},
     {.out = DType::int8, .zero = -100, .activation = Activation::leaky_relu_01, .bias = true, .out_zero = -90}},
    {"depthwise, float32",
     {2, 50, 1, 1},
     {7, 3, 2, 1},
     {10, 3, 2, 1},
     {.out = DType::float32,
      .zero = 2,
      .activation = Activation::silu,
      .bias = true,
      .channel_bias = true,
      .film = true,
      .residual = kF32,
      .upsample = 2}},
    {"per pixel",
     {2, 1, 40, 50},
     {9, 3, 1, 1},
     {19, 3, 1, 1},
     {.out = DType::float32,
      .scale = Scale::pixel,
      .activation = Activation::silu,
      .bias = true,
      .channel_bias = true,
      .film = true,
      .residual = kF32,
      .gap = 1}},
    {"per pixel, symmetric",
     {1, 1, 64, 32},
     {9, 3, 1, 1},
     {19, 3, 1, 1},
     {.out = DType::float32, .scale = Scale::pixel_symmetric}},
    {"per pixel, stride 2, dilation 2",
     {1, 1, 12, 16},
     {14, 3, 2, 2, 2},
     {19, 3, 2, 1, 2},
     {.out = DType::float32, .scale = Scale::pixel}},
    {"per pixel, upsampled",
     {2, 2, 12, 16},
     {5, 3, 1, 1},
     {6, 3, 1, 1},
     {.out = DType::float32, .scale = Scale::pixel, .bias = true, .upsample = 2}},
    {"per pixel, dilation larger than the image",
     {1, 1, 8, 8},
     {3, 3, 1, 5, 5},
     {4, 3, 1, 5, 5},
     {.out = DType::float32, .scale = Scale::pixel}},
    {"per token",
     {1, 1, 96, 50},
     {1, 1},
     {45, 1},
     {.out = DType::float32, .scale = Scale::pixel, .activation = Activation::gelu, .bias = true, .residual = kF32}},
    {"per token, symmetric, int8 output",
     {1, 1, 96, 50},
     {1, 1},
     {45, 1},
     {.out = DType::int8, .scale = Scale::pixel_symmetric, .bias = true, .out_zero = 7}},
    {"per pixel, depthwise",
     {2, 21, 1, 1},
     {7, 3, 1, 1},
     {10, 3, 1, 1},
     {.out = DType::float32, .scale = Scale::pixel, .bias = true, .upsample = 2}},
};

double value_of(const Values<char>& data, DType dtype, int64_t at) {
    const char* p = data.data();
    switch (dtype) {
        case DType::bfloat16:
            return from_bf16(reinterpret_cast<const bf16*>(p)[at]);
        case DType::float16:
            return from_fp16(reinterpret_cast<const fp16*>(p)[at]);
        case DType::int8:
            return reinterpret_cast<const int8_t*>(p)[at];
        case DType::int32:
            return reinterpret_cast<const int32_t*>(p)[at];
        default:
            return reinterpret_cast<const float*>(p)[at];
    }
}

struct Problem {
    ConvParams p{};
    Values<int8_t> input, weight;
    Values<float> input_scale, weight_scale, bias, channel_bias, film;
    Values<int32_t> zero;
    Values<char> residual, output, packed, scratch;
    float out_scale = 0.05f;
    int32_t out_zero = 0;
    int64_t outputs = 0;

    static Axis axis(const Side& s, int64_t upsample) {
        const int64_t after = s.padding_after < 0 ? s.padding : s.padding_after;
        const int64_t span = s.dilation * (s.kernel - 1) + 1;
        const int64_t out = std::max<int64_t>(0, (s.size * upsample + s.padding + after - span) / s.stride + 1);
        return {s.size, out, 0, 0, 0, s.stride, -s.padding, s.dilation, s.kernel};
    }

    Problem(const Case& c, const Algorithm& algorithm) {
        std::mt19937 generator(5);
        std::uniform_int_distribution<int> codes(-128, 127);
        std::normal_distribution<float> normal;
        const int64_t channels = c.size.groups * c.size.in_channels, filters = c.size.groups * c.size.out_channels;
        p.batch = c.size.batch, p.groups = c.size.groups, p.in_channels = c.size.in_channels,
        p.out_channels = c.size.out_channels;
        p.rows = axis(c.rows, c.with.upsample), p.columns = axis(c.columns, c.with.upsample);
        p.columns.in_stride = channels + c.with.gap, p.rows.in_stride = p.columns.in_stride * c.columns.size;
        p.columns.out_stride = p.columns.residual_stride = filters + c.with.gap;
        p.rows.out_stride = p.rows.residual_stride = p.columns.out_stride * p.columns.out_size;
        p.in_batch_stride = p.rows.in_stride * c.rows.size;
        p.out_batch_stride = p.residual_batch_stride = p.rows.out_stride * p.rows.out_size;
        p.upsample = c.with.upsample, p.threads = c.with.threads;
        p.activation = c.with.activation, p.out_dtype = c.with.out;
        const auto fill = [&](Values<int8_t>& to, int64_t count) {
            to.resize(static_cast<size_t>(std::max<int64_t>(count, 0)));
            for (int8_t& x : to) x = static_cast<int8_t>(c.with.extreme ? -128 : codes(generator));
        };
        const auto normals = [&](Values<float>& to, int64_t count, float scale) {
            to.resize(static_cast<size_t>(count));
            for (float& x : to) x = scale * normal(generator);
        };
        fill(input, c.size.batch * p.in_batch_stride - c.with.gap);
        fill(weight, filters * c.size.in_channels * c.rows.kernel * c.columns.kernel);
        const int64_t pixels = c.with.scale == Scale::tensor ? 1 : c.size.batch * c.rows.size * c.columns.size;
        p.per_pixel = c.with.scale != Scale::tensor;
        for (int64_t i = 0; i < pixels; ++i) {
            input_scale.push_back(0.01f + 0.03f * std::fabs(normal(generator)));
            zero.push_back(p.per_pixel ? codes(generator) : c.with.zero);
        }
        if (p.per_pixel && c.size.batch > 0) zero[0] = -128, zero[static_cast<size_t>(pixels - 1)] = 127;
        normals(weight_scale, filters, 0.f);
        for (float& x : weight_scale) x = 0.001f + 0.001f * std::fabs(normal(generator));
        normals(bias, filters, 1.f);
        normals(channel_bias, c.size.batch * filters, 1.f);
        normals(film, c.size.batch * 2 * filters, 0.5f);
        outputs = std::max<int64_t>(0, c.size.batch * p.out_batch_stride - c.with.gap);
        output.resize(static_cast<size_t>(outputs * bytes_of(c.with.out)));
        p.input = input.data(), p.output = output.data();
        if (c.with.out != DType::int32) p.input_scale = input_scale.data(), p.weight_scale = weight_scale.data();
        if (c.with.scale == Scale::pixel || (c.with.scale == Scale::tensor && c.with.zero != kNone))
            p.input_zero_point = zero.data();
        if (c.with.bias) p.bias = bias.data();
        if (c.with.channel_bias) p.channel_bias = channel_bias.data();
        if (c.with.film) p.film = film.data();
        if (c.with.residual >= 0) {
            p.residual_dtype = static_cast<DType>(c.with.residual);
            residual.resize(static_cast<size_t>(outputs * bytes_of(p.residual_dtype)));
            for (int64_t i = 0; i < outputs; ++i) {
                const float x = normal(generator);
                char* to = residual.data() + i * bytes_of(p.residual_dtype);
                if (p.residual_dtype == DType::float32) std::memcpy(to, &x, 4);
                if (p.residual_dtype == DType::bfloat16) *reinterpret_cast<bf16*>(to) = to_bf16(x);
                if (p.residual_dtype == DType::float16) *reinterpret_cast<fp16*>(to) = to_fp16(x);
            }
            p.residual = residual.data();
        }
        if (c.with.out == DType::int8) {
            p.out_scale = &out_scale;
            out_zero = c.with.out_zero == kNone ? 0 : c.with.out_zero;
            p.out_zero_point = c.with.out_zero == kNone ? nullptr : &out_zero;
        }
        packed.resize(static_cast<size_t>(algorithm.packed_bytes(p)));
        p.plan = algorithm.plan(p);
        scratch.resize(static_cast<size_t>(p.plan.scratch_bytes));
        p.packed = packed.data();
    }

    void poison() {
        std::fill(output.begin(), output.end(), 0x7f);
        std::fill(scratch.begin(), scratch.end(), 0x7f);
    }
};

double activate_exactly(double x, Activation activation) {
    switch (activation) {
        case Activation::relu:
            return x < 0 ? 0 : x;
        case Activation::silu:
            return x / (1 + std::exp(-x));
        case Activation::gelu:
            return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
        case Activation::gelu_tanh:
            return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
        default:
            return is_leaky_relu(activation) && x < 0 ? x * leaky_slope(activation) : x;
    }
}

// The value before it is cast, and what its rounding error scales with.
double expected(const Case& c, const Problem& q, int64_t n, int64_t y, int64_t x, int64_t o, double* magnitude) {
    const ConvParams& p = q.p;
    const int64_t group = o / p.out_channels, filters = p.groups * p.out_channels;
    double sum = 0, size = 0;
    for (int64_t i = 0; i < p.rows.kernel; ++i)
        for (int64_t j = 0; j < p.columns.kernel; ++j) {
            int64_t at_y = y * p.rows.step + p.rows.offset + i * p.rows.dilation;
            int64_t at_x = x * p.columns.step + p.columns.offset + j * p.columns.dilation;
            if (at_y < 0 || at_y >= p.rows.in_size * p.upsample) continue;
            if (at_x < 0 || at_x >= p.columns.in_size * p.upsample) continue;
            at_y /= p.upsample, at_x /= p.upsample;
            const size_t pixel =
                p.per_pixel ? static_cast<size_t>((n * p.rows.in_size + at_y) * p.columns.in_size + at_x) : 0;
            const int32_t zero = p.input_zero_point ? q.zero[pixel] : 0;
            const int8_t* code = q.input.data() + n * p.in_batch_stride + at_y * p.rows.in_stride +
                                 at_x * p.columns.in_stride + group * p.in_channels;
            const int8_t* w =
                q.weight.data() + o * p.in_channels * p.rows.kernel * p.columns.kernel + i * p.columns.kernel + j;
            int64_t acc = 0;
            for (int64_t ch = 0; ch < p.in_channels; ++ch)
                acc += (code[ch] - zero) * w[ch * p.rows.kernel * p.columns.kernel];
            const double scale = c.with.out == DType::int32 ? 1.0 : static_cast<double>(q.input_scale[pixel]);
            sum += scale * static_cast<double>(acc);
            size += scale * std::fabs(static_cast<double>(acc));
        }
    if (c.with.out == DType::int32) return sum;
    double value = sum * q.weight_scale[static_cast<size_t>(o)];
    size *= q.weight_scale[static_cast<size_t>(o)];
    const auto add = [&](double term) { value += term, size += std::fabs(term); };
    if (p.bias) add(p.bias[o]);
    if (p.channel_bias) add(p.channel_bias[n * filters + o]);
    if (p.film) {
        const double gain = 1.0 + p.film[n * 2 * filters + o];
        value *= gain, size *= std::fabs(gain);
        add(p.film[n * 2 * filters + filters + o]);
    }
    value = activate_exactly(value, c.with.activation);
    if (p.residual) {
        const int64_t at = n * p.residual_batch_stride + y * p.rows.residual_stride + x * p.columns.residual_stride + o;
        add(value_of(q.residual, p.residual_dtype, at));
    }
    *magnitude = size;
    return value;
}

// Largest error over its bound (<= 1 is right); infinite where the kernel left a hole or wrote what is not its own.
double error_ratio(const Case& c, const Problem& q) {
    const ConvParams& p = q.p;
    const int64_t filters = p.groups * p.out_channels, pixel = filters + c.with.gap;
    const double infinity = std::numeric_limits<double>::infinity();
    double worst = 0;
    for (int64_t at = 0; at < q.outputs; ++at) {
        const int64_t o = at % pixel, place = at / pixel, x = place % p.columns.out_size;
        const int64_t y = place / p.columns.out_size % p.rows.out_size,
                      n = place / p.columns.out_size / p.rows.out_size;
        if (o >= filters) {
            for (int64_t i = 0; i < bytes_of(c.with.out); ++i)
                if (q.output[static_cast<size_t>(at * bytes_of(c.with.out) + i)] != 0x7f) return infinity;
            continue;
        }
        const double got = value_of(q.output, c.with.out, at);
        double size = 0, error = 0;
        const double want = expected(c, q, n, y, x, o, &size);
        if (c.with.out == DType::int32) {
            error = got == want ? 0 : infinity;
        } else if (c.with.out == DType::int8) {
            const double ratio = want / q.out_scale, low = p.out_zero_point ? -128 : -127;
            const auto code = [&](double r) { return std::min(127.0, std::max(low, std::rint(r) + q.out_zero)); };
            const double slack = 1e-6 * (size / q.out_scale + 1);
            error = got >= code(ratio - slack) && got <= code(ratio + slack) ? 0 : infinity;
        } else {
            const double rounding = c.with.out == DType::float32 ? 6e-8 : c.with.out == DType::bfloat16 ? 4e-3 : 5e-4;
            error = std::fabs(got - want) / (1e-6 * size + rounding * std::fabs(want) + 1e-7);
        }
        if (!(error <= 1e30)) return infinity;
        worst = std::max(worst, error);
    }
    return worst;
}

uint64_t next_call = 1;

// Every item on its own, last first, with and without what the item before left in scratch.
bool split_changes_result(Problem& q, const Algorithm& algorithm, bool fresh) {
    const Values<char> whole = q.output;
    q.poison();
    const uint64_t call = next_call++;
    for (int64_t item = q.p.plan.items - 1; item >= 0; --item) {
        if (fresh) std::fill(q.scratch.begin(), q.scratch.end(), 0x7f);
        algorithm.run(q.p, item, item + 1, q.scratch.data(), call);
    }
    return whole != q.output;
}

bool passes(const Case& c, const Algorithm& algorithm) {
    Problem q(c, algorithm);
    if (algorithm.unsupported(q.p) != nullptr) return true;
    q.poison();
    for (int64_t item = algorithm.pack_items(q.p) - 1; item >= 0; --item)
        algorithm.pack(q.p, q.weight.data(), q.packed.data(), item, item + 1);
    if (q.outputs > 0) algorithm.run(q.p, 0, q.p.plan.items, q.scratch.data(), next_call++);
    const double ratio = error_ratio(c, q);
    const bool split = split_changes_result(q, algorithm, true) || split_changes_result(q, algorithm, false);
    const bool fine = ratio <= 1 && !split;
    std::printf("%s %-9s %s: error %.2f of its bound%s\n", fine ? "ok  " : "FAIL", algorithm.name, c.why, ratio,
                split ? ", depends on the split" : "");
    return fine;
}

int check() {
    int failures = 0;
    for (const Case& c : kCases)
        for (const Algorithm& algorithm : kAlgorithms) failures += !passes(c, algorithm);
    std::printf("width %d, %d channels per step: %d failed\n", kWidth, kChannels, failures);
    return failures != 0;
}

// ------------------------------------------------------------------------------------------------------- timing

// One thread is timed by what it computed, several by the wall: what others do on the machine then counts.
double seconds(int threads) {
    timespec now;
    clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Operations per second of dot() on one core: twelve independent chains of register operands.
double burst(int64_t rounds) {
    vi acc[12];
    vi x = splat_lanes(0x01010101);
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = vi{};
    const double start = seconds(1);
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 48
        for (int i = 0; i < 48; ++i) {
#if defined(__SSE2__)
            asm("" : "+x"(x));  // without VNNI the product is an operation of its own, which may not leave the loop
#endif
            acc[i % 12] = dot(acc[i % 12], x, x);
        }
    vi sum{};
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sum += acc[i];
    asm volatile("" : : "m"(sum));
    return 48.0 * kWidth * kChannels * 2 * static_cast<double>(rounds) / (seconds(1) - start);
}

// A pool of threads that spin, so that waking them does not count: what the kernel can do.
struct Team {
    std::vector<std::thread> threads;
    std::atomic<int> generation{0}, done{0};
    std::atomic<bool> stop{false};
    void (*body)(void*, int) = nullptr;
    void* context = nullptr;

    explicit Team(int count) {
        for (int i = 1; i < count; ++i)
            threads.emplace_back([this, i] {
                for (int seen = 0; !stop;) {
                    if (generation.load() == seen) continue;
                    ++seen;
                    body(context, i);
                    ++done;
                }
            });
    }
    ~Team() {
        stop = true;
        for (std::thread& t : threads) t.join();
    }
    template <class F>
    void run(const F& f) {
        body = [](void* c, int i) { (*static_cast<const F*>(c))(i); };
        context = const_cast<F*>(&f);
        done = 0;
        ++generation;
        f(0);
        while (done < static_cast<int>(threads.size())) {
        }
    }
};

struct Layer {
    int64_t in, out, height, width, kernel, batch;
    int64_t stride = 1;
    DType dtype = DType::float32;
    Activation activation = Activation::none;
};

void time_layer(const Layer& l, int threads, Team& team, bool cold) {
    const Side rows = {l.height, l.kernel, l.stride, l.kernel / 2},
               columns = {l.width, l.kernel, l.stride, l.kernel / 2};
    Case c = {"timing", {l.batch, 1, l.in, l.out}, rows, columns, {.out = l.dtype, .zero = 3}};
    c.with.activation = l.activation;
    c.with.bias = true;
    c.with.threads = threads;
    Problem q(c, kDense);
    kDense.pack(q.p, q.weight.data(), q.packed.data(), 0, kDense.pack_items(q.p));
    const size_t copies = cold ? (96u << 20) / q.packed.size() + 1 : 1;
    const std::vector<Values<char>> weights(copies, q.packed);
    std::vector<Values<char>> scratch(static_cast<size_t>(threads), q.scratch);
    const int64_t items = q.p.plan.items;
    std::atomic<int64_t> next{0};
    uint64_t call = 0;
    const auto share = [&](int thread) {
        for (int64_t i = next++; i < items; i = next++)
            kDense.run(q.p, i, i + 1, scratch[static_cast<size_t>(thread)].data(), call);
    };
    const double operations = 2.0 * static_cast<double>(l.batch * l.in * l.out * l.kernel * l.kernel) *
                              static_cast<double>(q.p.rows.out_size * q.p.columns.out_size);
    double best = 1e30, peak = 0;
    const int repeats = static_cast<int>(std::min(400.0, std::max(12.0, 2e10 / operations)));
    for (int i = 0; i < repeats; ++i) {
        if (i % 8 == 0) peak = std::max(peak, burst(8000));
        call = next_call++;
        next = 0;
        q.p.packed = weights[static_cast<size_t>(i) % copies].data();
        const double start = seconds(threads);
        team.run(share);
        best = std::min(best, seconds(threads) - start);
    }
    std::printf(
        "%4lld -> %4lld %lldx%lld, %3lld x %3lld, batch %lld, %2lld items: %9.1f us, %7.1f GOP/s, %.3f of the peak\n",
        (long long)l.in, (long long)l.out, (long long)l.kernel, (long long)l.kernel, (long long)l.height,
        (long long)l.width, (long long)l.batch, (long long)items, 1e6 * best, 1e-9 * operations / best,
        operations / best / (peak * threads));
}

const Layer kLayers[] = {
    {128, 128, 32, 32, 3, 1},  {256, 256, 16, 16, 3, 1},
    {256, 256, 8, 8, 3, 1},    {256, 256, 8, 8, 3, 8},
    {256, 256, 4, 4, 3, 1},    {256, 256, 4, 4, 3, 8},
    {512, 256, 16, 16, 3, 1},  {512, 256, 8, 8, 3, 1},
    {512, 256, 4, 4, 3, 1},    {64, 64, 64, 64, 3, 1},
    {64, 64, 256, 256, 3, 1},  {128, 128, 32, 32, 3, 8},
    {256, 256, 16, 16, 3, 8},  {128, 128, 32, 32, 3, 1, 2},
    {256, 256, 16, 16, 1, 1},  {256, 768, 16, 16, 1, 1},
    {64, 64, 64, 64, 1, 1},    {256, 1024, 1, 256, 1, 1},
    {1024, 256, 1, 256, 1, 1}, {3, 64, 256, 256, 3, 1},
    {64, 3, 256, 256, 3, 1},   {64, 64, 256, 256, 3, 1, 1, DType::int8, Activation::relu},
};

}  // namespace

int main(int count, char** words) {
    if (count == 1) return check();
    const bool cold = std::strcmp(words[1], "cold") == 0;
    if ((cold || std::strcmp(words[1], "time") == 0) && (count <= 3 || count == 9)) {
        const int threads = count > 2 ? std::max(1, std::atoi(words[2])) : 1;
        Team team(threads);
        if (count == 9) {
            const auto number = [&](int i) { return std::atoll(words[i]); };
            time_layer({number(3), number(4), number(5), number(6), number(7), number(8)}, threads, team, cold);
            return 0;
        }
        for (const Layer& layer : kLayers) time_layer(layer, threads, team, cold);
        return 0;
    }
    std::fprintf(stderr, "usage: %s | %s time|cold [THREADS [IN OUT HEIGHT WIDTH KERNEL BATCH]]\n", words[0], words[0]);
    return 2;
}
