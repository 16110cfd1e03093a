// Quantization to int8 and back on CUDA. Raw pointers only; no torch.
//
// Tensors are dense rows of channels: pixels of a channels_last image, or tokens.
#pragma once

#include <cstdint>

#include "../core/activation.h"
#include "../core/cuda_elements.h"

namespace pdn {
namespace quantize {
namespace cuda {

using pdn::cuda::Element;

constexpr int kGeglu = static_cast<int>(Activation::geglu);  // the first half of the channels times GELU of the second

struct Problem {
    Element type;  // of the floating-point side
    int64_t rows, channels;
    int activation;              // what is quantized is activation(input) * channel_scale
    const void* input;           // floats [rows, channels], twice as many where kGeglu; dequantize: codes
    void* output;                // codes [rows, channels]; dequantize: floats
    const float* channel_scale;  // [channels] or null
    const float* scale;          // one, or [rows] where per_row
    const int32_t* zero_point;   // as many, or null: symmetric codes
    bool per_row;
    float* row_scale;         // dynamic: [rows], written
    int32_t* row_zero_point;  // dynamic: [rows], written
    bool symmetric;           // dynamic
};

// Each returns null, or why nothing was launched. `stream` is a cudaStream_t; the call does not wait.
const char* run_static(const Problem& p, void* stream);
const char* run_dynamic(const Problem& p, void* stream);
const char* run_dequantize(const Problem& p, void* stream);

}  // namespace cuda
}  // namespace quantize
}  // namespace pdn
