// Stand-alone check and timing of csrc/norm_quantize, without torch:
//   g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno [ISA flags] tests/native/norm_quantize_harness.cpp -o harness
//   ./harness                                      all cases against double precision; exit 1 on a failure
//   ./harness time BATCH CHANNELS HEIGHT WIDTH [REPEATS]   best microseconds of group norm's parts, one thread
//   ./harness time_layer ROWS CHANNELS [REPEATS]           the same for layer norm
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/norm_quantize/group_norm.inl"
#include "../../csrc/norm_quantize/layer_norm.inl"
#include "aligned.h"

using namespace pdn;
using namespace pdn::norm_quantize;

namespace {

constexpr float kScale = 0.021f;
constexpr int32_t kZeroPoint = -30;
const double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Case {
    const char* why;
    DType dtype;
    Activation activation;
    int64_t batch, pixels, channels, skip, groups;
    bool affine, film, given_scale;
    int64_t gap;  // elements between pixels that belong to nobody
    float mean;   // of the input, whose deviation is 1
};

const Case kGroupCases[] = {
    {"whole vectors", DType::float32, Activation::silu, 2, 64, 64, 0, 8, true, false, true, 0, 0},
    {"chunks of unequal size", DType::float32, Activation::silu, 1, 1500, 64, 0, 8, true, false, true, 0, 1},
    {"one pixel", DType::float32, Activation::silu, 2, 1, 32, 0, 4, true, false, true, 0, 0},
    {"three channels, groups of one", DType::float32, Activation::none, 2, 35, 3, 0, 3, true, false, true, 5, 0},
    {"groups across vectors and the skip", DType::float32, Activation::silu, 2, 49, 37, 26, 3, true, true, true, 3, 0},
    {"skip shorter than a vector", DType::float32, Activation::relu, 1, 33, 21, 3, 2, true, true, false, 0, 0},
    {"bfloat16", DType::bfloat16, Activation::silu, 1, 100, 72, 24, 6, true, true, true, 2, 0},
    {"float16, a scale per pixel", DType::float16, Activation::silu, 2, 50, 40, 0, 5, true, false, false, 0, 0},
    {"gelu", DType::float32, Activation::gelu, 1, 30, 48, 0, 4, false, false, true, 0, 0},
    {"gelu_tanh, a scale per pixel", DType::float32, Activation::gelu_tanh, 1, 30, 19, 0, 1, true, true, false, 0, 0},
    {"leaky relu", DType::float32, Activation::leaky_relu_02, 1, 30, 48, 0, 4, true, false, true, 0, 0},
    {"mean 1000 deviations", DType::float32, Activation::none, 1, 700, 64, 16, 8, true, false, false, 0, 1000},
    {"mean 1000 deviations, odd sizes", DType::float32, Activation::silu, 1, 77, 45, 0, 9, true, false, true, 0, -1000},
    {"no images", DType::float32, Activation::silu, 0, 16, 32, 0, 4, true, false, true, 0, 0},
};

const Case kLayerCases[] = {
    {"whole vectors", DType::float32, Activation::none, 2, 20, 256, 0, 1, true, false, true, 0, 0},
    {"odd sizes", DType::float32, Activation::none, 3, 7, 77, 0, 1, true, true, true, 3, 0},
    {"shorter than a vector, a scale per row", DType::float32, Activation::none, 1, 9, 3, 0, 1, true, true, false, 1,
     0},
    {"bfloat16", DType::bfloat16, Activation::none, 1, 9, 100, 0, 1, true, false, true, 0, 0},
    {"float16, a scale per row", DType::float16, Activation::none, 2, 9, 41, 0, 1, false, false, false, 0, 0},
    {"mean 1000 deviations", DType::float32, Activation::none, 1, 30, 320, 0, 1, true, false, false, 0, 1000},
    {"one channel", DType::float32, Activation::none, 1, 4, 1, 0, 1, true, false, true, 0, 0},
};

void fill(Values<float>& values, int64_t count, float mean, float deviation, std::mt19937& generator) {
    std::normal_distribution<float> normal(mean, deviation);
    values.resize(static_cast<size_t>(count));
    for (float& value : values) value = normal(generator);
}

uint16_t narrowed(float x, DType dtype) { return dtype == DType::bfloat16 ? to_bf16(x) : to_fp16(x).bits; }
float widened_bits(uint16_t x, DType dtype) { return dtype == DType::bfloat16 ? from_bf16(x) : from_fp16({x}); }

// Values as the kernel reads them, and the same as floats.
struct Input {
    Values<float> floats;
    Values<uint16_t> halves;
    int64_t channels = 0, stride = 0;

