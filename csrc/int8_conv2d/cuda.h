// int8 convolution and matrix product on CUDA. Raw pointers only; no torch.
//
// The input is [N, H, W, C] with channel stride 1; the weight is dense [C_out, K_h, K_w, C_in / groups]; output and
// residual are dense [N, H_out, W_out, C_out]. A matrix product of T tokens is a 1x1 convolution of an image of T
// columns and one row. Scales and zero points are read on the device: a captured graph sees new values.
#pragma once

#include <cstdint>

#include "../core/cuda_elements.h"

namespace pdn {
namespace int8_conv2d {
namespace cuda {

using pdn::cuda::Element;

struct Problem {
    int batch, in_h, in_w, in_channels;  // of the image as stored, before the enlargement
    int out_h, out_w, out_channels, groups;
    int kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, top, left;
    int upsample_shift;  // 1: the input is read as if enlarged twice
    int activation;      // the number of an elementwise Activation
    int64_t in_stride_n, in_stride_h, in_stride_w;
    const int8_t* input;
    const int8_t* weight;
    const float* input_scale;   // one, or dense [N, H, W] where per_pixel
    const int32_t* zero_point;  // as many, or null
    bool per_pixel;
    Element out_type, residual_type;
    const float* weight_scale;  // [C_out]
    const float* bias;          // [C_out] or null
    const float* channel_bias;  // [N, C_out] or null
    const float* film;          // [N, 2 C_out] or null
    const void* residual;       // or null
    const float* out_scale;     // where out_type is int8
    const int32_t* out_zero_point;
    void* output;
    void* workspace;  // workspace_bytes() bytes
};

// What the choice of kernel depends on.
struct Device {
    int multiprocessors;
    bool wgmma;  // compute capability 9.0, and this library holds sm_90a code
};

Device current_device();

// Partial sums of layers with too few output tiles to fill the device; often 0.
int64_t workspace_bytes(const Problem& p, const Device& device);

// Returns null, or why nothing was launched. `stream` is a cudaStream_t; the call does not wait.
const char* run(const Problem& p, const Device& device, void* stream);

}  // namespace cuda
}  // namespace int8_conv2d
}  // namespace pdn
