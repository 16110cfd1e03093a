// Weighted convolution on CUDA: launchers for the layers at which a matrix-product kernel is poor, the skinny first and
// last layers of image networks and depthwise ones. Raw pointers only; no torch.
//
// Tensors are channels_last (channel stride 1) with 64-bit strides; the weight stays as torch holds it, contiguous
// [C_out, C_in / groups, kernel], and is multiplied by the density while it is read into shared memory.
#pragma once

#include <cstdint>

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

}  // namespace cuda
}  // namespace weighted_conv
}  // namespace pdn
