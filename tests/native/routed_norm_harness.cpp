// The kernels of routed_norm against sums in double precision, without torch: every option and dtype, forward and
// backward, in memory that is exactly as long as it must be.
//   routed_norm_harness                          checks; exit status 1 if one fails
//   routed_norm_harness time TOKENS CHANNELS     best microseconds of a sample with mask and update, one thread
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/routed_norm/backward.inl"
#include "../../csrc/routed_norm/forward.inl"
#include "clock.h"

using namespace pdn;
using namespace pdn::routed_norm;

namespace {

struct Case {
    const char* why;
    DType dtype;
    int64_t batch, tokens, channels;
    int64_t outside = 0;  // channels that count as 0 beside those that are there
    bool masked = false, updated = false, shared = false;
};

const Case kCases[] = {
    {"plain", DType::float32, 2, 5, 33},
    {"a window's channels", DType::float32, 2, 70, 20, 9},
    {"masked", DType::float32, 2, 4, 50, 0, true},
    {"one mask for all", DType::float32, 3, 4, 17, 0, true, false, true},
    {"updated", DType::float32, 2, 67, 40, 0, false, true},
    {"everything", DType::float32, 2, 66, 37, 0, true, true},
    {"bfloat16", DType::bfloat16, 2, 9, 45, 0, true, true},
    {"float16", DType::float16, 2, 9, 5, 3, false, true},
    {"two channels", DType::float32, 2, 3, 2, 4, false, true},
};

uint16_t narrowed(float x, DType dtype) { return dtype == DType::bfloat16 ? to_bf16(x) : to_fp16(x).bits; }
float widened(uint16_t x, DType dtype) { return dtype == DType::bfloat16 ? from_bf16(x) : from_fp16({x}); }

// Numbers of a dtype, and the same as floats.
struct Numbers {
    DType dtype = DType::float32;
    std::vector<float> floats;
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
    double operator[](int64_t i) const {
        const auto place = static_cast<size_t>(i);
        return halves.empty() ? floats[place] : widened(halves[place], dtype);
    }
};

struct Problem {
    Case c;
    Params p{};
    GradParams g{};
    Numbers input, update, output, carried, grad, grad_carried, grad_input, grad_update;
    Numbers mask, gate, scale, shift, constant, stats, partials;
    std::vector<float> scratch;

    explicit Problem(const Case& given) : c(given) {
        const int64_t rows = c.batch * c.tokens, count = rows * c.channels, sample = c.batch * c.channels;
        Numbers* wide[] = {&input, &update, &output, &carried, &grad, &grad_carried, &grad_input, &grad_update};
        for (unsigned i = 0; i < 8; ++i) wide[i]->draw(c.dtype, count, i + 1);
        Numbers* narrow[] = {&mask, &gate, &scale, &shift};
        for (unsigned i = 0; i < 4; ++i) narrow[i]->draw(DType::float32, sample, i + 20);
        for (float& m : mask.floats) m = m > -0.5f ? 1.f : 0.f;
        constant.draw(DType::float32, rows, 30), stats.draw(DType::float32, 2 * rows, 31);
        partials.draw(DType::float32, c.batch * chunks_of(c.tokens) * 3 * c.channels, 32);
        scratch.assign(static_cast<size_t>(2 * (c.channels + kWidth - 1) / kWidth * kWidth + 2 * kWidth), NAN);
        p.dtype = c.dtype, p.batch = c.batch, p.tokens = c.tokens, p.channels = c.channels;
        p.total = c.channels + c.outside, p.eps = 1e-6;
        p.input = input.data(), p.input_batch = c.tokens * c.channels, p.input_token = c.channels;
        p.update_batch = p.input_batch, p.update_token = p.input_token;
        if (c.masked) p.mask = {mask.floats.data(), c.shared ? 0 : c.channels};
        if (c.updated) p.update = update.data(), p.gate = {gate.floats.data(), c.channels};
        p.scale = {scale.floats.data(), c.channels}, p.shift = {shift.floats.data(), c.channels};
        p.output = output.data(), p.carried = carried.data(), p.stats = stats.floats.data();
        g.forward = p, g.grad = grad.data(), g.constant = constant.floats.data();
        if (c.updated) g.carried = grad_carried.data();
        g.grad_input = grad_input.data(), g.grad_update = grad_update.data(), g.partials = partials.floats.data();
    }

