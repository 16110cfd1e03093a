// Stand-alone check and timing of csrc/quantize, without torch:
//   g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno [ISA flags] tests/native/quantize_harness.cpp -o harness
//   ./harness                          all cases against plain arithmetic; exit 1 on a failure
//   ./harness time ROWS CHANNELS [REPEATS]   best microseconds, one thread
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

#include "../../csrc/quantize/kernel.inl"

using namespace pdn;
using namespace pdn::quantize;

namespace {

enum Scales { one_scale, row_scales, dynamic_affine, dynamic_symmetric };

struct Case {
    const char* why;
    DType dtype;
    Activation activation;
    int64_t rows, channels, gap;
    Scales scales;
    bool zero_point, channel_scale;
};

const Case kCases[] = {
    {"whole vectors", DType::float32, Activation::none, 9, 64, 0, one_scale, true, false},
    {"shorter than a vector", DType::float32, Activation::none, 40, 3, 2, one_scale, false, false},
    {"a scale per row, odd sizes", DType::float32, Activation::none, 17, 37, 3, row_scales, true, true},
    {"dynamic", DType::float32, Activation::none, 17, 70, 0, dynamic_affine, false, false},
    {"dynamic, symmetric, one channel", DType::float32, Activation::none, 17, 1, 0, dynamic_symmetric, false, false},
    {"bfloat16", DType::bfloat16, Activation::none, 5, 81, 1, row_scales, false, false},
    {"float16, dynamic", DType::float16, Activation::none, 5, 81, 0, dynamic_affine, false, false},
    {"relu", DType::float32, Activation::relu, 5, 81, 0, one_scale, true, true},
    {"leaky relu", DType::float32, Activation::leaky_relu_01, 5, 81, 0, one_scale, true, true},
    {"silu", DType::float32, Activation::silu, 5, 129, 0, one_scale, true, false},
    {"silu, dynamic", DType::float32, Activation::silu, 5, 45, 0, dynamic_affine, false, true},
    {"gelu", DType::float32, Activation::gelu, 5, 45, 0, one_scale, true, false},
    {"gelu_tanh", DType::float32, Activation::gelu_tanh, 5, 45, 0, one_scale, true, false},
    {"geglu", DType::float32, Activation::geglu, 5, 45, 7, row_scales, true, true},
    {"geglu, dynamic, shorter than a vector", DType::bfloat16, Activation::geglu, 5, 13, 0, dynamic_affine, false,
     false},
};

uint16_t narrowed(float x, DType dtype) { return dtype == DType::bfloat16 ? to_bf16(x) : to_fp16(x).bits; }
float widened(uint16_t x, DType dtype) { return dtype == DType::bfloat16 ? from_bf16(x) : from_fp16({x}); }

struct Problem {
    std::vector<float> input, channel_scale, scale, out_scale;
    std::vector<uint16_t> halves;
    std::vector<int32_t> zero_point, out_zero_point;
    std::vector<int8_t> codes;
    int64_t stride = 0;
    QuantizeParams p{};

