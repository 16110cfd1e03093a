// Stand-alone check and timing of csrc/weighted_conv/winograd.inl, without torch:
//   g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno [ISA flags] tests/native/winograd_harness.cpp -o harness
//   ./harness                                     all cases against a double-precision convolution; exit 1 on a failure
//   ./harness time IN OUT HEIGHT WIDTH [REPEATS]  best and median milliseconds of one layer, one thread, and the parts
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

#include "../../csrc/weighted_conv/winograd.inl"

using namespace pdn;
using namespace pdn::weighted_conv;

namespace {

struct Case {
    const char* why;
    int64_t batch, groups, in_channels, out_channels, height, width, pad;  // channels per group; pad may be negative
    Activation activation;
    bool bias, residual, density, flipped;
    int64_t gap;  // floats between pixels that belong to nobody
};

const Case kCases[] = {
    {"all blocks full", 1, 1, 64, 64, 16, 28, 1, Activation::relu, true, false, true, false, 0},
    {"channels below a vector in the tail", 1, 1, 19, 37, 9, 31, 1, Activation::none, true, true, true, false, 0},
    {"one vector in the last column", 2, 1, 33, 48, 13, 17, 1, Activation::silu, true, true, false, false, 3},
    {"one channel in the last column", 1, 1, 17, 33, 8, 8, 1, Activation::gelu, true, false, true, true, 5},
    {"leaky relu", 1, 1, 32, 48, 11, 16, 1, Activation::leaky_relu_01, true, false, true, false, 0},
    {"softplus", 1, 1, 32, 48, 10, 16, 1, Activation::softplus, true, true, false, false, 0},
    {"groups", 2, 3, 24, 20, 7, 10, 1, Activation::relu, true, true, true, false, 1},
    {"single pixel", 3, 1, 16, 16, 1, 1, 1, Activation::none, true, false, true, false, 0},
    {"no padding", 1, 1, 16, 32, 11, 12, 0, Activation::gelu_tanh, false, false, true, false, 0},
    {"more padding than one patch", 1, 1, 16, 16, 3, 2, 9, Activation::none, true, false, true, false, 0},
    {"cropped: the offset is positive", 1, 1, 16, 16, 12, 15, -2, Activation::none, true, true, true, true, 0},
    {"one column", 1, 1, 40, 16, 23, 1, 1, Activation::relu, false, true, false, false, 0},
    {"many channels", 1, 1, 256, 256, 9, 13, 1, Activation::none, true, false, true, false, 0},
    {"no images", 0, 1, 16, 16, 8, 8, 1, Activation::none, true, false, true, false, 0},
};

struct Problem {
    ConvParams p{};
    WeightView view{};
    std::vector<float> input, weight, density, bias, residual, output;
    std::vector<char> packed_store, scratch_store;
    char *packed = nullptr, *scratch = nullptr;
};

char* aligned(std::vector<char>& store, int64_t bytes) {
    store.assign(static_cast<size_t>(bytes) + 64, 0x7f);
    char* at = store.data();
    return at + (64 - reinterpret_cast<uintptr_t>(at) % 64) % 64;
}

void fill(std::vector<float>& values, int64_t count, float scale, std::mt19937& generator) {
    std::normal_distribution<float> normal;
    values.resize(static_cast<size_t>(count));
    for (float& value : values) value = scale * normal(generator);
}

void build(const Case& c, Problem& q) {
    std::mt19937 generator(7);
    const int64_t channels = c.groups * c.in_channels, filters = c.groups * c.out_channels;
    const int64_t out_height = c.height + 2 * c.pad - 2, out_width = c.width + 2 * c.pad - 2;
    const int64_t in_pixel = channels + c.gap, out_pixel = filters + c.gap;
    fill(q.input, c.batch * c.height * c.width * in_pixel - (c.batch ? c.gap : 0), 1.f, generator);
    fill(q.weight, filters * c.in_channels * 9, 1.f / std::sqrt(9.f * c.in_channels), generator);
    fill(q.density, 9, 1.f, generator);
    fill(q.bias, filters, 1.f, generator);
    fill(q.residual, c.batch * out_height * out_width * out_pixel, 1.f, generator);
    q.output.assign(q.residual.size(), std::numeric_limits<float>::quiet_NaN());
    ConvParams& p = q.p;
    p.dtype = DType::float32;
    p.activation = c.activation;
    p.batch = c.batch, p.groups = c.groups, p.in_channels = c.in_channels, p.out_channels = c.out_channels;
    p.in_batch_stride = c.height * c.width * in_pixel;
    p.out_batch_stride = p.residual_batch_stride = out_height * out_width * out_pixel;
    p.axis[0] = {1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 0, 1};
    p.axis[1] = {
        c.height, out_height, c.width * in_pixel, out_width * out_pixel, out_width * out_pixel, 1, -c.pad, 1, 3, 3,
        0,        1};
    p.axis[2] = {c.width, out_width, in_pixel, out_pixel, out_pixel, 1, -c.pad, 1, 3, 3, 0, 1};
    p.input = q.input.data();
    p.bias = c.bias ? q.bias.data() : nullptr;
    p.residual = c.residual ? q.residual.data() : nullptr;
    p.output = q.output.data();
    const int64_t last = c.flipped ? 8 : 0;
    q.view = {q.weight.data() + last,
              c.density ? q.density.data() + last : nullptr,
              c.out_channels * c.in_channels * 9,
              c.in_channels * 9,
              9,
              c.flipped ? -1 : 1};
    q.packed = aligned(q.packed_store, kWinograd.packed_bytes(p));
    q.scratch = aligned(q.scratch_store, kWinograd.scratch_bytes(p));
    p.packed = q.packed;
}

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
        case Activation::softplus:
            return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)));
        default:
            return is_leaky_relu(activation) && x < 0 ? x * leaky_slope(activation) : x;
    }
}

