// Stand-alone check and timing of csrc/adaptive_bilateral_filter, without torch:
//   g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno [ISA flags]
//   tests/native/adaptive_bilateral_filter_harness.cpp
//   ./a.out                               all cases against double precision; exit 1 on a failure
//   ./a.out time HEIGHT WIDTH CHANNELS RADIUS [TILE]   best milliseconds of each pass, one thread
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/adaptive_bilateral_filter/backward.inl"
#include "../../csrc/adaptive_bilateral_filter/forward.inl"
#include "aligned.h"

using namespace pdn;
using namespace pdn::adaptive_bilateral_filter;

namespace {

struct Case {
    const char* why;
    int64_t batch, channels, height, width, tile_height, tile_width, radius;
    std::vector<int64_t> rows, columns;  // where blocks begin
    DType dtype = DType::float32;
    bool interleaved = false;  // channels are the innermost axis
};

const Case kCases[] = {
    {"tiles", 1, 1, 16, 24, 8, 8, 2, {0}, {0}},
    {"a sigma for every pixel", 1, 1, 7, 19, 1, 1, 3, {0, 3}, {0}},
    {"blocks", 2, 1, 24, 80, 4, 8, 5, {0, 8, 20}, {0, 24, 56}},
    {"two channels", 1, 2, 9, 33, 3, 11, 2, {0}, {0}},
    {"colour", 1, 3, 16, 40, 8, 8, 4, {0, 8}, {0, 24}},
    {"colour, interleaved", 1, 3, 12, 21, 4, 7, 3, {0}, {0}, DType::float32, true},
    {"four channels", 1, 4, 6, 17, 6, 17, 1, {0}, {0}},
    {"many channels", 1, 7, 10, 18, 5, 6, 3, {0, 5}, {0, 6}},
    {"mirrored more than once", 1, 1, 4, 5, 2, 5, 9, {0, 2}, {0}},
    {"mirrored more than once, colour", 1, 3, 3, 2, 1, 1, 7, {0}, {0}},
    {"many channels mirrored more than once", 1, 5, 2, 3, 1, 1, 6, {0}, {0}},
    {"one row", 1, 1, 1, 40, 1, 8, 3, {0}, {0}},
    {"one pixel", 2, 3, 1, 1, 1, 1, 2, {0}, {0}},
    {"no neighbours", 1, 1, 5, 17, 5, 1, 0, {0}, {0}},
    {"bfloat16", 1, 1, 9, 37, 3, 37, 3, {0, 3}, {0}, DType::bfloat16},
    {"float16, colour", 1, 3, 8, 35, 4, 5, 2, {0}, {0, 15}, DType::float16, true},
};

// An image in memory that is exactly as long as it must be, so that sanitizers see what lies beyond.
struct Tensor {
    Case c;
    Values<float> floats;
    Values<uint16_t> halves;
    std::vector<double> exact;
    explicit Tensor(const Case& given) : c(given), exact(static_cast<size_t>(count())) {
        if (c.dtype == DType::float32)
            floats.assign(static_cast<size_t>(count()), NAN);
        else
            halves.assign(static_cast<size_t>(count()), 0x7fff);
    }
    int64_t count() const { return c.batch * c.channels * c.height * c.width; }
    Image image() {
        const int64_t plane = c.height * c.width;
        Image found{floats.empty() ? static_cast<void*>(halves.data()) : floats.data(),
                    {c.channels * plane, plane, c.width, 1}};
        if (c.interleaved) found.stride[1] = 1, found.stride[2] = c.width * c.channels, found.stride[3] = c.channels;
        return found;
    }
    size_t place(int64_t n, int64_t channel, int64_t y, int64_t x) {
        const Image i = image();
        return static_cast<size_t>(n * i.stride[0] + channel * i.stride[1] + y * i.stride[2] + x * i.stride[3]);
    }
    double at(int64_t n, int64_t channel, int64_t y, int64_t x) { return exact[place(n, channel, y, x)]; }
    double stored(size_t i) const {
        if (!floats.empty()) return floats[i];
        return c.dtype == DType::bfloat16 ? from_bf16(halves[i]) : from_fp16({halves[i]});
    }
    void set(size_t i, float value) {
        if (!floats.empty())
            floats[i] = value;
        else
            halves[i] = c.dtype == DType::bfloat16 ? to_bf16(value) : to_fp16(value).bits;
        exact[i] = stored(i);
    }
};

struct Problem {
    Case c;
    Params p{};
    Tensor input, output, grad, dinput;
    Values<float> sigma, norm, dsigma;
    std::vector<double> exact_norm, exact_dsigma;