    explicit Problem(const Case& c) {
        std::mt19937 generator(7);
        std::normal_distribution<float> normal(0.5f, 3.f);
        stride = c.channels * (c.activation == Activation::geglu ? 2 : 1) + c.gap;
        for (int64_t i = 0; i < c.rows * stride; ++i) {
            float x = normal(generator);
            if (c.dtype != DType::float32) {
                halves.push_back(narrowed(x, c.dtype));
                x = widened(halves.back(), c.dtype);
            }
            input.push_back(x);
        }
        for (int64_t i = 0; i < c.channels; ++i) channel_scale.push_back(1.f + 0.1f * normal(generator));
        for (int64_t i = 0; i < c.rows; ++i) {
            scale.push_back(0.01f + 0.01f * static_cast<float>(generator() % 8));
            zero_point.push_back(static_cast<int32_t>(generator() % 256) - 128);
        }
        codes.assign(static_cast<size_t>(c.rows * c.channels), 99);
        out_scale.assign(static_cast<size_t>(c.rows), -1.f);
        out_zero_point.assign(static_cast<size_t>(c.rows), 999);
        p.dtype = c.dtype;
        p.activation = c.activation;
        p.rows = c.rows, p.channels = c.channels, p.row_stride = stride;
        p.input = halves.empty() ? static_cast<const void*>(input.data()) : halves.data();
        p.channel_scale = c.channel_scale ? channel_scale.data() : nullptr;
        if (c.scales == one_scale || c.scales == row_scales) {
            p.scale = scale.data();
            p.zero_point = c.zero_point ? zero_point.data() : nullptr;
            p.scale_step = c.scales == row_scales;
        }
        p.symmetric = c.scales == dynamic_symmetric;
        p.out_scale = out_scale.data();
        p.out_zero_point = out_zero_point.data();
        p.output = codes.data();
    }
    void run(int64_t begin, int64_t end) {
        std::vector<char> scratch(static_cast<size_t>(quantize_scratch(p)), 0x7f);
        pdn::quantize::quantize(p, begin, end, scratch.data());
    }
};

double transformed_exactly(const Case& c, const Problem& q, int64_t row, int64_t channel) {
    const auto at = [&](int64_t i) { return static_cast<double>(q.input[static_cast<size_t>(row * q.stride + i)]); };
    double x = at(channel);
    const auto gelu_of = [](double v) { return 0.5 * v * std::erfc(-v / std::sqrt(2.0)); };
    switch (c.activation) {
        case Activation::relu:
            x = x < 0 ? 0 : x;
            break;
        case Activation::silu:
            x = x / (1 + std::exp(-x));
            break;
        case Activation::gelu:
            x = gelu_of(x);
            break;
        case Activation::gelu_tanh:
            x = 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
            break;
        case Activation::geglu:
            x = x * gelu_of(at(c.channels + channel));
            break;
        default:
            if (is_leaky_relu(c.activation) && x < 0) x *= leaky_slope(c.activation);
    }
    return c.channel_scale ? x * q.channel_scale[static_cast<size_t>(channel)] : x;
}

// Largest distance of a code from its exact value, beyond half a step; infinite where a scale is wrong or a result
// depends on how the rows are split.
double error_of(const Case& c) {
    Problem q(c);
    q.run(0, c.rows);
    const std::vector<int8_t> whole = q.codes;
    std::fill(q.codes.begin(), q.codes.end(), static_cast<int8_t>(11));
    for (int64_t row = c.rows - 1; row >= 0; --row) q.run(row, row + 1);
    if (whole != q.codes) return 1e30;
    double worst = 0;
    for (int64_t row = 0; row < c.rows; ++row) {
        std::vector<double> values;
        double low = 0, high = 0;
        for (int64_t channel = 0; channel < c.channels; ++channel) {
            values.push_back(transformed_exactly(c, q, row, channel));
            low = std::min(low, values.back()), high = std::max(high, values.back());
        }
        const auto i = static_cast<size_t>(row), first = static_cast<size_t>(row * q.p.scale_step);
        double scale, zero_point = 0, least = -127;
        if (q.p.scale) {
            scale = q.scale[first];
            if (c.zero_point) zero_point = q.zero_point[first], least = -128;
        } else {
            scale = q.out_scale[i];
            zero_point = q.out_zero_point[i];
            const bool affine = c.scales == dynamic_affine;
            const double exact = affine ? (high - low) / 255 : std::max(high, -low) / 127;
            if (!(std::fabs(scale / exact - 1) < 2e-6)) return 1e30;
            if (affine && !(std::fabs(zero_point - (-128 - low / exact)) < 0.501)) return 1e30;
            if (affine) least = -128;
        }
        for (int64_t channel = 0; channel < c.channels; ++channel) {
            const double exact = values[static_cast<size_t>(channel)] / scale + zero_point;
            const double got = q.codes[static_cast<size_t>(row * c.channels + channel)];
            worst = std::max(worst, std::fabs(got - std::max(least, std::min(127.0, exact))) - 0.5);
        }
    }
    return worst;
}

// Quotients at and beside every tie between two codes, and what is no number.
bool ties_are_exact() {
    std::mt19937 generator(3);
    for (int repeat = 0; repeat < 200; ++repeat) {
        const float scale = std::ldexp(1.f + static_cast<float>(generator() % 8388608) / 8388608.f,
                                       static_cast<int>(generator() % 60) - 30);
        const int32_t zero_point = static_cast<int32_t>(generator() % 256) - 128;
        std::vector<float> x;
        const float huge = std::numeric_limits<float>::infinity();
        for (int k = -260; k < 260; ++k) {
            const float tie = (static_cast<float>(k) + 0.5f) * scale;
            x.insert(x.end(), {tie, std::nextafterf(tie, huge), std::nextafterf(tie, -huge)});
        }
        x.insert(x.end(), {huge, -huge, std::nanf(""), 3e38f, -3e38f, 1e-45f, -0.f});
        std::vector<int8_t> codes(x.size());
        QuantizeParams p{};
        p.rows = 1, p.channels = static_cast<int64_t>(x.size());
        p.input = x.data();
        p.scale = &scale;
        p.zero_point = repeat % 2 ? &zero_point : nullptr;
        p.output = codes.data();
        pdn::quantize::quantize(p, 0, 1, nullptr);
        for (size_t i = 0; i < x.size(); ++i) {
            const float quotient = x[i] / scale;
            const double rounded = quotient != quotient ? 0.0 : std::nearbyint(static_cast<double>(quotient));
            const double code = rounded + (p.zero_point ? zero_point : 0);
            if (codes[i] != std::max(p.zero_point ? -128.0 : -127.0, std::min(127.0, code))) return false;
        }
    }
    return true;
}

bool dequantize_is_exact(DType dtype, int64_t rows, int64_t channels) {
    std::vector<int8_t> codes;
    for (int64_t i = 0; i < rows * channels; ++i) codes.push_back(static_cast<int8_t>(i * 37));
    std::vector<float> scale, wide(codes.size());
    std::vector<int32_t> zero_point;
    for (int64_t i = 0; i < rows; ++i) scale.push_back(0.013f * static_cast<float>(i + 1)), zero_point.push_back(i - 3);
    std::vector<uint16_t> half(codes.size());
    DequantizeParams p{dtype, rows, channels, channels, codes.data(), scale.data(), zero_point.data(), 1, nullptr};
    p.output = dtype == DType::float32 ? static_cast<void*>(wide.data()) : half.data();
    pdn::quantize::dequantize(p, 0, rows);
    for (size_t i = 0; i < codes.size(); ++i) {
        const size_t row = i / static_cast<size_t>(channels);
        const float exact = static_cast<float>(codes[i] - zero_point[row]) * scale[row];
        if (dtype == DType::float32 ? wide[i] != exact : half[i] != narrowed(exact, dtype)) return false;
    }
    return true;
}

int check() {
    int failures = 0;
    const auto report = [&](const char* why, bool fine, double error) {
        failures += !fine;
        std::printf("%s %-45s error %.2e\n", fine ? "ok  " : "FAIL", why, error);
    };
    for (const Case& c : kCases) {
        const double error = error_of(c);
        report(c.why, error <= 2e-4, error);
    }
    report("ties, infinities, NaN", ties_are_exact(), 0);
    for (DType dtype : {DType::float32, DType::bfloat16, DType::float16})
        for (int64_t channels : {3, 64, 77}) report("dequantize", dequantize_is_exact(dtype, 5, channels), 0);
    std::printf("width %d: %d failed\n", kWidth, failures);
    return failures != 0;
}

double thread_microseconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return 1e6 * static_cast<double>(now.tv_sec) + 1e-3 * static_cast<double>(now.tv_nsec);
}