    void build(const Case& c, int64_t rows, int64_t count, std::mt19937& generator) {
        channels = count;
        stride = count + c.gap;
        fill(floats, rows * stride, c.mean, 1.f, generator);
        if (c.dtype == DType::float32) return;
        for (float& value : floats) {
            halves.push_back(narrowed(value, c.dtype));
            value = widened_bits(halves.back(), c.dtype);
        }
    }
    const void* data() const { return halves.empty() ? static_cast<const void*>(floats.data()) : halves.data(); }
    double at(int64_t row, int64_t channel) const { return floats[static_cast<size_t>(row * stride + channel)]; }
};

struct Problem {
    Input input, skip;
    Values<float> weight, bias, film, channel_scale, out_scale;
    Values<int32_t> out_zero_point;
    Values<int8_t> codes;
    int64_t rows = 0, channels = 0;

    void build(const Case& c) {
        std::mt19937 generator(7);
        rows = c.batch * c.pixels;
        channels = c.channels + c.skip;
        input.build(c, rows, c.channels, generator);
        skip.build(c, rows, c.skip, generator);
        fill(weight, channels, 1.f, .3f, generator);
        fill(bias, channels, 0.f, .3f, generator);
        fill(film, 2 * c.batch * channels, 0.f, .3f, generator);
        fill(channel_scale, channels, 1.f, .1f, generator);
        out_scale.assign(static_cast<size_t>(rows), -1.f);
        out_zero_point.assign(static_cast<size_t>(rows), 999);
        codes.assign(static_cast<size_t>(rows * channels), 77);
    }
    CodesOut out(const Case& c) {
        if (c.given_scale) return {&kScale, &kZeroPoint, nullptr, nullptr, codes.data()};
        return {nullptr, nullptr, out_scale.data(), out_zero_point.data(), codes.data()};
    }
    double value(int64_t row, int64_t channel) const {
        return channel < input.channels ? input.at(row, channel) : skip.at(row, channel - input.channels);
    }
    // What follows the normalisation.
    double finished(const Case& c, double x, int64_t image, int64_t channel) const {
        const auto i = static_cast<size_t>(channel);
        if (c.affine) x = x * weight[i] + bias[i];
        const auto base = static_cast<size_t>(image * 2 * channels);
        if (c.film) x = x * (1.0 + film[base + i]) + film[base + static_cast<size_t>(channels) + i];
        switch (c.activation) {
            case Activation::relu:
                x = x < 0 ? 0 : x;
                break;
            case Activation::silu:
                x = x / (1 + std::exp(-x));
                break;
            case Activation::gelu:
                x = 0.5 * x * std::erfc(-x / std::sqrt(2.0));
                break;
            case Activation::gelu_tanh:
                x = 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
                break;
            default:
                if (is_leaky_relu(c.activation) && x < 0) x *= leaky_slope(c.activation);
        }
        return x * channel_scale[i];
    }
};

// Mean and 1 / deviation of `count` channels from `first` of the rows begin..end.
void exact_moments(const Problem& q, int64_t begin, int64_t end, int64_t first, int64_t count, double eps, double* mean,
                   double* rstd) {
    double sum = 0, squares = 0;
    const auto each = [&](const auto& body) {
        for (int64_t row = begin; row < end; ++row)
            for (int64_t channel = first; channel < first + count; ++channel) body(q.value(row, channel));
    };
    each([&](double x) { sum += x; });
    const double size = static_cast<double>((end - begin) * count);
    *mean = sum / size;
    each([&](double x) { squares += (x - *mean) * (x - *mean); });
    *rstd = 1 / std::sqrt(squares / size + eps);
}

// Largest error of a row's codes, in steps, beyond the half step of rounding; of a row with its own scale, that of the
// scale too.
double row_error(const Case& c, const Problem& q, int64_t row, const std::vector<double>& expected) {
    double scale = kScale, zero_point = kZeroPoint, worst = 0;
    if (!c.given_scale) {
        double low = 0, high = 0;
        for (double x : expected) low = std::min(low, x), high = std::max(high, x);
        scale = q.out_scale[static_cast<size_t>(row)];
        zero_point = q.out_zero_point[static_cast<size_t>(row)];
        const double exact = (high - low) / 255;
        if (!(std::fabs(scale / exact - 1) < 2e-6)) return kNaN;
        if (!(std::fabs(zero_point - std::max(-128.0, std::min(127.0, -128 - low / exact))) < 0.501)) return kNaN;
    }
    for (int64_t channel = 0; channel < q.channels; ++channel) {
        const double exact = expected[static_cast<size_t>(channel)] / scale + zero_point;
        const double got = q.codes[static_cast<size_t>(row * q.channels + channel)];
        worst = std::max(worst, std::fabs(got - std::max(-128.0, std::min(127.0, exact))) - 0.5);
    }
    return worst;
}

void run_group(const GroupNormParams& p, bool backwards) {
    const int64_t chunks = chunks_of(p), partial = group_partial(p);
    Values<float> partials(static_cast<size_t>(p.batch * chunks * partial), 1e30f);
    Values<float> coefficients(static_cast<size_t>(group_coefficients(p)));
    Values<char> scratch(static_cast<size_t>(group_scratch(p)), 0x7f);
    for (int64_t image = 0; image < p.batch; ++image) {
        float* own = partials.data() + image * chunks * partial;
        const auto order = [&](int64_t i) { return backwards ? chunks - 1 - i : i; };
        for (int64_t i = 0; i < chunks; ++i) group_statistics(p, image, order(i), own + order(i) * partial);
        std::fill(coefficients.begin(), coefficients.end(), 1e30f);
        group_fold(p, image, own, coefficients.data());
        for (int64_t i = 0; i < chunks; ++i) group_write(p, image, order(i), coefficients.data(), scratch.data());
    }
}

GroupNormParams group_params(const Case& c, Problem& q) {
    GroupNormParams p{};
    p.dtype = c.dtype;
    p.activation = c.activation;
    p.batch = c.batch, p.pixels = c.pixels, p.channels = q.channels, p.groups = c.groups;
    p.panel[0] = {q.input.data(), c.channels, c.pixels * q.input.stride, q.input.stride};
    p.panel[1] = {q.skip.data(), c.skip, c.pixels * q.skip.stride, q.skip.stride};
    p.eps = 1e-5;
    p.weight = c.affine ? q.weight.data() : nullptr;
    p.bias = c.affine ? q.bias.data() : nullptr;
    p.film = c.film ? q.film.data() : nullptr;
    p.channel_scale = q.channel_scale.data();
    p.out = q.out(c);
    return p;
}

double group_error(const Case& c) {
    Problem q;
    q.build(c);
    const GroupNormParams p = group_params(c, q);
    run_group(p, false);
    const Values<int8_t> first = q.codes;
    std::fill(q.codes.begin(), q.codes.end(), static_cast<int8_t>(55));
    run_group(p, true);
    if (first != q.codes) return kNaN;  // the result depends on the order
    double worst = 0;
    const int64_t per_group = q.channels / c.groups;
    for (int64_t image = 0; image < c.batch; ++image) {
        std::vector<double> mean(static_cast<size_t>(c.groups)), rstd(static_cast<size_t>(c.groups));
        for (int64_t g = 0; g < c.groups; ++g)
            exact_moments(q, image * c.pixels, (image + 1) * c.pixels, g * per_group, per_group, p.eps,
                          &mean[static_cast<size_t>(g)], &rstd[static_cast<size_t>(g)]);
        for (int64_t row = image * c.pixels; row < (image + 1) * c.pixels; ++row) {
            std::vector<double> expected;
            for (int64_t channel = 0; channel < q.channels; ++channel) {
                const auto g = static_cast<size_t>(channel / per_group);
                expected.push_back(q.finished(c, (q.value(row, channel) - mean[g]) * rstd[g], image, channel));
            }
            const double error = row_error(c, q, row, expected);
            if (!(error <= worst)) worst = error;
        }
    }
    return worst;
}

LayerNormParams layer_params(const Case& c, Problem& q) {
    LayerNormParams p{};
    p.dtype = c.dtype;
    p.rows = q.rows, p.channels = q.channels, p.row_stride = q.input.stride;
    p.input = q.input.data();
    p.eps = 1e-5;
    p.weight = c.affine ? q.weight.data() : nullptr;
    p.bias = c.affine ? q.bias.data() : nullptr;
    p.film = c.film ? q.film.data() : nullptr;
    p.film_rows = c.film ? c.pixels : q.rows;
    p.channel_scale = q.channel_scale.data();
    p.out = q.out(c);
    return p;
}

double layer_error(const Case& c) {
    Problem q;
    q.build(c);
    const LayerNormParams p = layer_params(c, q);
    const int64_t films = c.film ? c.batch : 1;
    Values<float> coefficients(static_cast<size_t>(films * layer_coefficients(p)), 1e30f);
    Values<char> scratch(static_cast<size_t>(layer_scratch(p)), 0x7f);
    for (int64_t i = 0; i < films; ++i) layer_fold(p, i, coefficients.data() + i * layer_coefficients(p));
    layer_rows(p, 0, p.rows, coefficients.data(), scratch.data());
    double worst = 0;
    for (int64_t row = 0; row < q.rows; ++row) {
        double mean, rstd;
        exact_moments(q, row, row + 1, 0, q.channels, p.eps, &mean, &rstd);
        std::vector<double> expected;
        for (int64_t channel = 0; channel < q.channels; ++channel)
            expected.push_back(q.finished(c, (q.value(row, channel) - mean) * rstd, row / c.pixels, channel));
        const double error = row_error(c, q, row, expected);
        if (!(error <= worst)) worst = error;
    }
    return worst;
}

// The logistic function is what every SiLU of a network goes through.
double logistic_error() {
    double worst = 0;
    for (float x = -80.f; x < 80.f; x += 0.0037f) {
        const double exact = 1 / (1 + std::exp(-static_cast<double>(x)));
        const double got = (1.f / one_plus_exp2(splat(x * kMinusLog2e)))[0];
        // the rounding of the argument counts in full where the result is small
        worst = std::max(worst, std::fabs(got / exact - 1) / (1 + 0.25 * std::fabs(static_cast<double>(x))));
    }
    return worst;
}

int check() {
    int failures = 0;
    const auto report = [&](const char* op, const char* why, double error, double allowed) {
        const bool fine = error <= allowed;
        failures += !fine;
        std::printf("%s %s: %-40s error %.2e\n", fine ? "ok  " : "FAIL", op, why, error);
    };
    for (const Case& c : kGroupCases) report("group norm", c.why, group_error(c), 5e-4);
    for (const Case& c : kLayerCases) report("layer norm", c.why, layer_error(c), 5e-4);
    report("logistic", "relative", logistic_error(), 6e-7);
    std::printf("width %d: %d failed\n", kWidth, failures);
    return failures != 0;
}

double thread_microseconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return 1e6 * static_cast<double>(now.tv_sec) + 1e-3 * static_cast<double>(now.tv_nsec);
}

