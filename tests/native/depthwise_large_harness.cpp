// Stand-alone check and timing of csrc/weighted_conv/depthwise_large.inl and depthwise_large_grad.inl, without torch:
//   g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno [ISA flags] tests/native/depthwise_large_harness.cpp -o
//   harness
//   ./harness                                            all cases against double precision; exit 1 on a failure
//   ./harness time CHANNELS KERNEL SIZE [REPEATS BATCH]  best milliseconds of square images, one thread: forward, and
//                                                        weight gradient
#include "../../csrc/weighted_conv/depthwise_large.inl"
#include "../../csrc/weighted_conv/depthwise_large_grad.inl"
#include "convolution_check.h"

using namespace check;

namespace {

const Case kCases[] = {
    {"7x7: nothing is split", 1, 32, 1, 1, {kFlat, {9, 7, 1, 3}, {20, 7, 1, 3}}, Activation::gelu},
    {"9x9, odd sizes, residual", 2, 35, 1, 1, {kFlat, {13, 9, 1, 4}, {21, 9, 1, 4}}, Activation::relu, true, true},
    {"even kernel", 1, 16, 1, 1, {kFlat, {12, 8, 1, 4}, {15, 10, 1, 5}}},
    {"11x11", 1, 16, 1, 1, {kFlat, {12, 11, 1, 5}, {15, 11, 1, 5}}, Activation::leaky_relu_02},
    {"13x13 without padding", 1, 16, 1, 1, {kFlat, {19, 13}, {23, 13}}, Activation::none, false},
    {"15x15 of an image smaller than the kernel", 1, 17, 1, 1, {kFlat, {6, 15, 1, 7}, {7, 15, 1, 7}}},
    {"17x17", 2, 48, 1, 1, {kFlat, {20, 17, 1, 8}, {24, 17, 1, 8}}, Activation::relu},
    {"17x17 of 14x14", 1, 16, 1, 1, {kFlat, {14, 17, 1, 8}, {14, 17, 1, 8}}, Activation::silu, true, true},
    {"19x19, fewer channels than a vector, gaps between pixels",
     1,
     3,
     1,
     1,
     {kFlat, {17, 19, 1, 9}, {18, 19, 1, 9}},
     Activation::gelu_tanh,
     true,
     true,
     true,
     false,
     2},
    {"31x31", 1, 16, 1, 1, {kFlat, {6, 31, 1, 15}, {40, 31, 1, 15}}},
    {"17x17, several regions", 1, 16, 1, 1, {kFlat, {9, 17, 1, 8}, {150, 17, 1, 8}}, Activation::relu},
    {"9x9, several regions both ways", 1, 4, 1, 1, {kFlat, {70, 9, 1, 4}, {75, 9, 1, 4}}},
    {"more padding than kernel and image",
     1,
     16,
     1,
     1,
     {kFlat, {2, 9, 1, 20}, {3, 7, 1, 20}},
     Activation::none,
     true,
     true},
    {"cropped: offsets are positive", 1, 16, 1, 1, {kFlat, {19, 9, 1, -1}, {31, 17, 1, -3}}},
    {"a single pixel", 3, 16, 1, 1, {kFlat, {1, 17, 1, 8}, {1, 17, 1, 8}}},
    {"3x17: rows are not split", 1, 20, 1, 1, {kFlat, {9, 3, 1, 1}, {30, 17, 1, 8}}},
    {"31x5: columns are not split", 1, 20, 1, 1, {kFlat, {35, 31, 1, 15}, {12, 5, 1, 2}}},
    {"9x17: one split and two", 1, 20, 1, 1, {kFlat, {15, 9, 1, 4}, {30, 17, 1, 8}}},
    {"21x8: two splits and one", 1, 20, 1, 1, {kFlat, {22, 21, 1, 10}, {13, 8, 1, 3}}},
    {"reversed kernel", 1, 32, 1, 1, {kFlat, {17, 9, 1, 4}, {16, 9, 1, 4}}, Activation::none, false, false, true, true},
    {"1-D", 2, 20, 1, 1, {kFlat, kFlat, {301, 31, 1, 15}}},
    {"3-D, kernel of one image", 2, 16, 1, 1, {{3, 1}, {9, 9, 1, 4}, {19, 9, 1, 4}}, Activation::silu, true, true},
    {"no images", 0, 16, 1, 1, {kFlat, {8, 9, 1, 4}, {8, 9, 1, 4}}},
    {"no density, no bias", 1, 16, 1, 1, {kFlat, {9, 11, 1, 5}, {18, 11, 1, 5}}, Activation::none, false, false, false},
    {"stride 2",
     1,
     16,
     1,
     1,
     {kFlat, {19, 9, 2, 1}, {31, 9, 2, 1}},
     Activation::none,
     true,
     false,
     true,
     false,
     0,
     "stride"},
    {"dilation 2",
     1,
     24,
     1,
     1,
     {kFlat, {29, 9, 1, 2, 2}, {22, 9, 1, 2, 2}},
     Activation::none,
     true,
     false,
     true,
     false,
     0,
     "dilation"},
    {"every second tap",
     1,
     16,
     1,
     1,
     {kFlat, {8, 9, 1, 1, 1, 2, 1, 2}, {15, 9, 1, 4}},
     Activation::none,
     true,
     false,
     true,
     false,
     0,
     "stride"},
    {"3-D kernel", 1, 16, 1, 1, {{9, 3}, {9, 9}, {19, 9}}, Activation::none, true, false, true, false, 0, "dimensions"},
    {"small kernel", 1, 16, 1, 1, {kFlat, {9, 5}, {19, 3}}, Activation::none, true, false, true, false, 0, "small"},
    {"channel multiplier",
     1,
     16,
     1,
     2,
     {kFlat, {14, 9}, {14, 9}},
     Activation::none,
     true,
     false,
     true,
     false,
     0,
     "per group"},
};

// The gradient problem of a case: its input, and the output as the output's gradient.
struct GradProblem {
    Problem<float> q;
    GradWeightParams p{};
    Values<float> grad, weight_grad;
    std::vector<char> memory;
    int64_t taps = 1;

