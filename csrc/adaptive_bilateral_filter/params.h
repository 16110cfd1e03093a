// A bilateral filter with a width of its own at every pixel: plain structs between the bindings, the dispatcher and the
// per-ISA kernels. Strides count elements.
#pragma once

#include <cstdint>

namespace pdn {
namespace adaptive_bilateral_filter {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr int64_t kLargestRadius = 127;
constexpr int64_t kBatch = -1, kPerImage = -2;  // radii that are read from sigma
constexpr float kEpsilon = 1e-8f;               // added to the sum of weights

// [batch, channels, height, width]
struct Image {
    void* data;
    int64_t stride[4];
};

struct Params {
    DType dtype;
    int64_t batch, channels, height, width;
    int64_t tile_height, tile_width;  // pixels that share a sigma
    int64_t radius;                   // or kBatch, kPerImage
    Image input;
    const float* sigma;  // [batch, height / tile_height, width / tile_width, 3]
    Image output;        // of the backward pass an input
    float* norm;         // [batch, height, width], the sums of weights; null: not wanted
    // of the backward pass
    Image grad;
    Image dinput;   // data null: not wanted
    float* dsigma;  // as sigma; null: not wanted
};

// A rectangle of one image: what one call of a kernel computes.
struct Block {
    int64_t image, top, bottom, left, right;
    int64_t radius;
    // Where the sums of sigma's gradient go: [cells down, cells across, 3]. A cell is a tile of sigma or, where those
    // are larger than a block, the part that lies in it.
    float* cells;
    int64_t cell_height, cell_width, cell_stride;
};

// The kernels of one ISA level.
struct KernelSet {
    int width;  // floats per vector
    // The largest spatial sigma of `count` triples; 0 if none is positive.
    float (*largest)(const float* sigma, int64_t count);
    // `scratch` holds as many floats as the function below says, 64-byte aligned.
    void (*forward)(const Params& p, const Block& block, float* scratch);
    void (*backward)(const Params& p, const Block& block, float* scratch);
    int64_t (*forward_floats)(int64_t channels, int64_t rows, int64_t columns, int64_t radius);
    int64_t (*backward_floats)(int64_t channels, int64_t rows, int64_t columns, int64_t radius);
};

}  // namespace adaptive_bilateral_filter
}  // namespace pdn
