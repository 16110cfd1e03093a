// Stand-alone check and timing of csrc/ode_stage, without torch:
//   g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno [ISA flags] tests/native/ode_stage_harness.cpp
//   ./a.out                              all cases against double precision; exit 1 on a failure
//   ./a.out time CHANNELS PIXELS SLOPES  best microseconds of a stage (float32, one thread): combine, fold, normalise
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "../../csrc/ode_stage/gradient.inl"
#include "../../csrc/ode_stage/stage.inl"
#include "aligned.h"

using namespace pdn;
using namespace pdn::ode_stage;

namespace {

struct Case {
    const char* why;
    DType dtype;
    int64_t batch, pixels, channels;
    int slopes;
    bool second = false, film = false, plane = false, keep = false, output = true;
    float drift = 0, mean = 0;
};

const Case kCases[] = {
    {"one vector", DType::float32, 2, 16, 16, 2},
    {"shorter than a vector", DType::float32, 2, 37, 3, 1},
    {"vectors and a rest", DType::float32, 1, 51, 67, 3},
    {"no slopes", DType::float32, 2, 40, 20, 0},
    {"four slopes", DType::float32, 1, 33, 18, 4},
    {"chunks", DType::float32, 1, 4000, 32, 3},
    {"the most chunks", DType::float32, 1, 70000, 16, 1},
    {"film and plane", DType::float32, 2, 30, 21, 2, false, true, true},
    {"kept", DType::float32, 2, 30, 17, 2, false, false, true, true},
    {"halves", DType::float32, 2, 45, 26, 3, true, true, true, false, true, 0.5f},
    {"halves, kept", DType::float32, 1, 45, 32, 2, true, false, false, true, true, 1.f},
    {"a half that only moves", DType::float32, 1, 20, 6, 0, true, false, false, false, true, 0.25f},
    {"the point only", DType::float32, 2, 21, 35, 4, false, false, false, true, false},
    {"the point only, halves", DType::bfloat16, 2, 21, 34, 3, true, false, false, true, false, 1.f},
    {"bfloat16", DType::bfloat16, 2, 50, 33, 2, false, true, true},
    {"float16", DType::float16, 2, 50, 19, 3, false, false, false, true},
    {"a mean far from 0", DType::float32, 1, 300, 16, 1, false, false, false, false, true, 0, 1000.f},
    {"one pixel", DType::float32, 2, 1, 9, 1, false, true},
};

size_t bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Elements of any type, and what they hold as doubles.
struct Image {
    Values<char> memory;
    DType dtype = DType::float32;

    void make(int64_t count, DType type) {
        dtype = type;
        memory.assign(static_cast<size_t>(count) * bytes_of(type), static_cast<char>(0xff));  // NaN
    }
    void draw(int64_t count, DType type, float mean, std::mt19937& generator) {
        make(count, type);
        std::normal_distribution<float> normal(mean, 1.f);
        for (int64_t i = 0; i < count; ++i) set(i, normal(generator));
    }
    void set(int64_t i, float x) {
        void* at = memory.data() + static_cast<size_t>(i) * bytes_of(dtype);
        if (dtype == DType::float32) put(static_cast<float*>(at), x);
        if (dtype == DType::bfloat16) put(static_cast<bf16*>(at), x);
        if (dtype == DType::float16) put(static_cast<fp16*>(at), x);
    }
    double at(int64_t i) const {
        const void* p = memory.data() + static_cast<size_t>(i) * bytes_of(dtype);
        if (dtype == DType::float32) return *static_cast<const float*>(p);
        if (dtype == DType::bfloat16) return from_bf16(*static_cast<const bf16*>(p));
        return from_fp16(*static_cast<const fp16*>(p));
    }
    void* data() { return memory.data(); }
};

struct Problem {
    Image state, slope[kMostSlopes], point, output, grad, beside, grad_point;
    Values<float> film, moments, grad_film;
    StageParams p{};
    GradParams g{};

