// Weighted convolution: plain structs between the bindings, the dispatcher and the per-ISA kernels. No torch, no STL.
//
// Every tensor has channel stride 1 (channels_last); strides count elements, and all indices are 64-bit. 1-D and 2-D
// convolutions set the outer axes to size 1. Axis 2 is the innermost.
#pragma once

#include <cstdint>

#include "../core/activation.h"

namespace pdn {
namespace weighted_conv {

using pdn::Activation;

enum class DType : int { float32 = 0, bfloat16 = 1 };

// One spatial axis. Output position j reads input positions j * step + offset + t * offset_step, t in [0, taps), and
// skips those outside [0, in_size); tap t uses the weight of kernel position tap + t * tap_step.
// Forward: step = stride, offset = -padding, offset_step = dilation, taps = kernel, tap = 0, tap_step = 1.
// The input gradient of a strided convolution is a set of such problems, one per phase, with fewer taps.
struct Axis {
    int64_t in_size, out_size;
    int64_t in_stride, out_stride, residual_stride;
    int64_t step, offset, offset_step;
    int64_t kernel;  // taps of the whole kernel along this axis: what the packed weight holds
    int64_t taps, tap, tap_step;
};

struct ConvParams {
    DType dtype;  // of input, weight, density, bias, residual and output
    Activation activation;
    int64_t batch, groups;
    int64_t in_channels, out_channels;  // per group
    int64_t in_batch_stride, out_batch_stride, residual_batch_stride;
    Axis axis[3];
    const void* input;
    const void* packed;    // written by Algorithm::pack
    const void* bias;      // [groups * out_channels] or null
    const void* residual;  // of the output's shape, or null
    void* output;
};

// The weight as it is read while packing: element (group g, output channel o, input channel c, kernel position k) lies
// at weight[g * group_stride + o * out_stride + c * in_stride + k * tap_stride], its density factor at
// density[k * tap_stride]. tap_stride is -1, with pointers at the last tap, where the kernel is to be flipped.
struct WeightView {
    const void* weight;
    const void* density;  // null: all ones
    int64_t group_stride, out_stride, in_stride, tap_stride;
};

// One way to compute the convolution at one ISA level. The caller asks `unsupported`, allocates packed_bytes, packs,
// then runs all items, in any split over threads: the result does not depend on the split.
struct Algorithm {
    const char* name;
    const char* (*unsupported)(const ConvParams& p);  // null if it can run, else the reason (a literal)
    int64_t (*packed_bytes)(const ConvParams& p);
    int64_t (*pack_items)(const ConvParams& p);
    void (*pack)(const ConvParams& p, const WeightView& w, void* packed, int64_t begin, int64_t end);
    int64_t (*items)(const ConvParams& p);
    int64_t (*scratch_bytes)(const ConvParams& p);  // per thread
    void (*run)(const ConvParams& p, int64_t begin, int64_t end, void* scratch);
    bool approximate = false;  // trades accuracy for speed (Winograd): used only where the caller allows it
};

// The weight gradient: G[o, c, k] = sum over pixels of dy[pixel, o] * x[pixel at tap k, c], then
// weight_grad = density * G and density_grad[k] = sum over o, c of W * G.
struct GradWeightParams {
    DType dtype;
    int64_t batch, groups;
    int64_t in_channels, out_channels;  // per group
    int64_t in_batch_stride, out_batch_stride;
    Axis axis[3];
    const void* input;
    const void* grad;     // dy, laid out as the output
    const void* weight;   // contiguous [C_out, C_in / groups, kernel]; read for density_grad only
    const void* density;  // [kernel] or null
    void* weight_grad;    // contiguous, or null if not wanted
    void* density_grad;   // [kernel], or null if not wanted
};

// One way to compute the weight gradient at one ISA level (float32). Pixels are split into chunks by the problem alone,
// never by the number of threads; each chunk owns partial_floats of accumulators. `run` fills them, in any split of its
// items, with scratch_bytes of memory of its own for each thread; `finish` adds the chunks in order and writes
// weight_grad, and one row of kernel-many sums per finish item from which the dispatcher adds up density_grad.
struct GradAlgorithm {
    const char* name;
    const char* (*unsupported)(const GradWeightParams& p);
    int64_t (*partial_floats)(const GradWeightParams& p);  // of all chunks together
    int64_t (*items)(const GradWeightParams& p);
    void (*run)(const GradWeightParams& p, float* partials, int64_t begin, int64_t end, void* scratch);
    int64_t (*finish_items)(const GradWeightParams& p);
    void (*finish)(const GradWeightParams& p, const float* partials, double* density_rows, int64_t begin, int64_t end);
    int64_t (*scratch_bytes)(const GradWeightParams& p) = nullptr;  // per thread; null: none
};

// What one ISA level offers, each list in order of preference.
struct KernelSet {
    int width;  // floats per vector
    const Algorithm* algorithms;
    int algorithm_count;
    const GradAlgorithm* grad_algorithms;
    int grad_algorithm_count;
};

}  // namespace weighted_conv
}  // namespace pdn
