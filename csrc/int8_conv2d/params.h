// int8 convolution: plain structs between the bindings, the dispatcher and the per-ISA kernels. No torch, no STL.
//
// Images have channel stride 1 (channels_last); strides count elements, and all indices are 64-bit. A matrix product is
// the convolution of an image of one row with a 1x1 kernel: tokens are its pixels.
#pragma once

#include <cstdint>

#include "../core/activation.h"

namespace pdn {
namespace int8_conv2d {

using pdn::Activation;

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, int8 = 3, int32 = 4 };

// One spatial axis. Output position j reads the positions j * step + offset + t * dilation, t in [0, kernel), of the
// upsampled image; a position outside of it adds nothing to the sum.
struct Axis {
    int64_t in_size, out_size;  // in_size: of the stored image, before it is upsampled
    int64_t in_stride, out_stride, residual_stride;
    int64_t step, offset, dilation, kernel;
};

// The parts of an axis that outputs next to each other read, copied into scratch: see plan.inl.
struct Parts {
    int64_t count, length;  // parts, and positions of all of them
    bool per_tap;
};

// How an algorithm cuts up the work, from sizes and threads alone: made once per call, or once for many equal calls.
struct Plan {
    int64_t items, scratch_bytes;  // scratch: per thread
    int64_t taps, steps;           // steps: of one tap
    int64_t rows, columns;         // outputs of a full strip
    int64_t strips_down, strips_across;
    int64_t blocks, chunks;  // blocks of output channels, and ranges of them per group
    Parts row_parts, column_parts;
    int64_t positions;  // input pixels of a full strip in scratch
    int64_t pitch;      // positions from one step to the next
    int64_t border_bytes, pointers_at, scales_at, zeros_at, offsets_at, codes_at;  // places in scratch
};

// Scales and zero points are read when the kernel runs. Nothing is owned: a copy of the struct can be run later, as
// long as the memory it points at lives.
struct ConvParams {
    int64_t batch, groups;
    int64_t in_channels, out_channels;  // per group
    int64_t in_batch_stride, out_batch_stride, residual_batch_stride;
    Axis rows, columns;
    int64_t upsample;  // 1, or 2: every stored pixel is read as 2x2 pixels
    int64_t threads;   // how many will share the work: decides the size of the items, never the result

    const int8_t* input;
    const void* packed;  // written by Algorithm::pack
    bool per_pixel;      // input_scale and input_zero_point are dense [batch, in rows, in columns], else one value
    const float* input_scale;         // null with int32 output
    const int32_t* input_zero_point;  // or null: 0
    const float* weight_scale;        // [groups * out_channels]; null with int32 output

    const float* bias;          // [groups * out_channels] or null
    const float* channel_bias;  // [batch, groups * out_channels] or null
    const float* film;          // [batch, 2 * groups * out_channels], gain then shift, or null
    Activation activation;
    DType residual_dtype;  // float32, bfloat16 or float16
    const void* residual;  // of the output's shape, or null
    DType out_dtype;
    const float* out_scale;         // for int8 output
    const int32_t* out_zero_point;  // or null: symmetric, codes -127..127
    void* output;

    Plan plan;  // written by Algorithm::plan
};

// One way to compute the convolution at one ISA level. The caller asks `unsupported`, allocates packed_bytes, packs,
// plans, then runs all items, in any split over threads: the result does not depend on the split. The choice and the
// packed layout depend on channels, groups, kernel and step alone, never on sizes or scales.
struct Algorithm {
    const char* name;
    const char* (*unsupported)(const ConvParams& p);  // null if it can run, else the reason (a literal)
    int64_t (*packed_bytes)(const ConvParams& p);
    int64_t (*pack_items)(const ConvParams& p);
    // weight: dense [groups * out_channels][in_channels][kernel rows][kernel columns]
    void (*pack)(const ConvParams& p, const int8_t* weight, void* packed, int64_t begin, int64_t end);
    Plan (*plan)(const ConvParams& p);
    // `call` is a number that no other call of this process has: the scratch of a call may hold what an item before
    // left there.
    void (*run)(const ConvParams& p, int64_t begin, int64_t end, void* scratch, uint64_t call);
};

// What one ISA level offers, in order of preference.
struct KernelSet {
    int width;  // 32-bit lanes per vector
    const Algorithm* algorithms;
    int algorithm_count;
};

}  // namespace int8_conv2d
}  // namespace pdn
