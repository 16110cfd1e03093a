// Runs the CUDA kernels' phases on the host, block after block and thread after thread, against a naive convolution in
// double. What it cannot show is what only a GPU does: barriers, the exchange of sums between threads, the hardware's
// conversions and its memory system. Prints one line per case; exits 1 if any is wrong.
//
//   nvcc -std=c++20 -O1 -gencode=arch=compute_80,code=sm_80 tests/native/cuda_host_check.cu -o check && ./check
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "../../csrc/weighted_conv/cuda.cu"

namespace {

using namespace pdn;

uint32_t state = 12345;
double draw() {  // in [-1, 1)
    state = state * 1664525u + 1013904223u;
    return static_cast<int32_t>(state) / 2147483648.0;
}

template <typename T>
std::vector<T> random_values(int64_t n) {
    std::vector<T> v(static_cast<size_t>(n));
    for (auto& x : v) from_float(static_cast<float>(draw()), x);
    return v;
}

struct Case {
    const char* name;
    int kind;  // 0 skinny in, 1 skinny out, 2 depthwise
    int64_t batch, in_channels, out_channels;
    int64_t size[3], kernel[3], stride[3], low[3], high[3], dilation[3];
    bool density, bias, residual;
    int activation;
    int64_t gap;  // extra channels between pixels: strides that are not dense
};

double act(double x, int a) {
    if (a == 1) return x < 0 ? 0 : x;
    if (a == 2) return x / (1 + std::exp(-x));
    if (a == 3) return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    if (a == 4) return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    return a >= 5 && x < 0 ? x * (a == 5 ? 0.01 : a == 6 ? 0.1 : 0.2) : x;
}

struct Strides {
    int64_t n, s[3], total;
    Strides(int64_t batch, const int64_t* size, int64_t channels) {
        s[2] = channels, s[1] = s[2] * size[2], s[0] = s[1] * size[1], n = s[0] * size[0], total = n * batch;
    }
};

template <typename T>
void run_block(int kind, const Problem& p, const Plan& plan, int64_t block) {
    std::vector<Float4> memory(static_cast<size_t>(plan.shared_bytes / 16 + 1), Float4{{NAN, NAN, NAN, NAN}});
    float* shared = reinterpret_cast<float*>(memory.data());
    const Tile tile = tile_of(plan, block);
    auto phases = [&]<typename K>(K) {
        for (int t = 0; t < kThreads; ++t) K::stage(p, plan, tile, t, shared);
        for (int t = 0; t < kThreads; ++t) K::compute(p, plan, tile, t, shared);
    };
    auto summed = [&]<int CO, typename K>(std::integral_constant<int, CO>, K) {
        std::vector<float> sums(kThreads * 8 * CO, 0.f);
        auto* acc = reinterpret_cast<float(*)[8][CO]>(sums.data());
        for (int64_t stage = 0; stage < p.in_channels; stage += plan.group_channels) {
            for (int t = 0; t < kThreads; ++t) K::stage(p, plan, stage, t, shared);
            for (int t = 0; t < kThreads; ++t) K::accumulate(p, plan, tile, stage, t, shared, acc[t]);
        }
        for (int t = 0; t < kThreads; ++t) {
            float total[CO] = {};
            for (int o = 0; o < CO; ++o)
                for (int lane = 0; lane < kLanes; ++lane) total[o] += acc[t / kLanes * kLanes + lane][t % kLanes][o];
            K::finish(p, tile, t, total);
        }
    };
    const int width = plan.fast ? static_cast<int>(p.axis[2].taps) : 0;
    if (kind == 0) {
        if (plan.fast)
            phases(SkinnyIn<T, 3>{});
        else
            phases(SkinnyIn<T, 0>{});
    } else if (kind == 1) {
        const int columns = skinny_out_columns(p, plan.fast);
        if (!plan.fast)
            summed(std::integral_constant<int, 4>{}, SkinnyOut<T, 4, 0>{});
        else if (columns == 1)
            summed(std::integral_constant<int, 1>{}, SkinnyOut<T, 1, 3>{});
        else if (columns == 3)
            summed(std::integral_constant<int, 3>{}, SkinnyOut<T, 3, 3>{});
        else
            summed(std::integral_constant<int, 4>{}, SkinnyOut<T, 4, 3>{});
    } else {
        if (width == 3)
            phases(Depthwise<T, 3>{});
        else if (width == 5)
            phases(Depthwise<T, 5>{});
        else if (width == 7)
            phases(Depthwise<T, 7>{});
        else
            phases(Depthwise<T, 0>{});
    }
}

template <typename T>
bool run_grad(const Case& c, const Problem& f, double tolerance) {
    GradProblem p{};
    p.storage = f.storage, p.batch = f.batch, p.channels = f.in_channels;
    p.in_batch_stride = f.in_batch_stride, p.grad_batch_stride = f.out_batch_stride;
    for (int a = 0; a < 3; ++a) p.axis[a] = f.axis[a];
    p.input = f.input, p.weight = f.weight, p.density = f.density;
    const auto dy = random_values<T>(f.batch * f.out_batch_stride);
    p.grad = dy.data();
    const int64_t taps = all_taps(p.axis);
    std::vector<T> dw(static_cast<size_t>(p.channels * taps));
    p.weight_grad = dw.data();
    T marker;
    p.density_grad = &marker;  // asks for the shares; they are added up below
    std::vector<float> workspace(static_cast<size_t>(depthwise_grad_workspace(p)), NAN);
    p.workspace = workspace.data();
    GradPlan plan;
    if (const char* why = plan_depthwise_grad(p, plan)) return std::printf("%s\n", why), false;
    auto phases = [&]<typename K>(K) {
        std::vector<Float4> memory(K::kSharedFloats / 4);
        float* shared = reinterpret_cast<float*>(memory.data());
        for (int block = 0; block < plan.groups * plan.tap_rows * plan.slabs; ++block) {
            for (int t = 0; t < kThreads; ++t) K::compute(p, plan, block, t, shared);
            for (int t = 0; t < kThreads; ++t) K::reduce(p, plan, block, t, shared);
        }
    };
    const int width = plan.tap_rows == plan.taps ? 1 : plan.kernel_w;
    if (width == 3)
        phases(DepthwiseGrad<T, 3>{});
    else if (width == 5)
        phases(DepthwiseGrad<T, 5>{});
    else if (width == 7)
        phases(DepthwiseGrad<T, 7>{});
    else
        phases(DepthwiseGrad<T, 1>{});
    double worst = 0, scale = 0;
    const Axis* a = p.axis;
    for (int tap = 0; tap < taps; ++tap) {
        double share = 0, expected_share = 0;
        for (int t = 0; t < kThreads; ++t) share += grad_of_tap<T>(p, plan, tap, t);
        const int64_t k[3] = {tap / (c.kernel[1] * c.kernel[2]), tap / c.kernel[2] % c.kernel[1], tap % c.kernel[2]};
        for (int64_t ch = 0; ch < p.channels; ++ch) {
            double sum = 0;
            for (int64_t n = 0; n < p.batch; ++n)
                for (int64_t z = 0; z < a[0].out_size; ++z)
                    for (int64_t y = 0; y < a[1].out_size; ++y)
                        for (int64_t x = 0; x < a[2].out_size; ++x) {
                            const int64_t o[3] = {z, y, x};
                            int64_t at = n * p.in_batch_stride + ch;
                            bool valid = true;
                            for (int i = 0; i < 3; ++i) {
                                const int64_t q = input_position(a[i], o[i], k[i]);
                                valid = valid && inside(q, a[i].in_size);
                                at += q * a[i].in_stride;
                            }
                            if (!valid) continue;
                            const int64_t g = n * p.grad_batch_stride + z * a[0].out_stride + y * a[1].out_stride +
                                              x * a[2].out_stride + ch;
                            sum += static_cast<double>(to_float(dy[g])) * to_float(static_cast<const T*>(p.input)[at]);
                        }
            const double density = p.density ? to_float(static_cast<const T*>(p.density)[tap]) : 1.0;
            worst = std::fmax(worst, std::fabs(sum * density - to_float(dw[ch * taps + tap])));
            scale = std::fmax(scale, std::fabs(sum * density));
            expected_share += sum * to_float(static_cast<const T*>(p.weight)[ch * taps + tap]);
        }
        worst = std::fmax(worst, std::fabs(share - expected_share) / 4);
    }
    const bool good = worst <= tolerance * (scale + 1e-3);
    std::printf("%-24s gradients   error %.2e of %.2e %s\n", c.name, worst, scale, good ? "" : "WRONG");
    return good;
}

// The input gradient, phase by phase as the bindings launch it, against the naive sum over outputs and taps.
template <typename T>
bool run_grad_input(const Case& c, const Problem& f, double tolerance) {
    const auto dy = random_values<T>(f.batch * f.out_batch_stride);
    std::vector<T> dx(static_cast<size_t>(f.batch * f.in_batch_stride));
    for (auto& v : dx) from_float(NAN, v);
    Problem p{};
    p.storage = f.storage, p.batch = f.batch, p.in_channels = p.out_channels = f.in_channels;
    p.in_batch_stride = f.out_batch_stride, p.out_batch_stride = f.in_batch_stride;
    p.input = dy.data(), p.weight = f.weight, p.density = f.density;
    const Axis* a = f.axis;
    for (int64_t z = 0; z < a[0].step; ++z)
        for (int64_t y = 0; y < a[1].step; ++y)
            for (int64_t x = 0; x < a[2].step; ++x) {
                const int64_t phase[3] = {z, y, x};
                for (int i = 0; i < 3; ++i) p.axis[i] = grad_input_axis(a[i], c.low[i], phase[i]);
                p.output = dx.data() + z * a[0].in_stride + y * a[1].in_stride + x * a[2].in_stride;
                Plan plan;
                if (plan_depthwise(p, plan)) return std::printf("%s: no plan WRONG\n", c.name), false;
                for (int64_t block = 0; block < plan.blocks; ++block) run_block<T>(2, p, plan, block);
            }
    std::vector<double> expected(dx.size(), 0.0);
    const int64_t taps = all_taps(f.axis);
    for (int64_t n = 0; n < f.batch; ++n)
        for (int64_t o = 0; o < a[0].out_size * a[1].out_size * a[2].out_size; ++o)
            for (int64_t k = 0; k < taps; ++k) {
                const int64_t j[3] = {o / (a[1].out_size * a[2].out_size), o / a[2].out_size % a[1].out_size,
                                      o % a[2].out_size};
                const int64_t t[3] = {k / (c.kernel[1] * c.kernel[2]), k / c.kernel[2] % c.kernel[1], k % c.kernel[2]};
                int64_t from = n * f.out_batch_stride, to = n * f.in_batch_stride;
                bool valid = true;
                for (int i = 0; i < 3; ++i) {
                    const int64_t q = input_position(a[i], j[i], t[i]);
                    valid = valid && inside(q, a[i].in_size);
                    from += j[i] * a[i].out_stride, to += q * a[i].in_stride;
                }
                const double density = f.density ? to_float(static_cast<const T*>(f.density)[k]) : 1.0;
                for (int64_t ch = 0; valid && ch < f.in_channels; ++ch)
                    expected[to + ch] +=
                        density * to_float(static_cast<const T*>(f.weight)[ch * taps + k]) * to_float(dy[from + ch]);
            }
    double worst = 0, scale = 0;
    for (size_t i = 0; i < dx.size(); ++i) {
        if (static_cast<int64_t>(i) % (f.in_channels + c.gap) >= f.in_channels) continue;
        const double error = std::fabs(expected[i] - to_float(dx[i]));
        worst = std::isnan(error) ? INFINITY : std::fmax(worst, error);
        scale = std::fmax(scale, std::fabs(expected[i]));
    }
    const bool good = worst <= tolerance * scale;
    std::printf("%-24s d input     error %.2e of %.2e %s\n", c.name, worst, scale, good ? "" : "WRONG");
    return good;
}

template <typename T>
bool run_case(const Case& c, Storage storage, double tolerance) {
    int64_t out_size[3], taps = 1;
    for (int i = 0; i < 3; ++i) {
        out_size[i] = (c.size[i] + c.low[i] + c.high[i] - c.dilation[i] * (c.kernel[i] - 1) - 1) / c.stride[i] + 1;
        taps *= c.kernel[i];
    }
    const Strides in(c.batch, c.size, c.in_channels + c.gap), out(c.batch, out_size, c.out_channels + c.gap);
    const int64_t per_group = c.kind == 2 ? 1 : c.in_channels;
    const auto x = random_values<T>(in.total), w = random_values<T>(c.out_channels * per_group * taps);
    const auto d = random_values<T>(taps), b = random_values<T>(c.out_channels), r = random_values<T>(out.total);
    std::vector<T> y(static_cast<size_t>(out.total));
    for (auto& v : y) from_float(NAN, v);
    Problem p{};
    p.storage = storage, p.activation = static_cast<weighted_conv::Activation>(c.activation);
    p.batch = c.batch, p.in_channels = c.in_channels, p.out_channels = c.out_channels;
    p.in_batch_stride = in.n, p.out_batch_stride = p.residual_batch_stride = out.n;
    for (int i = 0; i < 3; ++i)
        p.axis[i] = Axis{c.size[i], out_size[i],   in.s[i],     out.s[i],    out.s[i], c.stride[i],
                         -c.low[i], c.dilation[i], c.kernel[i], c.kernel[i], 0,        1};
    p.input = x.data(), p.weight = w.data(), p.output = y.data();
    p.density = c.density ? d.data() : nullptr, p.bias = c.bias ? b.data() : nullptr;
    p.residual = c.residual ? r.data() : nullptr;
    Plan plan;
    const char* why = c.kind == 0   ? plan_skinny_in(p, plan)
                      : c.kind == 1 ? plan_skinny_out(p, plan)
                                    : plan_depthwise(p, plan);
    if (why) return std::printf("%-24s not planned: %s WRONG\n", c.name, why), false;
    for (int64_t block = 0; block < plan.blocks; ++block) run_block<T>(c.kind, p, plan, block);

    double worst = 0, scale = 0;
    for (int64_t n = 0; n < c.batch; ++n)
        for (int64_t z = 0; z < out_size[0]; ++z)
            for (int64_t yy = 0; yy < out_size[1]; ++yy)
                for (int64_t xx = 0; xx < out_size[2]; ++xx)
                    for (int64_t o = 0; o < c.out_channels; ++o) {
                        double sum = c.bias ? to_float(b[o]) : 0;
                        for (int64_t k = 0; k < taps; ++k) {
                            const int64_t t[3] = {k / (c.kernel[1] * c.kernel[2]), k / c.kernel[2] % c.kernel[1],
                                                  k % c.kernel[2]};
                            const int64_t j[3] = {z, yy, xx};
                            int64_t at = n * in.n;
                            bool valid = true;
                            for (int i = 0; i < 3; ++i) {
                                const int64_t q = j[i] * c.stride[i] - c.low[i] + t[i] * c.dilation[i];
                                valid = valid && q >= 0 && q < c.size[i];
                                at += q * in.s[i];
                            }
                            if (!valid) continue;
                            const double density = c.density ? to_float(d[k]) : 1.0;
                            for (int64_t i = 0; i < per_group; ++i) {
                                const int64_t channel = c.kind == 2 ? o / (c.out_channels / c.in_channels) : i;
                                sum += static_cast<double>(to_float(x[at + channel])) *
                                       to_float(w[(o * per_group + i) * taps + k]) * density;
                            }
                        }
                        const int64_t at = n * out.n + z * out.s[0] + yy * out.s[1] + xx * out.s[2] + o;
                        const double expected = act(sum, c.activation) + (c.residual ? to_float(r[at]) : 0);
                        const double error = std::fabs(expected - to_float(y[at]));
                        worst = std::isnan(error) ? INFINITY : std::fmax(worst, error);
                        scale = std::fmax(scale, std::fabs(expected));
                    }
    bool good = worst <= tolerance * scale;
    for (int64_t i = 0; i < out.total; ++i)  // nothing may be written between the pixels' channels
        if (i % (c.out_channels + c.gap) >= c.out_channels) good = good && std::isnan(to_float(y[i]));
    std::printf("%-24s %-8s %s error %.2e of %.2e %s\n", c.name,
                storage == Storage::float32    ? "float32"
                : storage == Storage::bfloat16 ? "bfloat16"
                                               : "float16",
                plan.fast ? "fast   " : "general", worst, scale, good ? "" : "WRONG");
    if (c.kind == 2 && c.in_channels == c.out_channels) {
        good = run_grad<T>(c, p, tolerance * 4) && good;
        good = run_grad_input<T>(c, p, tolerance) && good;
    }
    return good;
}

bool conversions() {
    bool good = true;
    for (uint32_t i = 0; i < 65536; ++i) {
        const Float16 h{static_cast<uint16_t>(i)};
        const BFloat16 b{static_cast<uint16_t>(i)};
        Float16 h2;
        BFloat16 b2;
        from_float(to_float(h), h2), from_float(to_float(b), b2);
        good = good && (std::isnan(to_float(h)) ? std::isnan(to_float(h2)) : h2.bits == h.bits);
        good = good && (std::isnan(to_float(b)) ? std::isnan(to_float(b2)) : b2.bits == b.bits);
    }
    Float16 h;
    from_float(1.f + 0x1p-11f, h), good = good && h.bits == 0x3c00;  // a tie goes to even
    from_float(1.f + 0x1.8p-10f, h), good = good && h.bits == 0x3c02;
    from_float(65519.f, h), good = good && h.bits == 0x7bff;
    from_float(65520.f, h), good = good && h.bits == 0x7c00;
    std::printf("16-bit conversions %s\n", good ? "" : "WRONG");
    return good;
}

// clang-format off
const Case kCases[] = {
    // name, kind, batch, c_in, c_out, size, kernel, stride, low, high, dilation, density, bias, residual, activation, gap
    {"first rgb", 0, 1, 3, 64, {1, 17, 70}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1}, true, true, false, 1, 0},
    {"first gray, odd", 0, 2, 1, 37, {1, 9, 12}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1}, true, true, true, 2, 3},
    {"first, stride in y", 0, 1, 4, 8, {1, 20, 9}, {1, 3, 3}, {1, 2, 1}, {0, 1, 2}, {0, 0, 1}, {1, 2, 1}, false, false, true, 3, 0},
    {"first 5x5 stride 2", 0, 1, 3, 33, {1, 11, 14}, {1, 5, 5}, {1, 2, 2}, {0, 2, 2}, {0, 2, 2}, {1, 1, 1}, true, true, false, 4, 0},
    {"first 3-d", 0, 1, 2, 16, {4, 5, 6}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, true, true, false, 0, 0},
    {"first, many taps", 0, 1, 4, 130, {1, 8, 70}, {1, 11, 3}, {1, 1, 1}, {0, 5, 1}, {0, 5, 1}, {1, 1, 1}, true, true, false, 0, 0},
    {"last rgb", 1, 1, 64, 3, {1, 17, 33}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1}, true, true, true, 0, 0},
    {"last gray", 1, 2, 96, 1, {1, 5, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1}, true, true, false, 4, 0},
    {"last odd", 1, 1, 21, 2, {1, 9, 10}, {1, 5, 5}, {1, 1, 1}, {0, 2, 2}, {0, 2, 2}, {1, 1, 1}, true, true, false, 3, 1},
    {"last, two stages", 1, 1, 520, 4, {1, 3, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1}, true, false, false, 1, 0},
    {"last, dilated far", 1, 1, 16, 2, {1, 4, 5}, {1, 3, 3}, {1, 1, 1}, {0, 6, 6}, {0, 6, 6}, {1, 6, 6}, true, true, false, 0, 0},
    {"last 3-d, even", 1, 1, 8, 3, {3, 5, 6}, {2, 3, 4}, {1, 2, 1}, {0, 1, 1}, {1, 1, 2}, {1, 1, 1}, true, true, true, 2, 0},
    {"last, leaky relu", 1, 1, 16, 3, {1, 5, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1}, false, true, true, 6, 0},
    {"depthwise, leaky relu", 2, 1, 40, 40, {1, 7, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1}, false, true, false, 7, 0},
    {"depthwise", 2, 1, 40, 40, {1, 13, 34}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1}, true, true, true, 1, 0},
    {"depthwise odd", 2, 2, 35, 35, {1, 9, 7}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1}, true, true, false, 0, 0},
    {"depthwise 5x5", 2, 1, 32, 32, {1, 19, 9}, {1, 5, 5}, {1, 1, 1}, {0, 2, 2}, {0, 2, 2}, {1, 1, 1}, true, true, false, 3, 0},
    {"depthwise 7x7", 2, 1, 8, 8, {1, 20, 37}, {1, 7, 7}, {1, 1, 1}, {0, 3, 3}, {0, 3, 3}, {1, 1, 1}, true, true, false, 2, 0},
    {"depthwise stride 2", 2, 1, 16, 16, {1, 12, 13}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1}, true, false, false, 4, 0},
    {"depthwise strides differ", 2, 1, 8, 8, {1, 13, 11}, {1, 2, 3}, {1, 3, 2}, {0, 0, 1}, {0, 1, 2}, {1, 1, 2}, true, false, false, 0, 0},
    {"depthwise dilated", 2, 1, 8, 8, {1, 14, 11}, {1, 3, 3}, {1, 2, 1}, {0, 2, 2}, {0, 2, 3}, {1, 2, 2}, true, true, true, 0, 0},
    {"depthwise multiplier", 2, 1, 6, 18, {1, 9, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1}, true, true, false, 0, 0},
    {"depthwise 3-d", 2, 1, 16, 16, {4, 5, 6}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, true, true, false, 0, 4},
};
// clang-format on

}  // namespace

int main() {
    bool good = conversions();
    for (const Case& c : kCases) {
        good = run_case<float>(c, Storage::float32, 2e-6) && good;
        good = run_case<BFloat16>(c, Storage::bfloat16, 4e-3) && good;
        good = run_case<Float16>(c, Storage::float16, 5e-4) && good;
    }
    return good ? 0 : 1;
}
