// Normalisation, activation and quantization in one step on CUDA. Raw pointers only; no torch.
//
// Group norm: images are dense [N, pixels, C]; a second one is read as if its channels followed. A statistics kernel
// writes partial means and squares per slab of pixels, a second kernel merges them and writes the codes.
// Layer norm: dense rows of C channels.
#pragma once

#include <cstdint>

#include "../core/cuda_elements.h"

namespace pdn {
namespace norm_quantize {
namespace cuda {

using pdn::cuda::Element;

struct Problem {
    Element type;                  // of input and skip
    int batch, pixels;             // layer norm: rows of one image, which share a row of film
    int first_channels, channels;  // of input alone, and together with skip
    int groups;                    // of group norm
    int activation;                // the number of an elementwise Activation
    float eps;
    const void* input;
    const void* skip;            // or null
    const float* weight;         // [C] or null
    const float* bias;           // [C] or null
    const float* film;           // [N, 2 C] or null
    const float* channel_scale;  // [C] or null
    const float* scale;          // one; null: a scale per pixel, written
    const int32_t* zero_point;   // one, or null: symmetric codes
    int8_t* output;
    float* row_scale;         // [N, pixels] where scale is null
    int32_t* row_zero_point;  // likewise
    float* workspace;         // group norm: workspace_floats()
};

constexpr int kMaxChannels = 6144;  // of group norm: what a block keeps in shared memory

int64_t workspace_floats(const Problem& p, int multiprocessors);

// Each returns null, or why nothing was launched. `stream` is a cudaStream_t; the call does not wait.
const char* group_norm(const Problem& p, int multiprocessors, void* stream);
const char* layer_norm(const Problem& p, void* stream);

int current_multiprocessors();

}  // namespace cuda
}  // namespace norm_quantize
}  // namespace pdn
