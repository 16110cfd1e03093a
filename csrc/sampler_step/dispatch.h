// A step of a sampler for the bindings: run on all threads.
#pragma once

#include "../core/isa.h"
#include "params.h"

namespace pdn {
namespace sampler_step {

// The kernels of one ISA level.
const KernelSet& kernel_set(Isa isa);

// Whether the streams are so long that what is written is out of the caches before the next step anyway.
bool exceeds_caches(const Params& p);

struct Result {
    bool enough_memory, finite;
};

// `sums` is [units, sum_count], or null if there are none. `finite`: x' and m are.
Result run(Isa isa, const Params& p, double* sums);

}  // namespace sampler_step
}  // namespace pdn
