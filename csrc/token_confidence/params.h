// Tokens and confidences from logits: plain structs between the bindings, the dispatcher and the per-ISA kernels.
// Strides count elements.
#pragma once

#include <cstdint>

namespace pdn {
namespace token_confidence {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr int kMostTokens = 4;

struct Tokens {
    int count;
    int64_t v[kMostTokens];
};

struct Params {
    DType dtype;
    int64_t rows, vocabulary;   // of the results; columns
    int64_t source_rows;        // of the logits
    const void* logits;         // [source_rows, vocabulary], columns adjacent
    const void* unconditional;  // likewise, or null
    int64_t stride, unconditional_stride;
    const int64_t* index;  // [rows], which row of the logits; or null: all of them. Out of range: no answer
    const int64_t* keys;   // [rows, 2], seed and number of each row's noise; or null: `seed`, and 0, 1, 2, ...
    int64_t seed;
    uint32_t step;
    float guidance;     // logits are unconditional + (guidance + 1) (logits - unconditional)
    float temperature;  // of the noise; 0: none
    Tokens forbidden, uncounted;
    int64_t eos;             // or -1
    int64_t* token;          // [rows]
    float* confidence;       // [rows]
    float* eos_probability;  // [rows], where eos >= 0
};

// What is known of a piece of a row: the largest counted logit, the sum of exp(logit - top), the largest noised logit,
// the logit and the column that it belongs to. The sum is NaN where a logit is.
struct Partial {
    float top, sum, best, chosen;
    int64_t index;  // -1: nothing above -inf
};

constexpr int64_t kPiece = 16384;  // columns; results do not depend on how pieces are spread over threads

// The kernels of one ISA level.
struct KernelSet {
    int width;  // floats per vector
    void (*piece)(const Params& p, int64_t row, int64_t first, Partial* partial);
    void (*finish)(const Params& p, int64_t row, const Partial* partials, int64_t count);
};

}  // namespace token_confidence
}  // namespace pdn
