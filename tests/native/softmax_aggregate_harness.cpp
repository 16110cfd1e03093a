// The kernels of softmax_aggregate against sums in double precision, without torch: every layout and dtype, forward and
// backward, in memory that is exactly as long as it must be.
//   softmax_aggregate_harness                              checks; exit status 1 if one fails
//   softmax_aggregate_harness time MAPS CHANNELS PIXELS [ROWS [PAST]]   best microseconds of a sample, one thread
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/softmax_aggregate/backward.inl"
#include "../../csrc/softmax_aggregate/forward.inl"
#include "aligned.h"
#include "clock.h"

using namespace pdn;
using namespace pdn::softmax_aggregate;

namespace {

struct Case {
    const char* why;
    DType dtype;
    int64_t maps, channels, depth, pixels;  // depth 0: the logits are given
    bool rows = false, hidden_rows = false;
    int64_t batch = 2;
    bool past_caches = false;
};

const Case kCases[] = {
    {"planes", DType::float32, 3, 21, 40, kPlaneTile + 33},
    {"planes, bfloat16", DType::bfloat16, 2, 8, 17, 65},
    {"planes, float16", DType::float16, 4, 5, 3, 7},
    {"one map", DType::float32, 1, 6, 9, 20},
    {"many maps", DType::float32, 9, 6, 9, 20},
    {"ready logits", DType::bfloat16, 3, 6, 0, 40},
    {"rows", DType::float32, 3, 50, 70, 37, true, true},
    {"rows, bfloat16", DType::bfloat16, 5, 33, 129, 40, true, true},
    {"rows, float16", DType::float16, 2, 7, 5, 3, true, true},
    {"rows, ready logits in rows", DType::float32, 3, 18, 0, 33, true, true},
    {"planes, hidden in rows", DType::float32, 3, 5, 20, 33, false, true},
    {"planes past the caches", DType::float32, 3, 6, 5, kPlaneTile + 64, false, false, 2, true},
    {"planes that are not aligned", DType::float32, 3, 5, 5, 41, false, false, 2, true},
    {"planes past the caches, bfloat16", DType::bfloat16, 3, 5, 5, 64, false, false, 2, true},
    {"rows past the caches", DType::float32, 3, 48, 5, 37, true, true, 2, true},
    {"rows that are not aligned", DType::float32, 3, 50, 5, 37, true, true, 2, true},
};

uint16_t narrowed(float x, DType dtype) { return dtype == DType::bfloat16 ? to_bf16(x) : to_fp16(x).bits; }
float widened(uint16_t x, DType dtype) { return dtype == DType::bfloat16 ? from_bf16(x) : from_fp16({x}); }

// Numbers of a dtype, and the same as floats.
struct Numbers {
    DType dtype;
    Values<float> floats;
    std::vector<uint16_t> halves;

    void draw(DType of, int64_t count, unsigned seed) {
        std::mt19937 generator(seed);
        std::normal_distribution<float> normal(0, 1);
        dtype = of, floats.resize(static_cast<size_t>(count));
        for (float& x : floats) {
            x = normal(generator);
            if (of == DType::float32) continue;
            halves.push_back(narrowed(x, of));
            x = widened(halves.back(), of);
        }
    }
    void* data() { return halves.empty() ? static_cast<void*>(floats.data()) : halves.data(); }
    double at(int64_t i) const {
        const auto place = static_cast<size_t>(i);
        return halves.empty() ? floats[place] : widened(halves[place], dtype);
    }
};

Strides strides_of(int64_t maps, int64_t channels, int64_t pixels, bool rows) {
    if (rows) return {maps * channels * pixels, channels * pixels, 1, channels};
    return {maps * channels * pixels, channels * pixels, pixels, 1};
}

int64_t place(const Strides& s, int64_t b, int64_t n, int64_t c, int64_t p) {
    return b * s.batch + n * s.map + c * s.channel + p * s.pixel;
}

struct Problem {
    Case c;
    Params p{};
    GradParams g{};
    Numbers features, hidden, out, grad, grad_features;
    Values<float> weight, shares, grad_shares, grad_logits, scratch;

    explicit Problem(const Case& given) : c(given) {
        const int64_t depth = c.depth ? c.depth : c.maps, count = c.batch * c.maps * c.pixels;
        features.draw(c.dtype, c.batch * c.maps * c.channels * c.pixels, 1);
        hidden.draw(c.dtype, c.batch * depth * c.pixels, 2);
        out.draw(c.dtype, c.batch * c.channels * c.pixels, 3), grad.draw(c.dtype, c.batch * c.channels * c.pixels, 4);
        grad_features.draw(c.dtype, c.batch * c.maps * c.channels * c.pixels, 5);
        Numbers random;
        random.draw(DType::float32, c.maps * depth, 6), weight = random.floats;
        for (float& w : weight) w /= std::sqrt(static_cast<float>(depth));
        random.draw(DType::float32, count, 7), grad_shares = random.floats;
        shares.assign(static_cast<size_t>(count), NAN), grad_logits = shares;
        scratch.assign(static_cast<size_t>(scratch_floats(c.maps)), NAN);
        p = {c.dtype,       c.batch, c.maps,  c.channels, c.pixels, depth,         features.data(), {},
             hidden.data(), {},      nullptr, out.data(), {},       shares.data(), c.past_caches};
        if (c.depth) p.weight = weight.data();
        p.features_at = strides_of(c.maps, c.channels, c.pixels, c.rows);
        p.hidden_at = strides_of(1, depth, c.pixels, c.hidden_rows);
        p.out_at = strides_of(1, c.channels, c.pixels, c.rows);
        g = {c.dtype,         c.batch,
             c.maps,          c.channels,
             c.pixels,        grad.data(),
             p.out_at,        grad_shares.data(),
             features.data(), p.features_at,
             shares.data(),   grad_features.data(),
             p.features_at,   grad_logits.data(),
             c.past_caches};
    }

