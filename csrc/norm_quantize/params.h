// Normalisation, activation and quantization as one step: plain structs between the bindings, the dispatcher and the
// per-ISA kernels. Pixels and tokens are rows of adjacent channels.
#pragma once

#include <cstdint>

#include "../core/activation.h"

namespace pdn {
namespace norm_quantize {

using pdn::Activation;

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Where codes go, and under which scale.
struct CodesOut {
    const float* scale;         // one given scale, or null: one a row from its values, affine
    const int32_t* zero_point;  // beside a given scale; null: symmetric
    float* out_scale;           // [rows], where scale is null
    int32_t* out_zero_point;
    int8_t* codes;  // [rows, channels], dense
};

// Some of the channels of a batch of images. Strides count elements.
struct Panel {
    const void* data;
    int64_t channels, batch_stride, row_stride;
};

struct GroupNormParams {
    DType dtype;
    Activation activation;
    int64_t batch, pixels;
    int64_t channels, groups;  // of the panels together
    Panel panel[2];            // the second, of 0 channels where there is none, as if concatenated
    double eps;
    const float *weight, *bias;  // [channels] or null
    const float* film;           // [batch, 2 * channels] or null
    const float* channel_scale;  // [channels] or null
    CodesOut out;
};

struct LayerNormParams {
    DType dtype;
    int64_t rows, channels, row_stride;
    const void* input;
    double eps;
    const float *weight, *bias;
    const float* film;  // [rows / film_rows, 2 * channels] or null
    int64_t film_rows;  // consecutive rows that share a FiLM vector; `rows` where there is none
    const float* channel_scale;
    CodesOut out;
};

// The kernels of one ISA level.
//
// Group norm: an image's pixels are split into chunks by the problem alone. `group_statistics` fills a chunk's partial
// sums, `group_fold` turns those of all chunks of an image into coefficients, `group_write` writes a chunk's codes with
// them. Chunks are independent, so any split over threads gives the same bits.
// Layer norm: `layer_fold` makes the coefficients of the rows that share a FiLM vector, `layer_rows` writes rows.
struct KernelSet {
    int width;                                                // floats per vector
    int64_t (*group_chunk)(const GroupNormParams& p);         // pixels of a chunk
    int64_t (*group_partial)(const GroupNormParams& p);       // floats of a chunk's partial sums
    int64_t (*group_coefficients)(const GroupNormParams& p);  // floats of an image's coefficients
    int64_t (*group_scratch)(const GroupNormParams& p);       // bytes per thread
    void (*group_statistics)(const GroupNormParams& p, int64_t image, int64_t chunk, float* partial);
    void (*group_fold)(const GroupNormParams& p, int64_t image, float* partials, float* coefficients);
    void (*group_write)(const GroupNormParams& p, int64_t image, int64_t chunk, const float* coefficients,
                        void* scratch);
    int64_t (*layer_coefficients)(const LayerNormParams& p);  // floats per FiLM vector
    int64_t (*layer_scratch)(const LayerNormParams& p);       // bytes per thread
    void (*layer_fold)(const LayerNormParams& p, int64_t film, float* coefficients);
    void (*layer_rows)(const LayerNormParams& p, int64_t begin, int64_t end, const float* coefficients, void* scratch);
};

}  // namespace norm_quantize
}  // namespace pdn