    explicit Problem(const Case& given) : c(given), input(c), output(c), grad(c), dinput(c) {
        std::mt19937 generator(1);
        std::uniform_real_distribution<float> uniform(0, 1);
        for (size_t i = 0; i < input.exact.size(); ++i)
            input.set(i, uniform(generator)), grad.set(i, uniform(generator) - 0.5f);
        const int64_t tiles = c.batch * (c.height / c.tile_height) * (c.width / c.tile_width);
        for (int64_t i = 0; i < tiles; ++i) {
            sigma.push_back(0.6f + 2 * uniform(generator)), sigma.push_back(0.6f + 2 * uniform(generator));
            sigma.push_back(0.1f + uniform(generator) / 2);
        }
        dsigma.assign(sigma.size(), NAN), exact_dsigma.assign(sigma.size(), 0);
        norm.assign(static_cast<size_t>(c.batch * c.height * c.width), NAN), exact_norm.assign(norm.size(), 0);
        p.dtype = c.dtype, p.batch = c.batch, p.channels = c.channels, p.height = c.height, p.width = c.width;
        p.tile_height = c.tile_height, p.tile_width = c.tile_width, p.radius = c.radius;
        p.input = input.image(), p.output = output.image(), p.grad = grad.image(), p.dinput = dinput.image();
        p.sigma = sigma.data(), p.norm = norm.data(), p.dsigma = dsigma.data();
    }

    size_t tile(int64_t n, int64_t y, int64_t x) const {
        const int64_t down = c.height / c.tile_height, across = c.width / c.tile_width;
        return static_cast<size_t>(((n * down + y / c.tile_height) * across + x / c.tile_width) * 3);
    }

    // The formulas in double, scattering.
    void reference() {
        for (int64_t n = 0; n < c.batch; ++n)
            for (int64_t y = 0; y < c.height; ++y)
                for (int64_t x = 0; x < c.width; ++x) pixel(n, y, x);
    }

    void pixel(int64_t n, int64_t y, int64_t x) {
        const float* s = sigma.data() + tile(n, y, x);
        const int64_t r = c.radius;
        std::vector<double> weights, total(static_cast<size_t>(c.channels), 0);
        double sum = 1e-8;
        for (int64_t dy = -r; dy <= r; ++dy)
            for (int64_t dx = -r; dx <= r; ++dx) {
                const int64_t v = reflected(y + dy, c.height), u = reflected(x + dx, c.width);
                double distance = 0;
                for (int64_t k = 0; k < c.channels; ++k)
                    distance += std::pow(input.at(n, k, y, x) - input.at(n, k, v, u), 2);
                const double w = std::exp(-0.5 * (std::pow(dx / double(s[0]), 2) + std::pow(dy / double(s[1]), 2) +
                                                  distance / std::pow(double(s[2]), 2)));
                weights.push_back(w), sum += w;
                for (int64_t k = 0; k < c.channels; ++k) total[static_cast<size_t>(k)] += w * input.at(n, k, v, u);
            }
        exact_norm[static_cast<size_t>((n * c.height + y) * c.width + x)] = sum;
        for (int64_t k = 0; k < c.channels; ++k)
            output.exact[output.place(n, k, y, x)] = total[static_cast<size_t>(k)] / sum;
        const double* w = weights.data();
        double* ds = exact_dsigma.data() + tile(n, y, x);
        for (int64_t dy = -r; dy <= r; ++dy)
            for (int64_t dx = -r; dx <= r; ++dx, ++w) {
                const int64_t v = reflected(y + dy, c.height), u = reflected(x + dx, c.width);
                double a = 0, distance = 0;
                for (int64_t k = 0; k < c.channels; ++k) {
                    a += grad.at(n, k, y, x) * (input.at(n, k, v, u) - output.at(n, k, y, x));
                    distance += std::pow(input.at(n, k, y, x) - input.at(n, k, v, u), 2);
                }
                a *= *w / sum;
                ds[0] += a * double(dx * dx) / std::pow(s[0], 3), ds[1] += a * double(dy * dy) / std::pow(s[1], 3);
                ds[2] += a * distance / std::pow(s[2], 3);
                for (int64_t k = 0; k < c.channels; ++k) {
                    const double pull = a * (input.at(n, k, y, x) - input.at(n, k, v, u)) / (double(s[2]) * s[2]);
                    dinput.exact[dinput.place(n, k, y, x)] -= pull;
                    dinput.exact[dinput.place(n, k, v, u)] += *w / sum * grad.at(n, k, y, x) + pull;
                }
            }
    }

