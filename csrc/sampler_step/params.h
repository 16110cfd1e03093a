// One step of a sampler: plain structs between the bindings, the dispatcher and the kernels. The columns of a row, and
// what they do, are those of pydenoise/step_row.py. Strides count elements.
#pragma once

#include <cstdint>

namespace pdn {
namespace sampler_step {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Statistics : int { none = 0, moments = 1, dots = 2 };

constexpr int kSlots = 6;
constexpr int kMostCopies = 3;  // of the next model input
constexpr int kMostSums = 1 + kSlots;

enum Column : int {
    kGuidance = 0,
    kX0Sample = 1,
    kX0Output = 2,
    kClip = 3,
    kMSample = 4,
    kMOutput = 5,
    kMX0 = 6,
    kSlot = 7,
    kSample = 8,
    kBase = 9,
    kOutput = 10,
    kM = 11,
    kNoise = 12,
    kLogSmall = 13,
    kLogLarge = 14,
    kInputScale = 15,
    kHistory = 16,  // and the next five
    kKeptSample = 22,
    kKeptBase = 23,
    kKeptM = 24,
    kKeptOut = 25,
    kKeptHistory = 26,  // and the next five
    kRowWidth = 32,
};

// Tensors [batch, size] are dense unless they have a stride; those of the dtype `state` are sample, base, noise, the
// slots of the history, out, kept and preview. `out` may be `sample`, `kept` may be `base`.
struct Params {
    DType state, model, input_dtype;  // of the state, of the model's output, of its next input
    int64_t batch, size;              // samples, elements of one
    const void* sample;
    const void* output;         // or null; with learned_variance a sample of it is twice as long, its second half v
    const void* unconditional;  // or null
    int64_t output_stride, unconditional_stride;  // from sample to sample
    const void* base;                             // or null
    const void* noise;                            // or null
    void* history;                                // [slots, batch, size] or null
    int slots;
    const float* threshold;  // [batch] or null
    const float* table;      // [table_rows, kRowWidth]
    int64_t table_rows;
    const int64_t* rows;  // [groups], or null: `row` for all
    int64_t row, groups;  // 1, or a multiple of batch that divides batch * size
    const int64_t* keys;  // [batch, 2], seed and number of each sample; or null: no generated noise
    uint32_t step;
    bool learned_variance;
    Statistics statistics;
    void* out;
    void* kept;         // or null
    void* preview;      // or null
    void* model_input;  // [copies, batch, size] or null
    int copies;
    bool past_caches;  // what nobody reads before the next step is written past the caches
};

// A unit is the part of a sample that one row of the table speaks for.
inline int64_t units(const Params& p) { return p.groups > p.batch ? p.groups : p.batch; }
inline int sum_count(const Params& p) {
    return p.statistics == Statistics::none ? 0 : p.statistics == Statistics::moments ? 2 : 1 + p.slots;
}

// Columns of a sample that are worked on at once. They begin at multiples of it, so that results do not depend on how
// chunks are spread over threads.
constexpr int64_t kChunk = 4096;

// The kernels of one ISA level.
struct KernelSet {
    int width;  // floats per vector
    // Columns [first, first + count) of sample `b` with the row `row` of the table; the sums to `sums`. Returns whether
    // x' and m are finite.
    bool (*chunk)(const Params& p, int64_t b, int64_t row, int64_t first, int64_t count, double* sums);
};

}  // namespace sampler_step
}  // namespace pdn
