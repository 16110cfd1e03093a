// Weighted convolution for the bindings and for harnesses: choose an algorithm, pack, run on all threads.
#pragma once

#include "../core/isa.h"
#include "params.h"

namespace pdn {
namespace weighted_conv {

// The kernels of one ISA level; every level up to the detected one can run.
const KernelSet& kernel_set(Isa isa);

// Index of the first algorithm of the level that can run `p`, or -1. Approximate ones only if allowed. The choice looks
// at channels, kernel, step and dtype, never at sizes, so that packed weights fit any image.
int choose_algorithm(Isa isa, const ConvParams& p, bool allow_approximate);

// Pack on all threads into `packed` (Algorithm::packed_bytes, 64-byte aligned).
void pack(const Algorithm& algorithm, const ConvParams& p, const WeightView& view, void* packed);

// Run on all threads. False if scratch memory is exhausted.
bool run(const Algorithm& algorithm, const ConvParams& p);

// Turn a forward problem into the problems that compute its input gradient. `forward` has the strides of x in its input
// fields and those of dy in its output fields; `emit(context, problem, flipped)` is called once per phase of the
// stride, with `input` and `output` still to be set to dy and dx plus the given element offset of the phase.
struct GradInputPhase {
    ConvParams problem;
    int64_t output_offset;  // elements from the start of dx
    bool flipped;           // the weight is to be read with the kernel reversed
};
int64_t grad_input_phases(const ConvParams& forward);
GradInputPhase grad_input_phase(const ConvParams& forward, int64_t phase);

// Weight and density gradients on all threads. False if memory is exhausted, or no algorithm of the level can run it.
bool grad_weight(Isa isa, const GradWeightParams& p);

}  // namespace weighted_conv
}  // namespace pdn