int time_rows(int64_t rows, int64_t channels, int repeats) {
    const Case cases[] = {
        {"float32", DType::float32, Activation::none, rows, channels, 0, one_scale, true, false},
        {"bfloat16", DType::bfloat16, Activation::none, rows, channels, 0, one_scale, true, false},
        {"float32, dynamic", DType::float32, Activation::none, rows, channels, 0, dynamic_affine, true, false},
        {"float32, silu", DType::float32, Activation::silu, rows, channels, 0, one_scale, true, false},
        {"float32, geglu", DType::float32, Activation::geglu, rows, channels, 0, one_scale, true, false},
        {"float32, geglu, dynamic", DType::float32, Activation::geglu, rows, channels, 0, dynamic_affine, true, false},
    };
    for (const Case& c : cases) {
        Problem q(c);
        double best = 1e30;
        for (int i = 0; i < repeats; ++i) {
            const double start = thread_microseconds();
            q.run(0, rows);
            best = std::min(best, thread_microseconds() - start);
        }
        const double bytes = static_cast<double>(rows * (q.stride * (c.dtype == DType::float32 ? 4 : 2) + channels));
        std::printf("%-26s best %9.2f us, %6.1f GB/s, %6.2f codes/ns\n", c.why, best, bytes / best * 1e-3,
                    static_cast<double>(rows * channels) / best * 1e-3);
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const auto number = [&](int i, int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
    if (argc > 1 && std::string(argv[1]) == "time")
        return time_rows(number(2, 1024), number(3, 128), static_cast<int>(number(4, 500)));
    return check();
}
