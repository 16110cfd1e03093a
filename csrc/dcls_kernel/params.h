// Construction of DCLS kernels (dilated convolution with learnable spacings): plain structs between the bindings, the
// dispatcher and the per-ISA kernels. Everything is float32 and row-major.
#pragma once

#include <cstdint>

namespace pdn {
namespace dcls_kernel {

// One axis of the kernel. Tap i has distance i - centre - position from a component and the factor
// exp(-(distance / s)^2 / 2) or max(0, s - |distance|), where s = |width| + spread.
struct Axis {
    int64_t size;
    int64_t centre;
    const float* position;  // [pairs, components]; null for an axis that is not there: one tap of factor 1
    const float* width;     // likewise, or null: zeros
    float* position_grad;   // likewise, written by `backward`
    float* width_grad;      // where there is a width
};

// A pair of an output and an input channel has one kernel, the sum of its components: weight / n times the product of
// the axes' factors, n the sum of that product over all taps plus 1e-7, or 1 where kernels are not normalized.
struct Params {
    bool gauss, normalized;
    float spread;
    int64_t pairs, components;
    Axis axis[3];         // axis 2 is the innermost
    const float* weight;  // [pairs, components]
    float* kernel;        // [pairs, taps], written by `forward`
    const float* grad;    // [pairs, taps], of the kernel, read by `backward`
    float* weight_grad;   // [pairs, components], written by `backward`
};

// The kernels of one ISA level. An item is as many pairs as a vector has lanes; results do not depend on how items are
// spread over threads.
struct KernelSet {
    int width;  // floats per vector
    int64_t (*scratch_bytes)(const Params& p);
    void (*forward)(const Params& p, int64_t item, float* scratch);
    void (*backward)(const Params& p, int64_t item, float* scratch);
};

}  // namespace dcls_kernel
}  // namespace pdn
