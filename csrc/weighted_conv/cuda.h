// Weighted convolution on CUDA: launchers for the layers at which a matrix-product kernel is poor, the skinny first and
// last layers of image networks and depthwise ones. Raw pointers only; no torch.
//
// Tensors are channels_last (channel stride 1) with 64-bit strides; the weight stays as torch holds it, contiguous
// [C_out, C_in / groups, kernel], and is multiplied by the density while it is read into shared memory.
#pragma once

#include <cstdint>
#include <numeric>

#include "params.h"

namespace pdn {
namespace weighted_conv {
namespace cuda {

enum class Storage : int { float32 = 0, bfloat16 = 1, float16 = 2 };  // sums are float32

struct Problem {
    Storage storage;  // of every tensor
    Activation activation;
    int64_t batch, in_channels, out_channels;
    int64_t in_batch_stride, out_batch_stride, residual_batch_stride;
    Axis axis[3];
    const void* input;
    const void* weight;
    const void* density;   // [kernel] or null
    const void* bias;      // [C_out] or null
    const void* residual;  // of the output's shape, or null
    void* output;
};

// Gradients of a depthwise convolution (C_in == C_out) with respect to weight and density.
struct GradProblem {
    Storage storage;
    int64_t batch, channels;
    int64_t in_batch_stride, grad_batch_stride;
    Axis axis[3];  // as in the forward pass; `out` is the gradient of the output
    const void* input;
    const void* grad;
    const void* weight;
    const void* density;  // or null
    void* weight_grad;    // or null
    void* density_grad;   // or null
    float* workspace;     // depthwise_grad_workspace() floats
};

constexpr int kMaxSkinny = 4;                  // channels on the narrow side
constexpr int64_t kMaxSharedBytes = 96 << 10;  // what every architecture from sm_80 on grants a block
constexpr int kChannelBlock = 32;              // channels that a block works on at a time

// Each launcher returns null, or why nothing was launched. `stream` is a cudaStream_t; the call does not wait.
const char* skinny_in(const Problem& p, void* stream);   // C_in <= 4, groups = 1
const char* skinny_out(const Problem& p, void* stream);  // C_out <= 4, groups = 1
const char* depthwise(const Problem& p, void* stream);   // groups = C_in, C_out a multiple of C_in
int64_t depthwise_grad_workspace(const GradProblem& p);
const char* depthwise_grad(const GradProblem& p, void* stream);

// The input gradient of a depthwise convolution is a set of depthwise convolutions of the output's gradient, one per
// phase of the stride: phase r of an axis gives input positions r, r + stride, ..., from the taps k for which
// (r + padding - k * dilation) is a multiple of the stride, in descending order.
inline Axis grad_input_axis(const Axis& forward, int64_t padding, int64_t phase) {
    const int64_t stride = forward.step, dilation = forward.offset_step, kernel = forward.kernel;
    const int64_t tap_step = stride / std::gcd(stride, dilation);
    int64_t first = 0;
    while (first < tap_step && (phase + padding - first * dilation) % stride != 0) ++first;
    const int64_t taps = first < tap_step && first < kernel ? (kernel - 1 - first) / tap_step + 1 : 0;
    Axis a{};
    a.in_size = forward.out_size, a.in_stride = forward.out_stride;
    a.out_size = (forward.in_size - phase + stride - 1) / stride, a.out_stride = forward.in_stride * stride;
    a.step = 1;
    a.offset_step = tap_step * dilation / stride;
    a.offset = taps == 0 ? 0 : (phase + padding - first * dilation) / stride - (taps - 1) * a.offset_step;
    a.kernel = kernel;
    a.taps = taps;
    a.tap = first + (taps - 1) * tap_step;
    a.tap_step = -tap_step;
    return a;
}

}  // namespace cuda
}  // namespace weighted_conv
}  // namespace pdn