    explicit Problem(const Case& c) {
        std::mt19937 generator(3);
        const int64_t count = c.batch * c.pixels * c.channels, width = c.channels + c.plane;
        state.draw(count, c.dtype, c.mean, generator);
        for (int i = 0; i < c.slopes; ++i) slope[i].draw(c.second ? count / 2 : count, c.dtype, 0, generator);
        point.make(count, c.dtype);
        output.make(c.batch * c.pixels * width, c.dtype);
        std::normal_distribution<float> normal(0, 0.5f);
        if (c.film)
            for (int64_t i = 0; i < 2 * c.batch * c.channels; ++i) film.push_back(normal(generator));
        moments.assign(static_cast<size_t>(2 * c.batch * c.channels), std::numeric_limits<float>::quiet_NaN());
        p.dtype = c.dtype, p.batch = c.batch, p.pixels = c.pixels, p.channels = c.channels, p.slopes = c.slopes;
        p.slope_channels = c.second ? c.channels / 2 : c.channels;
        p.state = state.data();
        for (int i = 0; i < c.slopes; ++i) p.slope[i] = slope[i].data();
        p.parts = c.second ? 2 : 1;
        for (int i = 0; i < p.parts; ++i) {
            const float weights[2][kMostSlopes] = {{0.75f, -0.5f, 0.25f, 1.5f}, {0.125f, 0.5f, -0.375f, 0.f}};
            p.part[i].first = i * p.slope_channels, p.part[i].channels = p.slope_channels;
            p.part[i].drift = c.second && i == 0 ? c.drift : 0.f;
            std::memcpy(p.part[i].weight, weights[i], sizeof weights[i]);
        }
        p.eps = 1e-5, p.film = c.film ? film.data() : nullptr, p.has_plane = c.plane, p.plane = 0.625f;
        p.point = c.keep ? point.data() : nullptr, p.output = c.output ? output.data() : nullptr;
        p.moments = moments.data();
        grad.draw(c.batch * c.pixels * width, c.dtype, 0.5f, generator);
        beside.draw(count, c.dtype, 0, generator);
        grad_point.make(count, c.dtype);
        grad_film.assign(static_cast<size_t>(2 * c.batch * c.channels), std::numeric_limits<float>::quiet_NaN());
        g = {c.dtype,
             c.batch,
             c.pixels,
             c.channels,
             width,
             grad.data(),
             nullptr,
             moments.data(),
             p.film,
             c.keep ? beside.data() : nullptr,
             grad_point.data(),
             c.film ? grad_film.data() : nullptr};
    }