    template <class Kernel>
    void run(Kernel kernel, int64_t (*floats)(int64_t, int64_t, int64_t, int64_t)) {
        for (int64_t n = 0; n < c.batch; ++n)
            for (size_t i = 0; i < c.rows.size(); ++i)
                for (size_t j = 0; j < c.columns.size(); ++j) {
                    Block b{};
                    b.image = n, b.radius = c.radius, b.top = c.rows[i], b.left = c.columns[j];
                    b.bottom = i + 1 < c.rows.size() ? c.rows[i + 1] : c.height;
                    b.right = j + 1 < c.columns.size() ? c.columns[j + 1] : c.width;
                    b.cells = dsigma.data() + tile(n, b.top, b.left);
                    b.cell_height = c.tile_height, b.cell_width = c.tile_width;
                    b.cell_stride = c.width / c.tile_width * 3;
                    Values<float> scratch(
                        static_cast<size_t>(floats(c.channels, b.bottom - b.top, b.right - b.left, b.radius)), NAN);
                    kernel(p, b, scratch.data());
                }
    }
};

bool close(const char* why, const char* what, double got, double exact, double bound) {
    if (std::fabs(got - exact) <= bound) return true;
    std::printf("%s: %s is %.9g, expected %.9g\n", why, what, got, exact);
    return false;
}

bool check(const Case& c) {
    Problem problem(c);
    problem.reference();
    const double unit = c.dtype == DType::float32 ? 3e-6 : c.dtype == DType::float16 ? 2e-3 : 1.6e-2;
    problem.run(forward, forward_floats);
    bool good = true;
    for (size_t i = 0; good && i < problem.output.exact.size(); ++i)
        good = close(c.why, "output", problem.output.stored(i), problem.output.exact[i], unit);
    for (size_t i = 0; good && i < problem.norm.size(); ++i)
        good = close(c.why, "norm", problem.norm[i], problem.exact_norm[i], 3e-6 * problem.exact_norm[i]);
    for (size_t i = 0; i < problem.output.exact.size(); ++i)
        problem.output.set(i, static_cast<float>(problem.output.exact[i]));
    problem.run(backward, backward_floats);
    double inputs = 0, sigmas = 0;
    for (double v : problem.dinput.exact) inputs = std::max(inputs, std::fabs(v));
    for (double v : problem.exact_dsigma) sigmas = std::max(sigmas, std::fabs(v));
    for (size_t i = 0; good && i < problem.dinput.exact.size(); ++i)
        good = close(c.why, "gradient of input", problem.dinput.stored(i), problem.dinput.exact[i],
                     unit * std::max(1., inputs) * 2);
    for (size_t i = 0; good && i < problem.dsigma.size(); ++i)
        good = close(c.why, "gradient of sigma", problem.dsigma[i], problem.exact_dsigma[i],
                     unit * std::max(1., sigmas) * 4);
    Values<float> triples(3 * 77, 0.5f);
    for (size_t i = 0; i < triples.size(); ++i) triples[i] = static_cast<float>(i % 3 == 2 ? 1000 : i * 37 % 101);
    float widest = 0;
    for (size_t i = 0; i < triples.size(); ++i)
        if (i % 3 != 2) widest = std::max(widest, triples[i]);
    return good && close(c.why, "largest", largest(triples.data(), 77), widest, 0);
}

double now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

void measure(char** words, int count) {
    const int64_t height = std::atoll(words[0]), width = std::atoll(words[1]),
                  tile = count > 4 ? std::atoll(words[4]) : 8;
    Case c{"time", 1, std::atoll(words[2]), height, width, tile, tile, std::atoll(words[3]), {}, {}};
    for (int64_t y = 0; y + 16 <= height; y += 16) c.rows.push_back(y);
    for (int64_t x = 0; x + 128 <= width; x += 128) c.columns.push_back(x);
    Problem problem(c);
    const double taps = static_cast<double>(height * width * (2 * c.radius + 1) * (2 * c.radius + 1));
    for (int pass = 0; pass < 2; ++pass) {
        double best = 1e9;
        for (int i = 0; i < 15; ++i) {
            const double start = now();
            if (pass == 0)
                problem.run(forward, forward_floats);
            else
                problem.run(backward, backward_floats);
            best = std::min(best, now() - start);
        }
        std::printf("%s: %.3f ms, %.3f ns for each tap\n", pass ? "backward" : "forward", best * 1e3,
                    best * 1e9 / taps);
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 5 && std::strcmp(argv[1], "time") == 0) {
        measure(argv + 2, argc - 2);
        return 0;
    }
    int failed = 0;
    for (const Case& c : kCases) failed += !check(c);
    std::printf("%d of %zu cases failed, %d floats a vector\n", failed, std::size(kCases), kWidth);
    return failed != 0;
}
