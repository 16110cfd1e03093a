// Masked, modulated layer norm of tokens with the residual sum in front of it: plain structs between the bindings, the
// dispatcher and the per-ISA kernels. Strides count elements; channels are adjacent.
#pragma once

#include <cstdint>

namespace pdn {
namespace routed_norm {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Coefficients of a sample, [channels] each; `step` is 0 where all samples share them.
struct Coefficients {
    const float* data;
    int64_t step;
};

// r = mask * input + gate * update; output = (r - mean) * rstd * (1 + scale) + shift, where mean and rstd are those of
// `total` channels, of which all that are not among `channels` are 0; carried = input + gate * update.
struct Params {
    DType dtype;
    int64_t batch, tokens, channels, total;
    const void* input;  // [batch, tokens, channels]
    int64_t input_batch, input_token;
    const void* update;  // likewise, or null
    int64_t update_batch, update_token;
    Coefficients mask, gate;  // data may be null: no mask; no update
    Coefficients scale, shift;
    double eps;
    void* output;   // dense
    void* carried;  // dense, where there is an update
    float* stats;   // [batch, tokens, 2], dense: -mean * rstd, rstd
};

struct GradParams {
    Params forward;         // output, carried and eps are not read; stats are
    const void* grad;       // of output: dense
    const void* carried;    // of carried: dense, or null
    const float* constant;  // of -mean * rstd: [batch, tokens], dense, or null
    void* grad_input;       // dense
    void* grad_update;      // dense, where there is an update
    float* partials;        // [batch, chunks, 3, channels]: gradients of shift, scale and gate by chunk of tokens
};

constexpr int64_t kChunk = 64;  // tokens whose gradients of the coefficients are added up in one go

inline int64_t chunks_of(int64_t tokens) { return (tokens + kChunk - 1) / kChunk; }

// The kernels of one ISA level.
struct KernelSet {
    int width;  // floats per vector
    // Tokens [begin, end) of all samples, numbered through. Scratch: channels floats, rounded up to a vector.
    void (*forward)(const Params& p, int64_t begin, int64_t end, float* scratch);
    // One chunk of one sample. Scratch: twice as much.
    void (*backward)(const GradParams& p, int64_t batch, int64_t chunk, float* scratch);
};

}  // namespace routed_norm
}  // namespace pdn
