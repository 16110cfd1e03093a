// Tokens and confidences from logits on CUDA. Raw pointers only; no torch.
#pragma once

#include <cstdint>

#include "../core/cuda_elements.h"

namespace pdn {
namespace token_confidence {
namespace cuda {

using pdn::cuda::Element;

constexpr int kMostTokens = 4;
constexpr int kPiece = 8192;  // columns of a block of threads; the same for any number of rows, so are the results

struct Tokens {
    int count, v[kMostTokens];
};

// What is known of a piece of a row: the largest counted logit, the sum of exp(logit - top), the largest noised logit,
// the logit and the column that it belongs to (-1: nothing above -inf).
struct Partial {
    float top, sum, best, chosen;
    int32_t place;
};

struct Problem {
    Element type;
    int32_t vocabulary, pieces;
    int64_t rows, source_rows;  // of the results, of the logits
    const void* logits;         // [source_rows, vocabulary], columns adjacent; strides count elements
    const void* unconditional;  // likewise, or null
    int64_t stride, unconditional_stride;
    const int64_t* index;  // [rows], which row of the logits; or null: all. Out of range: no answer
    const int64_t* keys;   // [rows, 2], seed and number of each row's noise; or null: `seed`, and 0, 1, 2, ...
    int64_t seed;
    uint32_t step;
    float guidance, temperature;
    Tokens forbidden, uncounted;
    int32_t eos;             // or -1
    Partial* partials;       // [rows, pieces], scratch
    int64_t* token;          // [rows]
    float* confidence;       // [rows]
    float* eos_probability;  // [rows], where eos >= 0
};

// Null, or why nothing was launched. `stream` is a cudaStream_t; the call does not wait.
const char* run(const Problem& p, void* stream);

}  // namespace cuda
}  // namespace token_confidence
}  // namespace pdn
