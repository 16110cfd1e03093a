// Compiled once per ISA level: PDN_ISA names the level, and the one exported symbol carries the name.
#include "params.h"
#include "pixels.inl"
#include "planes.inl"

#define PDN_JOIN2(a, b) a##b
#define PDN_JOIN(a, b) PDN_JOIN2(a, b)

namespace pdn {
namespace wavelet_gate {
namespace {

// `body` with a null pointer to the elements' type.
template <class Body>
void with_dtype(DType dtype, const Body& body) {
    if (dtype == DType::float32)
        body(static_cast<float*>(nullptr));
    else if (dtype == DType::bfloat16)
        body(static_cast<bf16*>(nullptr));
    else
        body(static_cast<fp16*>(nullptr));
}

void forward(const Params& p, int64_t item) {
    with_dtype(p.dtype, [&](auto* null) {
        if (p.channels_last)
            p.up ? up_pixels(p, item, null) : down_pixels(p, item, null);
        else
            p.up ? up_planes(p, item, null) : down_planes(p, item, null);
    });
    if (p.past_caches) finish_past();
}

template <bool Sums, bool Out, class T>
void backward_of(const Params& p, int64_t item, T* null) {
    if (p.channels_last)
        p.up ? up_pixels_backward<Sums, Out>(p, item, null) : down_pixels_backward<Sums, Out>(p, item, null);
    else
        p.up ? up_planes_backward<Sums, Out>(p, item, null) : down_planes_backward<Sums, Out>(p, item, null);
}

void backward(const Params& p, int64_t item) {
    with_dtype(p.dtype, [&](auto* null) {
        if (p.partials == nullptr)
            backward_of<false, true>(p, item, null);
        else if (p.out.data == nullptr)
            backward_of<true, false>(p, item, null);
        else
            backward_of<true, true>(p, item, null);
    });
    if (p.past_caches) finish_past();
}

void pool(const PoolParams& p, int64_t item) {
    with_dtype(p.dtype, [&](auto* null) { p.channels_last ? pool_pixels(p, item, null) : pool_planes(p, item, null); });
}

}  // namespace

extern const KernelSet PDN_JOIN(kernels_, PDN_ISA);
const KernelSet PDN_JOIN(kernels_, PDN_ISA) = {kWidth, forward, backward, pool};

}  // namespace wavelet_gate
}  // namespace pdn
