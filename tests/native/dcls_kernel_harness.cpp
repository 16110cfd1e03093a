// Stand-alone check and timing of csrc/dcls_kernel, without torch:
//   g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno [ISA flags] tests/native/dcls_kernel_harness.cpp
//   ./a.out                                       all cases against double precision; exit 1 on a failure
//   ./a.out time PAIRS COMPONENTS SIZE [HATS]     best microseconds of SIZE x SIZE kernels and their gradients
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "../../csrc/dcls_kernel/kernel.inl"
#include "aligned.h"
#include "clock.h"

using namespace pdn;
using namespace pdn::dcls_kernel;

namespace {

struct Case {
    const char* why;
    int64_t size[3];  // 0: no such axis
    int64_t pairs, components;
    bool gauss = true, normalized = true, widths = true;
    float reach = 1;
};

const Case kCases[] = {
    {"two axes", {0, 7, 7}, 20, 5},
    {"two axes, more than a chunk", {0, 17, 17}, 35, 34},
    {"hats", {0, 7, 9}, 20, 5, false, true, false},
    {"hats of any width", {0, 4, 6}, 3, 9, false, true, true},
    {"not normalised", {0, 5, 5}, 17, 3, false, false, false},
    {"one axis", {0, 0, 25}, 33, 3},
    {"one axis, hats", {0, 0, 6}, 5, 20, false, true, false},
    {"three axes", {5, 4, 3}, 18, 7},
    {"three axes, hats", {3, 5, 7}, 2, 9, false, false, true},
    {"three axes, the first of one tap", {1, 6, 5}, 4, 3},
    {"one tap, one pair", {0, 1, 1}, 1, 1},
    {"outside", {0, 7, 7}, 20, 4, true, true, true, 2.5},
};

struct Problem {
    Case c;
    Params p{};
    int64_t taps = 1;
    Values<float> weight, position[3], width[3], kernel, grad, weight_grad, position_grad[3], width_grad[3];

    explicit Problem(const Case& given) : c(given) {
        std::mt19937 generator(7);
        std::normal_distribution<float> normal;
        std::uniform_real_distribution<float> uniform(-1, 1);
        const auto count = static_cast<size_t>(c.pairs * c.components);
        p.gauss = c.gauss, p.normalized = c.normalized, p.spread = c.gauss ? 0.27f : 1.f;
        p.pairs = c.pairs, p.components = c.components;
        weight.resize(count), weight_grad.assign(count, NAN);
        for (float& x : weight) x = normal(generator);
        p.weight = weight.data(), p.weight_grad = weight_grad.data();
        for (int a = 0; a < 3; ++a) {
            Axis& axis = p.axis[a];
            axis = {1, 0, nullptr, nullptr, nullptr, nullptr};
            if (c.size[a] == 0) continue;
            axis.size = c.size[a], axis.centre = c.size[a] / 2, taps *= c.size[a];
            position[a].resize(count), position_grad[a].assign(count, NAN);
            for (float& x : position[a]) x = c.reach * 0.5f * static_cast<float>(c.size[a]) * uniform(generator);
            axis.position = position[a].data(), axis.position_grad = position_grad[a].data();
            if (!c.widths) continue;
            width[a].resize(count), width_grad[a].assign(count, NAN);
            for (float& x : width[a]) x = 0.4f * normal(generator);
            axis.width = width[a].data(), axis.width_grad = width_grad[a].data();
        }
        kernel.assign(static_cast<size_t>(c.pairs * taps), NAN), grad.resize(kernel.size());
        for (float& x : grad) x = normal(generator);
        p.kernel = kernel.data(), p.grad = grad.data();
    }

    void run(void (*body)(const Params&, int64_t, float*)) {
        Values<float> scratch(static_cast<size_t>(scratch_bytes(p)) / sizeof(float));
        for (int64_t item = (c.pairs + kWidth - 1) / kWidth; item-- > 0;) body(p, item, scratch.data());
    }

    double factor(int a, size_t at, int64_t tap, double moved, double widened) const {
        if (p.axis[a].position == nullptr) return 1;
        const double w = (c.widths ? std::fabs(width[a][at]) : 0.) + p.spread + widened;
        const double d = static_cast<double>(tap - p.axis[a].centre) - (position[a][at] + moved);
        return c.gauss ? std::exp(-0.5 * d * d / (w * w)) : std::max(0., w - std::fabs(d));
    }