double expected(const Case& c, const Problem& q, int64_t n, int64_t y, int64_t x, int64_t o) {
    const ConvParams& p = q.p;
    const int64_t group = o / c.out_channels;
    double sum = c.bias ? q.bias[static_cast<size_t>(o)] : 0.0;
    for (int tap = 0; tap < 9; ++tap) {
        const int64_t iy = y - c.pad + tap / 3, ix = x - c.pad + tap % 3;
        if (iy < 0 || iy >= c.height || ix < 0 || ix >= c.width) continue;
        const double factor = q.view.density ? static_cast<const float*>(q.view.density)[tap * q.view.tap_stride] : 1.0;
        const float* in = q.input.data() + n * p.in_batch_stride + iy * p.axis[1].in_stride + ix * p.axis[2].in_stride +
                          group * c.in_channels;
        const float* w = static_cast<const float*>(q.view.weight) + o * q.view.out_stride + tap * q.view.tap_stride;
        for (int64_t i = 0; i < c.in_channels; ++i) sum += factor * w[i * q.view.in_stride] * in[i];
    }
    return activate_exactly(sum, c.activation);
}

// Largest error over largest value; infinite where the kernel wrote what is not its own or left a hole.
double error_of(const Case& c, const Problem& q) {
    const ConvParams& p = q.p;
    const int64_t filters = c.groups * c.out_channels, pixel = p.axis[2].out_stride;
    double worst = 0, largest = 1e-30;
    for (int64_t at = 0; at < static_cast<int64_t>(q.output.size()); ++at) {
        const int64_t o = at % pixel, place = at / pixel, x = place % p.axis[2].out_size;
        const float got = q.output[static_cast<size_t>(at)];
        if (o >= filters) {
            if (!std::isnan(got)) return std::numeric_limits<double>::infinity();
            continue;
        }
        const int64_t y = place / p.axis[2].out_size % p.axis[1].out_size;
        const int64_t n = place / p.axis[2].out_size / p.axis[1].out_size;
        double want = expected(c, q, n, y, x, o);
        if (c.residual) want += q.residual[static_cast<size_t>(at)];
        if (!(std::fabs(got - want) <= 1e30)) return std::numeric_limits<double>::infinity();
        worst = std::max(worst, std::fabs(got - want));
        largest = std::max(largest, std::fabs(want));
    }
    return worst / largest;
}

// Every item on its own with poisoned scratch, last first: the result may not depend on the split.
bool split_changes_result(Problem& q) {
    const std::vector<float> whole = q.output;
    std::fill(q.output.begin(), q.output.end(), std::numeric_limits<float>::quiet_NaN());
    for (int64_t item = kWinograd.items(q.p) - 1; item >= 0; --item) {
        std::memset(q.scratch, 0x7f, static_cast<size_t>(kWinograd.scratch_bytes(q.p)));
        kWinograd.run(q.p, item, item + 1, q.scratch);
    }
    return !whole.empty() && std::memcmp(whole.data(), q.output.data(), whole.size() * sizeof(float)) != 0;
}