    template <class Run>
    void each_tile(const Run& run) {
        const int64_t tile = tile_of(p.features_at);
        for (int64_t b = 0; b < c.batch; ++b)
            for (int64_t first = 0; first < c.pixels; first += tile)
                run(b, first, std::min(tile, c.pixels - first), scratch.data());
    }
    void run() {
        each_tile([&](int64_t b, int64_t first, int64_t count, float* s) { forward(p, b, first, count, s); });
    }
    void back() {
        each_tile([&](int64_t b, int64_t first, int64_t count, float* s) { backward(g, b, first, count, s); });
    }
};

bool check(const Case& c) {
    Problem problem(c);
    problem.run();
    problem.back();
    const Params& p = problem.p;
    const double step = c.dtype == DType::float32 ? 1.2e-7 : c.dtype == DType::bfloat16 ? 7.9e-3 : 9.8e-4;
    double worst = 0;
    const auto note = [&](double got, double exact, double rounding, double scale) {
        worst = std::max(worst, std::fabs(got - exact) / (rounding * (std::fabs(exact) + scale)));
        if (got != got) worst = INFINITY;
    };
    for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t i = 0; i < c.pixels; ++i) {
            std::vector<double> share, dots;
            double total = 0, mean = 0;
            for (int64_t n = 0; n < c.maps; ++n) {
                double logit = c.depth ? 0 : problem.hidden.at(place(p.hidden_at, b, 0, n, i));
                for (int64_t k = 0; k < c.depth; ++k)
                    logit += static_cast<double>(problem.weight[static_cast<size_t>(n * c.depth + k)]) *
                             problem.hidden.at(place(p.hidden_at, b, 0, k, i));
                share.push_back(std::exp(logit)), total += share.back();
            }
            for (int64_t n = 0; n < c.maps; ++n) {
                share[static_cast<size_t>(n)] /= total;
                const auto at = static_cast<size_t>((b * c.maps + n) * c.pixels + i);
                note(problem.shares[at], share[static_cast<size_t>(n)], 1.2e-7, 1);
                double dot = problem.grad_shares[at];
                for (int64_t k = 0; k < c.channels; ++k)
                    dot += problem.grad.at(place(p.out_at, b, 0, k, i)) *
                           problem.features.at(place(p.features_at, b, n, k, i));
                dots.push_back(dot), mean += dot * share[static_cast<size_t>(n)];
            }
            for (int64_t n = 0; n < c.maps; ++n) {
                const auto at = static_cast<size_t>((b * c.maps + n) * c.pixels + i);
                const double s = share[static_cast<size_t>(n)];
                note(problem.grad_logits[at], s * (dots[static_cast<size_t>(n)] - mean), 1.2e-7, 8);
                for (int64_t k = 0; k < c.channels; ++k)
                    note(problem.grad_features.at(place(p.features_at, b, n, k, i)),
                         s * problem.grad.at(place(p.out_at, b, 0, k, i)), step, 1);
            }
            for (int64_t k = 0; k < c.channels; ++k) {
                double sum = 0;
                for (int64_t n = 0; n < c.maps; ++n)
                    sum += share[static_cast<size_t>(n)] * problem.features.at(place(p.features_at, b, n, k, i));
                note(problem.out.at(place(p.out_at, b, 0, k, i)), sum, step, 1);
            }
        }
    const bool right = worst < 4;
    std::printf("%-34s %s  %.2f roundings\n", c.why, right ? "ok " : "BAD", worst);
    return right;
}

void measure(const Case& c) {
    Problem problem(c);
    double best[2] = {1e30, 1e30};
    for (int i = 0; i < 40; ++i) {
        const double begin = now();
        problem.run();
        const double middle = now();
        problem.back();
        best[0] = std::min(best[0], middle - begin), best[1] = std::min(best[1], now() - middle);
    }
    const double pixels = static_cast<double>(c.pixels), maps = static_cast<double>(c.maps * c.channels);
    const double forward = 4 * pixels * (maps + static_cast<double>(c.channels + c.depth));
    const double backward = 4 * pixels * (2 * maps + static_cast<double>(c.channels));
    std::printf("forward %.1f us, %.1f GB/s; backward %.1f us, %.1f GB/s\n", best[0], forward / best[0] * 1e-3, best[1],
                backward / best[1] * 1e-3);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 4 && std::string(argv[1]) == "time") {
        const bool rows = argc > 5 && std::atoi(argv[5]) != 0;
        measure({"time", DType::float32, std::atoll(argv[2]), std::atoll(argv[3]), 128, std::atoll(argv[4]), rows, rows,
                 1, argc > 6 && std::atoi(argv[6]) != 0});
        return 0;
    }
    bool right = true;
    for (const Case& c : kCases) right = check(c) && right;
    return right ? 0 : 1;
}