    // The component `at` at every tap, times its weight, with axis `along` moved and widened.
    std::vector<double> shape(size_t at, double scale, int along = -1, double moved = 0, double widened = 0) const {
        std::vector<double> values;
        double mass = 0;
        for (int64_t z = 0; z < p.axis[0].size; ++z)
            for (int64_t y = 0; y < p.axis[1].size; ++y)
                for (int64_t x = 0; x < p.axis[2].size; ++x) {
                    const int64_t tap[3] = {z, y, x};
                    double value = 1;
                    for (int a = 0; a < 3; ++a)
                        value *= factor(a, at, tap[a], a == along ? moved : 0, a == along ? widened : 0);
                    values.push_back(value);
                    mass += value;
                }
        for (double& value : values) value *= scale / (c.normalized ? mass + 1e-7 : 1);
        return values;
    }

    double product_with_grad(const std::vector<double>& values, int64_t pair) const {
        double sum = 0;
        for (int64_t t = 0; t < taps; ++t)
            sum += values[static_cast<size_t>(t)] * grad[static_cast<size_t>(pair * taps + t)];
        return sum;
    }
};

// The largest error over the largest value.
struct Error {
    double worst = 0, largest = 1;
    void add(double got, double exact) {
        worst = std::max(worst, got == got ? std::fabs(got - exact) : INFINITY);
        largest = std::max(largest, std::fabs(exact));
    }
    double relative() const { return worst / largest; }
};

bool check(const Case& c) {
    Problem problem(c);
    problem.run(forward);
    problem.run(backward);
    Error kernel, weight, position, width;
    const double step = 1e-5;
    for (int64_t pair = 0; pair < c.pairs; ++pair) {
        std::vector<double> exact(static_cast<size_t>(problem.taps));
        for (int64_t i = 0; i < c.components; ++i) {
            const auto at = static_cast<size_t>(pair * c.components + i);
            const double w = problem.weight[at];
            const std::vector<double> values = problem.shape(at, 1);
            for (size_t t = 0; t < exact.size(); ++t) exact[t] += w * values[t];
            weight.add(problem.weight_grad[at], problem.product_with_grad(values, pair));
            for (int a = 0; a < 3; ++a) {
                if (c.size[a] == 0) continue;
                const auto slope = [&](double moved, double widened) {
                    const double above = problem.product_with_grad(problem.shape(at, w, a, moved, widened), pair);
                    return (above - problem.product_with_grad(problem.shape(at, w, a, -moved, -widened), pair)) /
                           (2 * step);
                };
                position.add(problem.position_grad[a][at], slope(step, 0));
                if (c.widths)
                    width.add(problem.width_grad[a][at], slope(0, step) * (problem.width[a][at] < 0 ? -1 : 1));
            }
        }
        for (size_t t = 0; t < exact.size(); ++t)
            kernel.add(problem.kernel[static_cast<size_t>(pair * problem.taps) + t], exact[t]);
    }
    const bool right =
        kernel.relative() < 2e-6 && weight.relative() < 2e-6 && position.relative() < 2e-5 && width.relative() < 2e-5;
    std::printf("%-36s %s  kernel %.1e, gradients of weights %.1e, positions %.1e, widths %.1e\n", c.why,
                right ? "ok " : "BAD", kernel.relative(), weight.relative(), position.relative(), width.relative());
    return right;
}

void measure(const Case& c) {
    Problem problem(c);
    double best[2] = {1e30, 1e30};
    for (int i = 0; i < 50; ++i)
        for (int which = 0; which < 2; ++which) {
            const double begin = now();
            problem.run(which == 0 ? forward : backward);
            best[which] = std::min(best[which], now() - begin);
        }
    std::printf("forward %.1f us, backward %.1f us, %d lanes\n", best[0], best[1], kWidth);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 4 && std::string(argv[1]) == "time") {
        const int64_t size = std::atoll(argv[4]);
        Case c = {"time", {0, size, size}, std::atoll(argv[2]), std::atoll(argv[3])};
        if (argc > 5) c.gauss = c.widths = false;
        measure(c);
        return 0;
    }
    bool right = true;
    for (const Case& c : kCases) right = check(c) && right;
    return right ? 0 : 1;
}