int check() {
    int failures = 0;
    for (const Case& c : kCases) {
        Problem q;
        build(c, q);
        const char* reason = kWinograd.unsupported(q.p);
        if (reason) {
            std::printf("FAIL %-40s refused: %s\n", c.why, reason);
            ++failures;
            continue;
        }
        kWinograd.pack(q.p, q.view, q.packed, 0, kWinograd.pack_items(q.p));
        kWinograd.run(q.p, 0, kWinograd.items(q.p), q.scratch);
        const double error = error_of(c, q);
        const bool split = split_changes_result(q);
        const bool fine = error <= 2e-5 && !split;
        failures += !fine;
        const char* note = split ? ", depends on the split" : "";
        std::printf("%s %-40s error %.2e%s\n", fine ? "ok  " : "FAIL", c.why, error, note);
    }
    std::printf("width %d: %d of %zu failed\n", kWidth, failures, sizeof kCases / sizeof kCases[0]);
    return failures != 0;
}

double thread_milliseconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return 1e3 * static_cast<double>(now.tv_sec) + 1e-6 * static_cast<double>(now.tv_nsec);
}

template <class Body>
void measure(const char* what, int repeats, double gflop, const Body& body) {
    std::vector<double> times;
    for (int i = 0; i < repeats; ++i) {
        const double start = thread_milliseconds();
        body();
        times.push_back(thread_milliseconds() - start);
    }
    std::sort(times.begin(), times.end());
    std::printf("%-10s best %8.3f ms, median %8.3f ms, %7.1f GFLOP/s as a direct convolution\n", what, times[0],
                times[times.size() / 2], gflop / (times[0] * 1e-3));
}

int time_layer(int64_t in, int64_t out, int64_t height, int64_t width, int repeats) {
    const Case c = {"timing", 1, 1, in, out, height, width, 1, Activation::relu, true, false, true, false, 0};
    Problem q;
    build(c, q);
    const double gflop = 2e-9 * 9 * static_cast<double>(in * out * height * width);
    measure("pack", repeats, gflop, [&] { kWinograd.pack(q.p, q.view, q.packed, 0, kWinograd.pack_items(q.p)); });
    measure("run", repeats, gflop, [&] { kWinograd.run(q.p, 0, kWinograd.items(q.p), q.scratch); });
    const WinogradPlan plan = winograd_plan(q.p);
    float* v = reinterpret_cast<float*>(q.scratch);
    float* m = v + kWinogradPoints * plan.v_step;
    const auto each_block = [&](const auto& body) {
        for (int64_t b = 0; b < plan.blocks; ++b) {
            const int64_t first = b * plan.tiles / plan.blocks;
            body(first, (b + 1) * plan.tiles / plan.blocks - first);
        }
    };
    measure("input", repeats, gflop,
            [&] { each_block([&](int64_t first, int64_t count) { winograd_input(q.p, plan, 0, first, count, v); }); });
    measure("products", repeats, gflop, [&] {
        each_block([&](int64_t, int64_t count) {
            for (int64_t column = 0; column < plan.columns; ++column) {
                winograd_products(q.p, plan, v, reinterpret_cast<float*>(q.packed) + column * plan.column_floats,
                                  winograd_column_vectors(q.p, column), count, m, {nullptr, 0});
            }
        });
    });
    measure("output", repeats, gflop, [&] {
        each_block([&](int64_t first, int64_t count) {
            for (int64_t column = 0; column < plan.columns; ++column) {
                winograd_output(q.p, plan, m, 0, column, winograd_column_vectors(q.p, column), first, count);
            }
        });
    });
    const auto number = [](int64_t x) { return static_cast<long long>(x); };
    std::printf("%lld blocks of up to %lld tiles, scratch %lld KiB, packed %lld KiB\n", number(plan.blocks),
                number(plan.block), number(kWinograd.scratch_bytes(q.p) / 1024),
                number(kWinograd.packed_bytes(q.p) / 1024));
    return 0;
}

}  // namespace

int main(int count, char** words) {
    if (count == 1) return check();
    if ((count == 6 || count == 7) && std::string(words[1]) == "time") {
        return time_layer(std::atoll(words[2]), std::atoll(words[3]), std::atoll(words[4]), std::atoll(words[5]),
                          count == 7 ? std::max(1, std::atoi(words[6])) : 15);
    }
    std::fprintf(stderr, "usage: %s | %s time IN OUT HEIGHT WIDTH [REPEATS]\n", words[0], words[0]);
    return 2;
}
