// A stage of a Runge-Kutta step over images, and its gradient: plain structs between the bindings, the dispatcher and
// the per-ISA kernels. Every tensor is dense [batch, pixels, channels].
#pragma once

#include <cstdint>

namespace pdn {
namespace ode_stage {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr int kMostSlopes = 4;

// Channels of the point that are combined with the same weights: point[first + c] = state[first + c] +
// drift state[first + c + channels] + sum over i of weight[i] slope[i][c].
struct Part {
    int64_t first, channels;
    float drift;
    float weight[kMostSlopes];
};

// output = (point - mean) / sqrt(variance + eps) * (1 + scale) + shift, over the pixels of each image and channel.
struct StageParams {
    DType dtype;
    int64_t batch, pixels, channels;  // channels: of the state
    int slopes;
    int64_t slope_channels;
    const void* state;
    const void* slope[kMostSlopes];
    int parts;
    Part part[2];
    double eps;
    const float* film;  // [batch, 2 * channels], scale and shift; or null
    bool has_plane;     // output has one more channel, which holds `plane`
    float plane;
    void* point;     // [batch, pixels, channels], or null if not wanted
    void* output;    // [batch, pixels, channels + plane], or null: the point only
    float* moments;  // [batch, 2, channels]: mean, 1 / deviation; beside output
};

struct GradParams {
    DType dtype;
    int64_t batch, pixels, channels;
    int64_t grad_channels;  // channels and plane
    const void* grad;       // of the output
    const void* point;      //
    const float* moments;   // [batch, 2, channels]
    const float* film;      // [batch, 2 * channels] or null
    const void* beside;     // what the gradient of the point starts from, or null
    void* grad_point;       // [batch, pixels, channels]
    float* grad_film;       // [batch, 2 * channels] or null
};

// The kernels of one ISA level. An image's pixels are split into chunks by the problem alone. The first pass makes a
// chunk's partial sums, `fold` joins those of an image into coefficients, the second pass writes a chunk with them.
// Chunks are independent, so that any split over threads gives the same bits.
struct KernelSet {
    int width;                                           // floats per vector
    int64_t (*chunk)(int64_t pixels, int64_t channels);  // pixels of a chunk
    int64_t (*partial)(int64_t channels);                // floats of a chunk's partial sums
    int64_t (*coefficients)(int64_t channels);           // floats of an image's coefficients
    void (*combine)(const StageParams& p, int64_t image, int64_t chunk, float* partial);  // no sums where it is null
    void (*fold)(const StageParams& p, int64_t image, float* partials, float* coefficients);
    void (*normalise)(const StageParams& p, int64_t image, int64_t chunk, const float* coefficients);
    void (*grad_sums)(const GradParams& p, int64_t image, int64_t chunk, float* partial);
    void (*grad_fold)(const GradParams& p, int64_t image, const float* partials, float* coefficients);
    void (*grad_write)(const GradParams& p, int64_t image, int64_t chunk, const float* coefficients);
};

}  // namespace ode_stage
}  // namespace pdn
