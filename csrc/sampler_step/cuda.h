// One step of a sampler on CUDA. Raw pointers only; no torch.
#pragma once

#include <cstdint>

#include "../core/cuda_elements.h"
#include "../core/philox.h"
#include "params.h"

namespace pdn {
namespace sampler_step {
namespace cuda {

using pdn::cuda::Element;

constexpr int kThreads = 128, kPiece = 4 * kThreads;  // threads of a block, columns that they work on

// Tensors [batch, size] are dense unless they have a stride; those of the dtype `state` are sample, base, noise, the
// slots of the history, out, kept and preview. `out` may be `sample`, `kept` may be `base`. Strides count elements.
//
// A unit is the part of a sample that one row of the table speaks for. Pieces begin at multiples of the columns that
// share counters, so a unit may begin and end within one.
struct Problem {
    Element state, output_type, unconditional_type, input_type;
    Statistics statistics;
    int64_t batch, units;      // units: a multiple of batch
    int32_t size, unit_size;   // elements of a sample, of a unit
    int32_t units_per_sample;  // units / batch
    int32_t pieces;            // of a unit
    const void* sample;
    const void* output;         // or null; with learned_variance a sample of it is twice as long, its second half v
    const void* unconditional;  // or null
    int64_t output_stride, unconditional_stride;  // from sample to sample
    const void* base;                             // or null
    const void* noise;                            // or null
    void* history;                                // [slots, batch, size] or null
    int32_t slots;
    const float* threshold;  // [batch] or null
    const float* table;      // [table_rows, kRowWidth]
    int64_t table_rows;
    const int64_t* rows;  // [units], or one; out of range: the results are NaN
    bool one_row;
    const int64_t* keys;  // [batch, 2], seed and number of each sample; or null: no generated noise
    const int64_t* step;  // one; its low 32 bits count
    bool learned_variance;
    void* out;
    void* kept;         // or null
    void* preview;      // or null
    void* model_input;  // [copies, batch, size] or null
    int32_t copies;
    int32_t* faults;    // one, or null: the least step whose x' or m is not finite
    double* partials;   // [units, pieces, sums], scratch; null where `pieces` is 1
    double* statistic;  // [units, sums], or null
};

// Fills in what follows from the other sizes.
inline void divide(Problem& p) {
    constexpr int32_t kBlock = static_cast<int32_t>(kNoiseBlock);
    p.units_per_sample = static_cast<int32_t>(p.units / p.batch);
    p.unit_size = p.size / p.units_per_sample;
    const int32_t span = p.unit_size + (p.unit_size % kBlock ? kBlock - 1 : 0);  // with what a block has before it
    p.pieces = (span + kPiece - 1) / kPiece;
}

// Sums of a unit.
PDN_ANYWHERE static inline int sum_count(const Problem& p) {
    return p.statistics == Statistics::none ? 0 : p.statistics == Statistics::moments ? 2 : 1 + p.slots;
}

// Elements of `partials`.
inline int64_t workspace_doubles(const Problem& p) { return p.pieces > 1 ? p.units * p.pieces * sum_count(p) : 0; }

// Null, or why nothing was launched. `stream` is a cudaStream_t; the call does not wait and reads nothing of the
// device.
const char* run(const Problem& p, void* stream);

}  // namespace cuda
}  // namespace sampler_step
}  // namespace pdn
