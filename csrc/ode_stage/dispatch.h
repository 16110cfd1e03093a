// Stages of Runge-Kutta steps for the bindings: run on all threads.
#pragma once

#include "../core/isa.h"
#include "params.h"

namespace pdn {
namespace ode_stage {

// The kernels of one ISA level.
const KernelSet& kernel_set(Isa isa);

// False if scratch memory is exhausted. No dimension may be 0.
bool run(Isa isa, const StageParams& p);
bool run(Isa isa, const GradParams& p);

}  // namespace ode_stage
}  // namespace pdn