template <class Body>
void measure(const char* what, int repeats, double bytes, double elements, const Body& body) {
    double best = 1e30;
    for (int i = 0; i < repeats; ++i) {
        const double start = thread_microseconds();
        body();
        best = std::min(best, thread_microseconds() - start);
    }
    std::printf("%-12s best %9.2f us, %6.1f GB/s, %6.2f elements/ns\n", what, best, bytes / best * 1e-3,
                elements / best * 1e-3);
}

int time_group(int64_t batch, int64_t channels, int64_t pixels, int repeats) {
    for (DType dtype : {DType::float32, DType::bfloat16}) {
        for (bool given : {true, false}) {
            const Case c = {"timing", dtype, Activation::silu, batch, pixels, channels, 0, 32, true, false, given,
                            0,        0};
            Problem q;
            q.build(c);
            const GroupNormParams p = group_params(c, q);
            const int64_t chunks = chunks_of(p), partial = group_partial(p);
            Values<float> partials(static_cast<size_t>(batch * chunks * partial));
            Values<float> coefficients(static_cast<size_t>(group_coefficients(p)));
            Values<char> scratch(static_cast<size_t>(group_scratch(p)));
            const double elements = static_cast<double>(batch * pixels * channels);
            const double in = elements * (dtype == DType::float32 ? 4 : 2);
            std::printf("%s, %s\n", dtype == DType::float32 ? "float32" : "bfloat16",
                        given ? "given scale" : "a scale per pixel");
            const auto each = [&](const auto& body) {
                for (int64_t image = 0; image < batch; ++image)
                    for (int64_t chunk = 0; chunk < chunks; ++chunk) body(image, chunk);
            };
            measure("statistics", repeats, in, elements, [&] {
                each([&](int64_t image, int64_t chunk) {
                    group_statistics(p, image, chunk, partials.data() + (image * chunks + chunk) * partial);
                });
            });
            const Values<float> kept = partials;
            measure("fold", repeats, 0, elements, [&] {
                for (int64_t image = 0; image < batch; ++image)
                    group_fold(p, image, partials.data() + image * chunks * partial, coefficients.data());
            });
            measure("write", repeats, in + elements, elements, [&] {
                each([&](int64_t image, int64_t chunk) {
                    group_write(p, image, chunk, coefficients.data(), scratch.data());
                });
            });
        }
    }
    return 0;
}