    explicit GradProblem(const Case& c) : q(c, kDepthwiseLarge) {
        std::mt19937 generator(12);
        Problem<float>::fill(grad, static_cast<int64_t>(q.output.size()), 1.f, generator);
        for (int i = 0; i < 3; ++i) p.axis[i] = q.p.axis[i], taps *= q.p.axis[i].kernel;
        p.dtype = DType::float32;
        p.batch = c.batch, p.groups = c.groups, p.in_channels = p.out_channels = 1;
        p.in_batch_stride = q.p.in_batch_stride, p.out_batch_stride = q.p.out_batch_stride;
        p.input = q.input.data(), p.grad = grad.data(), p.weight = q.weight.data();
        p.density = c.density ? q.density.data() : nullptr;
        weight_grad.assign(q.weight.size(), std::numeric_limits<float>::quiet_NaN());
        p.weight_grad = weight_grad.data();
    }

    // Items one by one, last first.
    void run(std::vector<double>* rows) {
        std::vector<char> partial_store, scratch_store;
        const auto& a = kGradDepthwiseLarge;
        auto* partials = reinterpret_cast<float*>(Problem<float>::aligned(partial_store, a.partial_floats(p) * 4));
        char* scratch = Problem<float>::aligned(scratch_store, a.scratch_bytes(p));
        for (int64_t item = a.items(p) - 1; item >= 0; --item) {
            std::memset(scratch_store.data(), 0x7f, scratch_store.size());
            a.run(p, partials, item, item + 1, scratch);
        }
        rows->assign(static_cast<size_t>(a.finish_items(p) * taps), std::numeric_limits<double>::quiet_NaN());
        for (int64_t item = a.finish_items(p) - 1; item >= 0; --item)
            a.finish(p, partials, rows->data(), item, item + 1);
    }
};

bool gradient_passes(const Case& c) {
    GradProblem g(c);
    if (kGradDepthwiseLarge.unsupported(g.p) != nullptr || c.flipped) return true;
    std::vector<double> rows;
    g.run(&rows);
    const ConvParams& p = g.q.p;
    const Axis &z = p.axis[0], &y = p.axis[1], &x = p.axis[2];
    double worst = 0, density_error = 0;
    std::vector<double> by_density(static_cast<size_t>(g.taps)), scale(static_cast<size_t>(g.taps));
    for (int64_t ch = 0; ch < c.groups; ++ch) {
        // Taps share their products with their neighbours, and their rounding errors with them.
        std::vector<double> sums(static_cast<size_t>(g.taps));
        double magnitude = 0;
        for (int64_t k = 0; k < g.taps; ++k) {
            double magnitudes = 0;
            for (int64_t n = 0; n < c.batch; ++n)
                for (int64_t d = 0; d < z.out_size; ++d)
                    for (int64_t i = 0; i < y.out_size; ++i)
                        for (int64_t j = 0; j < x.out_size; ++j) {
                            const int64_t row = i + y.offset + k / x.kernel, column = j + x.offset + k % x.kernel;
                            if (row < 0 || row >= y.in_size || column < 0 || column >= x.in_size) continue;
                            const double term = value_of(g.q.input, n * p.in_batch_stride + d * z.in_stride +
                                                                        row * y.in_stride + column * x.in_stride + ch) *
                                                value_of(g.grad, n * p.out_batch_stride + d * z.out_stride +
                                                                     i * y.out_stride + j * x.out_stride + ch);
                            sums[static_cast<size_t>(k)] += term, magnitudes += std::fabs(term);
                        }
            magnitude = std::max(magnitude, magnitudes);
        }
        for (int64_t k = 0; k < g.taps; ++k) {
            const double w = value_of(g.q.weight, ch * g.taps + k), factor = c.density ? value_of(g.q.density, k) : 1.0;
            const double got = value_of(g.weight_grad, ch * g.taps + k), sum = sums[static_cast<size_t>(k)];
            const double error = std::fabs(got - sum * factor) / (std::fabs(factor) * (5e-7 * magnitude + 1e-6));
            worst = std::max(worst, std::isnan(error) ? 1e30 : error);
            by_density[static_cast<size_t>(k)] += sum * w;
            scale[static_cast<size_t>(k)] += std::fabs(w) * (magnitude + 1);
        }
    }
    for (int64_t k = 0; k < g.taps; ++k) {
        double got = 0;
        for (size_t i = static_cast<size_t>(k); i < rows.size(); i += static_cast<size_t>(g.taps)) got += rows[i];
        const double error =
            std::fabs(got - by_density[static_cast<size_t>(k)]) / (5e-7 * scale[static_cast<size_t>(k)]);
        density_error = std::max(density_error, std::isnan(error) ? 1e30 : error);
    }
    const bool fine = worst <= 1 && density_error <= 1;
    std::printf("%s gradient  %s: error %.2f and %.2f of its bound\n", fine ? "ok  " : "FAIL", c.why, worst,
                density_error);
    return fine;
}

void measure_gradient(const Case& c, int repeats) {
    GradProblem g(c);
    std::vector<char> partial_store, scratch_store;
    const auto& a = kGradDepthwiseLarge;
    auto* partials = reinterpret_cast<float*>(Problem<float>::aligned(partial_store, a.partial_floats(g.p) * 4));
    char* scratch = Problem<float>::aligned(scratch_store, a.scratch_bytes(g.p));
    double best = 1e30;
    for (int i = 0; i < repeats; ++i) {
        const double start = thread_milliseconds();
        a.run(g.p, partials, 0, a.items(g.p), scratch);
        a.finish(g.p, partials, nullptr, 0, a.finish_items(g.p));
        best = std::min(best, thread_milliseconds() - start);
    }
    std::printf("%s: best %.3f ms\n", a.name, best);
}

}  // namespace

int main(int count, char** words) {
    if (count < 5) {
        int failed = failures(kDepthwiseLarge, kCases);
        for (const Case& c : kCases) failed += !gradient_passes(c);
        return failed != 0;
    }
    const int64_t channels = std::atoll(words[2]), kernel = std::atoll(words[3]), size = std::atoll(words[4]);
    const int repeats = count > 5 ? std::atoi(words[5]) : 10;
    const Side side = {size, kernel, 1, kernel / 2};
    const Case timed = {"timed", count > 6 ? std::atoll(words[6]) : 1, channels, 1, 1, {kFlat, side, side}};
    measure(kDepthwiseLarge, timed, repeats);
    measure_gradient(timed, repeats);
}
