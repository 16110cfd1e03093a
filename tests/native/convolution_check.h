// What the harnesses of single algorithms share: problems with any axis, a double-precision convolution, and a timer.
// Include after the kernels; compiled once per ISA level, without torch.
#pragma once

#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "aligned.h"

namespace check {

using namespace pdn;
using namespace pdn::weighted_conv;

// One spatial axis: out_size < 0 means what a convolution with `padding` on both sides gives.
struct Side {
    int64_t size, kernel, stride = 1, padding = 0, dilation = 1;
    int64_t taps = -1, tap = 0, tap_step = 1;  // a subset of the kernel, as in the gradient of a strided convolution
    bool backward = false;                     // taps walk towards lower positions
};

struct Case {
    const char* why;
    int64_t batch, groups, in_channels, out_channels;  // channels per group
    Side side[3];
    Activation activation = Activation::none;
    bool bias = true, residual = false, density = true, flipped = false;
    int64_t gap = 0;                // elements between pixels that belong to nobody
    const char* refused = nullptr;  // the word that the reason must hold, where the algorithm has to say no
};

constexpr Side kFlat = {1, 1};

inline double value_of(const Values<float>& data, int64_t at) { return data[static_cast<size_t>(at)]; }
inline double value_of(const Values<bf16>& data, int64_t at) { return from_bf16(data[static_cast<size_t>(at)]); }
inline void put(float& to, float value) { to = value; }
inline void put(bf16& to, float value) { to = to_bf16(value); }

template <class T>
struct Problem {
    ConvParams p{};
    WeightView view{};
    Values<T> input, weight, density, bias, residual, output;
    std::vector<char> packed_store, scratch_store;
    char *packed = nullptr, *scratch = nullptr;
    int64_t first_weight = 0;

    static char* aligned(std::vector<char>& store, int64_t bytes) {
        store.assign(static_cast<size_t>(bytes) + 64, 0x7f);
        return store.data() + (64 - reinterpret_cast<uintptr_t>(store.data()) % 64) % 64;
    }

    // Exactly as long as the tensor: a read past its end is a read past the allocation.
    static void fill(Values<T>& values, int64_t count, float scale, std::mt19937& generator) {
        std::normal_distribution<float> normal;
        Values<T>(static_cast<size_t>(std::max<int64_t>(count, 0))).swap(values);
        for (T& value : values) put(value, scale * normal(generator));
    }

    Problem(const Case& c, const Algorithm& algorithm) {
        std::mt19937 generator(11);
        const int64_t channels = c.groups * c.in_channels, filters = c.groups * c.out_channels;
        const int64_t in_pixel = channels + c.gap, out_pixel = filters + c.gap;
        int64_t in_stride = in_pixel, out_stride = out_pixel, taps = 1;
        for (int i = 2; i >= 0; --i) {
            const Side& s = c.side[i];
            const int64_t span = s.dilation * (s.kernel - 1) + 1, seen = s.taps < 0 ? s.kernel : s.taps;
            const int64_t out_size = std::max<int64_t>(0, (s.size + 2 * s.padding - span) / s.stride + 1);
            const int64_t offset = s.backward ? s.dilation * (s.kernel - 1) - s.padding : -s.padding;
            p.axis[i] = {s.size,     out_size, in_stride, out_stride,
                         out_stride, s.stride, offset,    s.backward ? -s.dilation : s.dilation,
                         s.kernel,   seen,     s.tap,     s.tap_step};
            in_stride *= s.size, out_stride *= out_size, taps *= s.kernel;
        }
        p.dtype = sizeof(T) == 4 ? DType::float32 : DType::bfloat16;
        p.activation = c.activation;
        p.batch = c.batch, p.groups = c.groups, p.in_channels = c.in_channels, p.out_channels = c.out_channels;
        p.in_batch_stride = in_stride, p.out_batch_stride = p.residual_batch_stride = out_stride;
        fill(input, c.batch * in_stride - c.gap, 1.f, generator);
        fill(weight, filters * c.in_channels * taps, 1.f / std::sqrt(static_cast<float>(taps * c.in_channels)),
             generator);
        fill(density, taps, 1.f, generator);
        fill(bias, filters, 1.f, generator);
        fill(residual, c.batch * out_stride - c.gap, 1.f, generator);
        output.resize(residual.size());
        first_weight = c.flipped ? taps - 1 : 0;
        view = {weight.data() + first_weight,
                c.density ? density.data() + first_weight : nullptr,
                c.out_channels * c.in_channels * taps,
                c.in_channels * taps,
                taps,
                c.flipped ? -1 : 1};
        p.input = input.data(), p.output = output.data();
        p.bias = c.bias ? bias.data() : nullptr;
        p.residual = c.residual ? residual.data() : nullptr;
        if (algorithm.unsupported(p) != nullptr) return;
        packed = aligned(packed_store, algorithm.packed_bytes(p));
        scratch = aligned(scratch_store, algorithm.scratch_bytes(p));
        p.packed = packed;
    }

