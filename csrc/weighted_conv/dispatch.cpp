#include "dispatch.h"

#include <atomic>

#include "../core/levels.h"
#include "../core/threads.h"

namespace pdn {
namespace weighted_conv {

PDN_FLOAT_LEVELS(KernelSet, kernels, kSets)

namespace {

int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

// One axis of the input gradient, for the dx positions phase, phase + stride, ...: dx[phase + j * stride] sums over the
// taps k with (phase + padding - k * dilation) divisible by the stride, at dy[j + (phase + padding - k * dilation) /
// stride]. Those k form an arithmetic progression.
Axis grad_input_axis(const Axis& forward, int64_t phase) {
    const int64_t stride = forward.step, dilation = forward.offset_step, padding = -forward.offset;
    Axis axis = forward;
    axis.in_size = forward.out_size;
    axis.in_stride = forward.out_stride;
    axis.out_size = forward.in_size > phase ? (forward.in_size - phase + stride - 1) / stride : 0;
    axis.out_stride = forward.in_stride * stride;
    axis.residual_stride = 0;
    axis.step = 1;
    if (stride == 1) {  // one phase: an ordinary convolution with the kernel reversed
        axis.offset = padding - (forward.kernel - 1) * dilation;
        return axis;
    }
    axis.tap_step = stride / gcd(stride, dilation);
    axis.offset_step = -axis.tap_step * dilation / stride;
    axis.taps = 0;
    for (int64_t k = 0; k < forward.kernel; ++k) {
        const int64_t reach = phase + padding - k * dilation;
        if (reach % stride != 0) continue;
        if (axis.taps == 0) {
            axis.tap = k;
            axis.offset = reach / stride;
        }
        ++axis.taps;
    }
    return axis;
}

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

int choose_algorithm(Isa isa, const ConvParams& p, bool allow_approximate) {
    const KernelSet& set = kernel_set(isa);
    for (int i = 0; i < set.algorithm_count; ++i) {
        const Algorithm& algorithm = set.algorithms[i];
        if (algorithm.approximate && !allow_approximate) continue;
        if (algorithm.unsupported(p) == nullptr) return i;
    }
    return -1;
}

void pack(const Algorithm& algorithm, const ConvParams& p, const WeightView& view, void* packed) {
    const int64_t elements =
        p.in_channels * p.out_channels * p.groups * p.axis[0].kernel * p.axis[1].kernel * p.axis[2].kernel;
    const int64_t items = algorithm.pack_items(p);
    const int64_t grain = elements < 32768 ? items : 1;  // waking threads costs more than a small copy
    parallel_ranges(items, grain, [&](int64_t begin, int64_t end) { algorithm.pack(p, view, packed, begin, end); });
}

bool run(const Algorithm& algorithm, const ConvParams& p) {
    const int64_t scratch_bytes = algorithm.scratch_bytes(p);
    const int64_t items = algorithm.items(p);
    const double work = static_cast<double>(p.batch) * p.groups * p.in_channels * p.out_channels * p.axis[0].taps *
                        p.axis[1].taps * p.axis[2].taps * p.axis[0].out_size * p.axis[1].out_size * p.axis[2].out_size;
    const int64_t grain = work < 200e3 ? items : 1;
    std::atomic<bool> enough{true};
    parallel_ranges(items, grain, [&](int64_t begin, int64_t end) {
        void* scratch = thread_scratch(scratch_bytes);
        if (scratch == nullptr && scratch_bytes > 0) {
            enough = false;
            return;
        }
        algorithm.run(p, begin, end, scratch);
    });
    return enough;
}

int64_t grad_input_phases(const ConvParams& forward) {
    return forward.axis[0].step * forward.axis[1].step * forward.axis[2].step;
}

GradInputPhase grad_input_phase(const ConvParams& forward, int64_t phase) {
    GradInputPhase result{};
    ConvParams& p = result.problem;
    p = forward;
    p.activation = Activation::none;
    p.bias = p.residual = nullptr;
    p.in_channels = forward.out_channels;
    p.out_channels = forward.in_channels;
    p.in_batch_stride = forward.out_batch_stride;
    p.out_batch_stride = forward.in_batch_stride;
    result.flipped = grad_input_phases(forward) == 1;
    for (int i = 2; i >= 0; --i) {
        const int64_t stride = forward.axis[i].step, along = phase % stride;
        phase /= stride;
        p.axis[i] = grad_input_axis(forward.axis[i], along);
        if (!result.flipped &&
            stride == 1) {  // beside a strided axis the kernel is not reversed: walk its taps backward
            p.axis[i].offset = -forward.axis[i].offset;
            p.axis[i].offset_step = -forward.axis[i].offset_step;
        }
        result.output_offset += along * forward.axis[i].in_stride;
    }
    return result;
}

bool grad_weight(Isa isa, const GradWeightParams& p) {
    const KernelSet& set = kernel_set(isa);
    const GradAlgorithm* algorithm = nullptr;
    for (int i = 0; i < set.grad_algorithm_count && algorithm == nullptr; ++i)
        if (set.grad_algorithms[i].unsupported(p) == nullptr) algorithm = &set.grad_algorithms[i];
    if (algorithm == nullptr) return false;
    const int64_t taps = p.axis[0].kernel * p.axis[1].kernel * p.axis[2].kernel;
    const int64_t finish_items = algorithm->finish_items(p);
    const size_t partial_bytes = static_cast<size_t>(algorithm->partial_floats(p) * 4 + 63) / 64 * 64;
    const size_t row_bytes = p.density_grad ? static_cast<size_t>(finish_items * taps * 8) : 0;
    char* memory = static_cast<char*>(thread_scratch(static_cast<int64_t>(partial_bytes + row_bytes)));
    if (memory == nullptr) return false;
    float* partials = reinterpret_cast<float*>(memory);
    double* rows = row_bytes ? reinterpret_cast<double*>(memory + partial_bytes) : nullptr;
    const int64_t scratch_bytes = algorithm->scratch_bytes ? algorithm->scratch_bytes(p) : 0;
    std::atomic<bool> enough{true};
    parallel_ranges(algorithm->items(p), 1, [&](int64_t begin, int64_t end) {
        void* scratch = thread_scratch(scratch_bytes, 1);
        if (scratch == nullptr && scratch_bytes > 0) {
            enough = false;
            return;
        }
        algorithm->run(p, partials, begin, end, scratch);
    });
    if (!enough) return false;
    parallel_ranges(finish_items, 1,
                    [&](int64_t begin, int64_t end) { algorithm->finish(p, partials, rows, begin, end); });
    for (int64_t k = 0; rows != nullptr && k < taps; ++k) {
        double sum = 0;
        for (int64_t i = 0; i < finish_items; ++i) sum += rows[i * taps + k];
        static_cast<float*>(p.density_grad)[k] = static_cast<float>(sum);
    }
    return true;
}

}  // namespace weighted_conv
}  // namespace pdn