int time_layer(int64_t rows, int64_t channels, int repeats) {
    for (DType dtype : {DType::float32, DType::bfloat16}) {
        for (bool given : {true, false}) {
            const Case c = {"timing", dtype, Activation::none, 1, rows, channels, 0, 1, true, false, given, 0, 0};
            Problem q;
            q.build(c);
            const LayerNormParams p = layer_params(c, q);
            Values<float> coefficients(static_cast<size_t>(layer_coefficients(p)));
            Values<char> scratch(static_cast<size_t>(layer_scratch(p)));
            layer_fold(p, 0, coefficients.data());
            const double elements = static_cast<double>(rows * channels);
            std::printf("%s, %s\n", dtype == DType::float32 ? "float32" : "bfloat16",
                        given ? "given scale" : "a scale per row");
            measure("rows", repeats, elements * (dtype == DType::float32 ? 5 : 3), elements,
                    [&] { layer_rows(p, 0, rows, coefficients.data(), scratch.data()); });
        }
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string mode = argc > 1 ? argv[1] : "";
    const auto number = [&](int i, int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
    if (mode == "time")
        return time_group(number(2, 1), number(3, 128), number(4, 32) * number(5, 32),
                          static_cast<int>(number(6, 500)));
    if (mode == "time_layer") return time_layer(number(2, 1024), number(3, 256), static_cast<int>(number(4, 500)));
    return check();
}