    void run() { forward(p, 0, c.batch * c.tokens, scratch.data()); }
    void back() {
        for (int64_t b = 0; b < c.batch; ++b)
            for (int64_t chunk = 0; chunk < chunks_of(c.tokens); ++chunk) backward(g, b, chunk, scratch.data());
    }
};

bool check(const Case& c) {
    Problem problem(c);
    problem.run();
    problem.back();
    const Problem& q = problem;
    const double step = c.dtype == DType::float32 ? 1.2e-7 : c.dtype == DType::bfloat16 ? 7.9e-3 : 9.8e-4;
    double worst = 0;
    const auto note = [&](double got, double exact, double rounding, double scale) {
        worst = std::max(worst, std::fabs(got - exact) / (rounding * (std::fabs(exact) + scale)));
        if (got != got) worst = INFINITY;
    };
    const auto n = static_cast<double>(c.channels + c.outside);
    for (int64_t b = 0; b < c.batch; ++b) {
        std::vector<double> sums(static_cast<size_t>(3 * c.channels), 0.);
        for (int64_t t = 0; t < c.tokens; ++t) {
            const int64_t row = b * c.tokens + t;
            std::vector<double> r, hat, pushed;
            double mean = 0, square = 0, plain = q.constant[row], product = 0;
            for (int64_t k = 0; k < c.channels; ++k) {
                const int64_t at = row * c.channels + k, own = b * c.channels + k;
                const double mask = c.masked ? q.mask[c.shared ? k : own] : 1.;
                const double more = c.updated ? q.gate[own] * q.update[at] : 0.;
                r.push_back(mask * q.input[at] + more), mean += r.back() / n;
                if (c.updated) note(q.carried[at], q.input[at] + more, step, 1);
            }
            for (const double v : r) square += (v - mean) * (v - mean) / n;
            square += static_cast<double>(c.outside) * mean * mean / n;
            const double rstd = 1 / std::sqrt(square + 1e-6), constant = -mean * rstd;
            note(q.stats[2 * row], constant, 1.2e-7, 1 + rstd), note(q.stats[2 * row + 1], rstd, 1.2e-7, rstd);
            product = q.constant[row] * constant;
            for (int64_t k = 0; k < c.channels; ++k) {
                const int64_t at = row * c.channels + k, own = b * c.channels + k;
                const auto place = static_cast<size_t>(k);
                hat.push_back((r[place] - mean) * rstd);
                note(q.output[at], hat[place] * (1 + q.scale[own]) + q.shift[own], step, 1 + rstd);
                pushed.push_back(q.grad[at] * (1 + q.scale[own]));
                plain += pushed[place], product += pushed[place] * hat[place];
                sums[place] += q.grad[at];
                sums[static_cast<size_t>(c.channels + k)] += q.grad[at] * hat[place];
            }
            for (int64_t k = 0; k < c.channels; ++k) {
                const int64_t at = row * c.channels + k, own = b * c.channels + k;
                const auto place = static_cast<size_t>(k);
                const double d = rstd * (pushed[place] - plain / n - hat[place] * product / n);
                const double through = c.updated ? q.grad_carried[at] : 0.;
                const double mask = c.masked ? q.mask[c.shared ? k : own] : 1.;
                note(q.grad_input[at], mask * d + through, step, 4 * (1 + rstd));
                if (!c.updated) continue;
                note(q.grad_update[at], q.gate[own] * (d + through), step, 4 * (1 + rstd));
                sums[static_cast<size_t>(2 * c.channels + k)] += q.update[at] * (d + through);
            }
        }
        for (int64_t i = 0; i < 3 * c.channels; ++i) {
            double got = 0;
            for (int64_t chunk = 0; chunk < chunks_of(c.tokens); ++chunk)
                got += q.partials[(b * chunks_of(c.tokens) + chunk) * 3 * c.channels + i];
            note(got, sums[static_cast<size_t>(i)], 1.2e-7, 30);
        }
    }
    const bool right = worst < 6;
    std::printf("%-24s %s  %.2f roundings\n", c.why, right ? "ok " : "BAD", worst);
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
    const double stream = 4. * static_cast<double>(c.tokens * c.channels);
    std::printf("forward %.1f us, %.1f GB/s; backward %.1f us, %.1f GB/s\n", best[0], 4 * stream / best[0] * 1e-3,
                best[1], 6 * stream / best[1] * 1e-3);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 3 && std::string(argv[1]) == "time") {
        measure({"time", DType::float32, 1, std::atoll(argv[2]), std::atoll(argv[3]), 0, true, true});
        return 0;
    }
    bool right = true;
    for (const Case& c : kCases) right = check(c) && right;
    return right ? 0 : 1;
}
