// Tokens and confidences for the bindings: run on all threads.
#pragma once

#include "../core/isa.h"
#include "params.h"

namespace pdn {
namespace token_confidence {

// The kernels of one ISA level.
const KernelSet& kernel_set(Isa isa);

// False if scratch memory is exhausted.
bool run(Isa isa, const Params& p);

}  // namespace token_confidence
}  // namespace pdn
