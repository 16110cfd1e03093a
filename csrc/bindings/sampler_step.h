// What module.cpp takes from sampler_step.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace pdn {
namespace bindings {

// The class SamplerStep: a step on buffers that stay where they are.
void define_sampler_step(pybind11::module_& m);

}  // namespace bindings
}  // namespace pdn