    void poison() {
        for (T& value : output) put(value, std::numeric_limits<float>::quiet_NaN());
        std::memset(scratch_store.data(), 0x7f, scratch_store.size());
    }
};

inline double activate_exactly(double x, Activation activation) {
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

// The sum at one output element, and the sum of magnitudes that its rounding error scales with.
template <class T>
double convolve(const Case& c, const Problem<T>& q, int64_t n, const int64_t (&at)[3], int64_t filter,
                double* magnitude) {
    const ConvParams& p = q.p;
    const Axis *a = &p.axis[0], *b = &p.axis[1], *d = &p.axis[2];
    const int64_t group = filter / p.out_channels, o = filter % p.out_channels;
    double sum = c.bias ? value_of(q.bias, filter) : 0.0;
    *magnitude = std::fabs(sum);
    for (int64_t i = 0; i < a->taps; ++i)
        for (int64_t j = 0; j < b->taps; ++j)
            for (int64_t k = 0; k < d->taps; ++k) {
                const int64_t z = at[0] * a->step + a->offset + i * a->offset_step;
                const int64_t y = at[1] * b->step + b->offset + j * b->offset_step;
                const int64_t x = at[2] * d->step + d->offset + k * d->offset_step;
                if (z < 0 || z >= a->in_size || y < 0 || y >= b->in_size || x < 0 || x >= d->in_size) continue;
                const int64_t tap = ((a->tap + i * a->tap_step) * b->kernel + b->tap + j * b->tap_step) * d->kernel +
                                    d->tap + k * d->tap_step;
                const int64_t place = q.first_weight + tap * q.view.tap_stride;
                const double factor = c.density ? value_of(q.density, place) : 1.0;
                const int64_t from = n * p.in_batch_stride + z * a->in_stride + y * b->in_stride + x * d->in_stride +
                                     group * p.in_channels;
                const int64_t w = group * q.view.group_stride + o * q.view.out_stride + place;
                for (int64_t ch = 0; ch < p.in_channels; ++ch) {
                    const double product =
                        factor * value_of(q.weight, w + ch * q.view.in_stride) * value_of(q.input, from + ch);
                    sum += product;
                    *magnitude += std::fabs(product);
                }
            }
    return sum;
}

// Largest error over its bound (<= 1 is right); infinite where the kernel left a hole or wrote what is not its own.
template <class T>
double error_ratio(const Case& c, const Problem<T>& q) {
    const ConvParams& p = q.p;
    const int64_t filters = c.groups * c.out_channels, pixel = filters + c.gap;
    const double storage = sizeof(T) == 4 ? 6e-8 : 4e-3;
    double worst = 0;
    for (int64_t at = 0; at < static_cast<int64_t>(q.output.size()); ++at) {
        const double got = value_of(q.output, at);
        const int64_t filter = at % pixel;
        if (filter >= filters) {
            if (!std::isnan(got)) return std::numeric_limits<double>::infinity();
            continue;
        }
        int64_t place = at / pixel, where[3];
        for (int i = 2; i >= 0; --i) where[i] = place % p.axis[i].out_size, place /= p.axis[i].out_size;
        double magnitude = 0;
        double want = activate_exactly(convolve(c, q, place, where, filter, &magnitude), c.activation);
        if (c.residual) want += value_of(q.residual, at);
        const double bound = 1e-6 * magnitude + storage * (1 + std::fabs(want)) + 1e-6;
        if (!(std::fabs(got - want) <= 1e30)) return std::numeric_limits<double>::infinity();
        worst = std::max(worst, std::fabs(got - want) / bound);
    }
    return worst;
}

// Every item on its own, last first: the result may not depend on the split.
template <class T>
bool split_changes_result(Problem<T>& q, const Algorithm& algorithm) {
    const Values<T> whole = q.output;
    q.poison();
    for (int64_t item = algorithm.items(q.p) - 1; item >= 0; --item) {
        std::memset(q.scratch_store.data(), 0x7f, q.scratch_store.size());
        algorithm.run(q.p, item, item + 1, q.scratch);
    }
    return !whole.empty() && std::memcmp(whole.data(), q.output.data(), whole.size() * sizeof(T)) != 0;
}

template <class T>
bool passes(const Case& c, const Algorithm& algorithm) {
    const char* type = sizeof(T) == 4 ? "float32" : "bfloat16";
    Problem<T> q(c, algorithm);
    const char* reason = algorithm.unsupported(q.p);
    if (reason != nullptr || c.refused != nullptr) {
        const bool fine = reason != nullptr && c.refused != nullptr && std::strstr(reason, c.refused) != nullptr;
        std::printf("%s %-9s %s: %s\n", fine ? "ok  " : "FAIL", type, c.why, reason ? reason : "was not refused");
        return fine;
    }
    q.poison();
    for (int64_t item = algorithm.pack_items(q.p) - 1; item >= 0; --item)
        algorithm.pack(q.p, q.view, q.packed, item, item + 1);
    algorithm.run(q.p, 0, algorithm.items(q.p), q.scratch);
    const double ratio = error_ratio(c, q);
    const bool split = split_changes_result(q, algorithm), fine = ratio <= 1 && !split;
    std::printf("%s %-9s %s: error %.2f of its bound%s\n", fine ? "ok  " : "FAIL", type, c.why, ratio,
                split ? ", depends on the split" : "");
    return fine;
}

// Both storage types of every case; the number of failures.
template <size_t N>
int failures(const Algorithm& algorithm, const Case (&cases)[N]) {
    int count = 0;
    for (const Case& c : cases) count += !passes<float>(c, algorithm) + !passes<bf16>(c, algorithm);
    std::printf("%s, width %d: %d of %zu failed\n", algorithm.name, kWidth, count, 2 * N);
    return count;
}

inline double thread_milliseconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return 1e3 * static_cast<double>(now.tv_sec) + 1e-6 * static_cast<double>(now.tv_nsec);
}

// Best time of one layer on one thread, into memory that is there already.
inline void measure(const Algorithm& algorithm, const Case& c, int repeats) {
    Problem<float> q(c, algorithm);
    const char* reason = algorithm.unsupported(q.p);
    if (reason != nullptr) {
        std::printf("%s\n", reason);
        return;
    }
    algorithm.pack(q.p, q.view, q.packed, 0, algorithm.pack_items(q.p));
    double best = 1e30;
    for (int i = 0; i < repeats; ++i) {
        const double start = thread_milliseconds();
        algorithm.run(q.p, 0, algorithm.items(q.p), q.scratch);
        best = std::min(best, thread_milliseconds() - start);
    }
    double products = static_cast<double>(c.batch * c.groups * c.in_channels * c.out_channels);
    for (const Axis& a : q.p.axis) products *= static_cast<double>(a.taps * a.out_size);
    const double bytes = 4.0 * static_cast<double>(q.input.size() + q.output.size());
    std::printf("%s: best %.3f ms, %.1f GFLOP/s, %.1f GB/s\n", algorithm.name, best, 2e-6 * products / best,
                1e-6 * bytes / best);
}

}  // namespace check