    double point_at(int64_t image, int64_t pixel, int64_t channel) const {
        const Part& part = p.part[p.parts > 1 && channel >= p.slope_channels];
        const int64_t row = image * p.pixels + pixel, at = row * p.channels + channel;
        double v = state.at(at);
        if (part.drift != 0.f) v += static_cast<double>(part.drift) * state.at(at + part.channels);
        for (int i = 0; i < p.slopes; ++i)
            v += static_cast<double>(part.weight[i]) * slope[i].at(row * p.slope_channels + channel - part.first);
        return v;
    }
};

// All chunks of both passes; `backwards` in the other order, which may change nothing.
void run_stage(const StageParams& p, bool backwards) {
    const int64_t chunk = chunk_pixels(p.pixels, p.channels), chunks = (p.pixels + chunk - 1) / chunk;
    const auto at = [&](int64_t i) { return backwards ? chunks - 1 - i : i; };
    Values<float> partials(static_cast<size_t>(chunks * stage_partial(p.channels)), 1e30f);
    Values<float> coefficients(static_cast<size_t>(stage_coefficients(p.channels)), 1e30f);
    for (int64_t image = 0; image < p.batch; ++image) {
        for (int64_t i = 0; i < chunks; ++i)
            combine(p, image, at(i), p.output ? partials.data() + at(i) * stage_partial(p.channels) : nullptr);
        if (p.output == nullptr) continue;
        fold(p, image, partials.data(), coefficients.data());
        for (int64_t i = 0; i < chunks; ++i) normalise(p, image, at(i), coefficients.data());
    }
}

void run_gradient(const GradParams& g, bool backwards) {
    const int64_t chunk = chunk_pixels(g.pixels, g.channels), chunks = (g.pixels + chunk - 1) / chunk;
    const auto at = [&](int64_t i) { return backwards ? chunks - 1 - i : i; };
    Values<float> partials(static_cast<size_t>(chunks * stage_partial(g.channels)), 1e30f);
    Values<float> coefficients(static_cast<size_t>(stage_coefficients(g.channels)), 1e30f);
    for (int64_t image = 0; image < g.batch; ++image) {
        for (int64_t i = 0; i < chunks; ++i)
            grad_sums(g, image, at(i), partials.data() + at(i) * stage_partial(g.channels));
        grad_fold(g, image, partials.data(), coefficients.data());
        for (int64_t i = 0; i < chunks; ++i) grad_write(g, image, at(i), coefficients.data());
    }
}

struct Error {
    double worst = 0;
    void add(double got, double exact, double tolerance, double scale) {
        const double off = std::fabs(got - exact) / (tolerance * (scale + std::fabs(exact)));
        if (!(off <= worst)) worst = off != off ? 1e9 : off;
    }
};

// The largest errors of stage and gradient, in units of what is allowed.
void check(const Case& c, double& stage_error, double& grad_error) {
    Problem q(c), again(c);
    run_stage(q.p, false);
    run_stage(again.p, true);
    Error stage, gradient;
    if (q.output.memory != again.output.memory || (c.keep && q.point.memory != again.point.memory)) stage.worst = 1e9;
    const double own = c.dtype == DType::float32 ? 1e-6 : c.dtype == DType::bfloat16 ? 1e-2 : 2e-3;
    Image point;  // as the kernels see it
    point.make(c.batch * c.pixels * c.channels, c.dtype);
    for (int64_t n = 0; n < c.batch; ++n)
        for (int64_t i = 0; i < c.pixels; ++i)
            for (int64_t k = 0; k < c.channels; ++k)
                point.set((n * c.pixels + i) * c.channels + k, static_cast<float>(q.point_at(n, i, k)));
    q.g.point = point.data();
    if (c.output) run_gradient(q.g, false);
    for (int64_t n = 0; n < c.batch; ++n) {
        for (int64_t k = 0; k < c.channels; ++k) {
            const auto at = [&](int64_t i) { return (n * c.pixels + i) * c.channels + k; };
            double mean = 0, squares = 0;
            for (int64_t i = 0; i < c.pixels; ++i) mean += q.point_at(n, i, k) / static_cast<double>(c.pixels);
            for (int64_t i = 0; i < c.pixels; ++i) squares += std::pow(q.point_at(n, i, k) - mean, 2);
            const double inverse = 1 / std::sqrt(squares / static_cast<double>(c.pixels) + 1e-5);
            const auto f = static_cast<size_t>(n * 2 * c.channels + k), shift = f + static_cast<size_t>(c.channels);
            const double gain = c.film ? 1.0 + q.film[f] : 1.0, offset = c.film ? q.film[shift] : 0.0;
            const double noise = 1 + std::fabs(mean) * inverse * 0.1;  // the point is rounded before the mean is taken
            for (int64_t i = 0; i < c.pixels; ++i) {
                if (c.keep) stage.add(q.point.at(at(i)), q.point_at(n, i, k), own, 1);
                if (!c.output) continue;
                const double x = (q.point_at(n, i, k) - mean) * inverse;
                const int64_t row = (n * c.pixels + i) * (c.channels + c.plane);
                stage.add(q.output.at(row + k), x * gain + offset, own, 3 * noise);
                if (c.plane) stage.add(q.output.at(row + c.channels), 0.625, 1e-12, 1);
            }
            if (!c.output) continue;
            // from the moments that the stage wrote, which are checked by its output
            const double m = q.moments[f], r = q.moments[shift], pixels = static_cast<double>(c.pixels);
            double sum = 0, product = 0;
            const auto x = [&](int64_t i) { return (point.at(at(i)) - m) * r; };
            const auto g = [&](int64_t i) { return q.grad.at((n * c.pixels + i) * (c.channels + c.plane) + k); };
            for (int64_t i = 0; i < c.pixels; ++i) sum += g(i), product += g(i) * x(i);
            for (int64_t i = 0; i < c.pixels; ++i) {
                const double beside = c.keep ? q.beside.at(at(i)) : 0.0;
                const double d = gain * r * (g(i) - sum / pixels - x(i) * product / pixels) + beside;
                gradient.add(q.grad_point.at(at(i)), d, own, 3 * std::fabs(gain * r) * noise + 1);
            }
            if (c.film) {
                gradient.add(q.grad_film[f], product, 1e-5, pixels);
                gradient.add(q.grad_film[shift], sum, 1e-5, pixels);
            }
        }
    }
    stage_error = stage.worst, grad_error = gradient.worst;
}

double now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

void measure(int64_t channels, int64_t pixels, int slopes) {
    Case c{"", DType::float32, 1, pixels, channels, slopes};
    Problem q(c);
    double best[2] = {1, 1};
    q.g.point = q.state.data();
    for (int i = 0; i < 300; ++i) {
        const double start = now();
        run_stage(q.p, false);
        const double middle = now();
        run_gradient(q.g, false);
        best[0] = std::min(best[0], middle - start), best[1] = std::min(best[1], now() - middle);
    }
    std::printf("stage %.1f us, gradient %.1f us\n", 1e6 * best[0], 1e6 * best[1]);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 4 && std::string(argv[1]) == "time") {
        measure(std::atoll(argv[2]), std::atoll(argv[3]), std::atoi(argv[4]));
        return 0;
    }
    bool failed = false;
    for (const Case& c : kCases) {
        double stage = 0, gradient = 0;
        check(c, stage, gradient);
        const bool wrong = stage > 1 || gradient > 1;
        failed = failed || wrong;
        std::printf("%-8s %s: stage %.3f, gradient %.3f of what is allowed\n", wrong ? "FAILED" : "ok", c.why, stage,
                    gradient);
    }
    return failed ? 1 : 0;
}
