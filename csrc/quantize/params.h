// Quantization to int8 and back: plain structs between the bindings, the dispatcher and the per-ISA kernels.
//
// A tensor is rows (the pixels of a channels_last image, or tokens) of adjacent channels.
#pragma once

#include <cstdint>

#include "../core/activation.h"

namespace pdn {
namespace quantize {

using pdn::Activation;

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct QuantizeParams {
    DType dtype;                 // of the input
    Activation activation;       // geglu: input rows hold 2 * channels, the second half are gates
    int64_t rows, channels;      // of the output
    int64_t row_stride;          // of the input, elements
    const void* input;           // [rows, channels]; geglu: [rows, 2 * channels]
    const float* channel_scale;  // [channels] or null
    // Given scales: scale[row * scale_step], and zero points likewise or null (symmetric).
    const float* scale;
    const int32_t* zero_point;
    int64_t scale_step;  // 0: one scale; 1: one a row
    // Dynamic scales (scale is null): one a row, written here.
    bool symmetric;
    float* out_scale;
    int32_t* out_zero_point;
    int8_t* output;  // [rows, channels], dense
};

struct DequantizeParams {
    DType dtype;  // of the output
    int64_t rows, channels, row_stride;
    const int8_t* input;
    const float* scale;
    const int32_t* zero_point;  // or null: zero
    int64_t scale_step;
    void* output;  // [rows, channels], dense
};

// The kernels of one ISA level. Rows are independent: any split gives the same bits.
struct KernelSet {
    int width;                                          // floats per vector
    int64_t (*scratch_bytes)(const QuantizeParams& p);  // per thread
    void (*quantize)(const QuantizeParams& p, int64_t begin, int64_t end, void* scratch);
    void (*dequantize)(const DequantizeParams& p, int64_t begin, int64_t end);
};

}  // namespace quantize
}  // namespace pdn
