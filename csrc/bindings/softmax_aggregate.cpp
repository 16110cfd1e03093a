// Torch ops of the CPU kernels of softmax_aggregate. Arguments were checked and brought into layouts that kernels read
// in Python; what is checked again here is what would make a kernel touch memory that is not its own.
#include <torch/csrc/stable/library.h>

#include "../softmax_aggregate/dispatch.h"
#include "tape.h"
#include "tensors.h"

namespace pdn {
namespace bindings {
namespace {

using softmax_aggregate::DType;
using softmax_aggregate::GradParams;
using softmax_aggregate::Params;
using softmax_aggregate::Strides;

using MaybeTensor = std::optional<Tensor>;

constexpr char kNoMemory[] = "out of memory for the scratch buffers of softmax_aggregate";

DType kernel_dtype(ScalarType dtype) { return float_dtype<DType>("softmax_aggregate", dtype); }

// Of [B, C, P] or [B, N, C, P], whose pixels or whose channels are adjacent. A single pixel is a row.
Strides strides_of(const char* name, const Tensor& tensor) {
    const int64_t dims = tensor.dim(), channel = dims - 2, pixel = dims - 1;
    Strides at = {tensor.stride(0), dims == 4 ? tensor.stride(1) : 0, tensor.stride(channel), tensor.stride(pixel)};
    if (at.pixel == 1 && tensor.size(pixel) > 1) return at;
    STD_TORCH_CHECK(at.channel == 1 || tensor.size(channel) == 1, name, ": expected adjacent pixels or channels");
    at.channel = 1;
    if (at.pixel == 1) at.pixel = 0;  // of a single pixel, which is none of a plane
    return at;
}

// [batch, channels, pixels] of `rows` of adjacent channels or of planes.
Tensor empty_maps(std::vector<int64_t> shape, bool planes, ScalarType dtype) {
    if (planes) return empty_row_major(shape, dtype);
    std::vector<int64_t> strides(shape.size());
    const size_t pixel = shape.size() - 1, channel = pixel - 1;
    strides[channel] = 1;
    strides[pixel] = shape[channel];
    int64_t elements = shape[channel] * shape[pixel];
    for (size_t axis = channel; axis-- > 0;) {
        strides[axis] = elements;
        elements *= shape[axis];
    }
    return empty_strided(shape, strides, dtype);
}

float* shares_data(const char* name, const Tensor& tensor, int64_t count) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count,
                    name, ": expected ", count, " contiguous float32");
    return static_cast<float*>(tensor.data_ptr());
}

void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape, ScalarType dtype) {
    STD_TORCH_CHECK(shape_of(tensor) == shape && tensor.scalar_type() == dtype, name, ": wrong shape or dtype");
}

std::tuple<Tensor, Tensor> aggregate(const Tensor& features, const Tensor& hidden, const MaybeTensor& weight,
                                     bool planes) {
    STD_TORCH_CHECK(features.dim() == 4 && hidden.dim() == 3, "features: expected [B, N, C, P] and hidden [B, K, P]");
    const ScalarType dtype = features.scalar_type();
    Params p{};
    p.dtype = kernel_dtype(dtype);
    p.batch = features.size(0), p.maps = features.size(1), p.channels = features.size(2), p.pixels = features.size(3);
    p.depth = hidden.size(1);
    check_shape("hidden", hidden, {p.batch, weight ? p.depth : p.maps, p.pixels}, dtype);
    if (weight)
        STD_TORCH_CHECK(weight->scalar_type() == ScalarType::Float && weight->is_contiguous() &&
                            weight->numel() == p.maps * p.depth,
                        "weight: expected contiguous float32 [N, K]");
    Tensor out = empty_maps({p.batch, p.channels, p.pixels}, planes, dtype);
    Tensor shares = empty_row_major({p.batch, p.maps, p.pixels}, ScalarType::Float);
    if (features.numel() == 0) return {out, shares};
    p.features_at = strides_of("features", features), p.hidden_at = strides_of("hidden", hidden);
    p.out_at = strides_of("out", out);
    STD_TORCH_CHECK(has_planes(p.features_at) == has_planes(p.out_at), "planes: not as features are laid out");
    p.features = features.data_ptr(), p.hidden = hidden.data_ptr(), p.out = out.data_ptr();
    p.weight = weight ? static_cast<const float*>(weight->data_ptr()) : nullptr;
    p.shares = static_cast<float*>(shares.data_ptr());
    run_and_record([p] { STD_TORCH_CHECK(softmax_aggregate::run(active_isa(), p), kNoMemory); }, features, hidden,
                   weight, out, shares);
    return {out, shares};
}

std::tuple<Tensor, Tensor> aggregate_backward(const Tensor& grad, const MaybeTensor& grad_shares,
                                              const Tensor& features, const Tensor& shares, bool planes,
                                              bool wants_features) {
    STD_TORCH_CHECK(features.dim() == 4 && grad.dim() == 3, "features: expected [B, N, C, P] and grad [B, C, P]");
    const ScalarType dtype = features.scalar_type();
    GradParams p{};
    p.dtype = kernel_dtype(dtype);
    p.batch = features.size(0), p.maps = features.size(1), p.channels = features.size(2), p.pixels = features.size(3);
    check_shape("grad", grad, {p.batch, p.channels, p.pixels}, dtype);
    Tensor grad_logits = empty_row_major({p.batch, p.maps, p.pixels}, ScalarType::Float);
    Tensor grad_features = wants_features ? empty_maps({p.batch, p.maps, p.channels, p.pixels}, planes, dtype)
                                          : empty_row_major({0}, dtype);
    if (features.numel() == 0) return {grad_features, grad_logits};
    p.shares = shares_data("shares", shares, grad_logits.numel());
    if (grad_shares) p.grad_shares = shares_data("grad_shares", *grad_shares, grad_logits.numel());
    p.features_at = strides_of("features", features), p.grad_at = strides_of("grad", grad);
    STD_TORCH_CHECK(has_planes(p.features_at) == has_planes(p.grad_at), "grad: not laid out as features");
    p.features = features.data_ptr(), p.grad = grad.data_ptr();
    p.grad_logits = static_cast<float*>(grad_logits.data_ptr());
    if (wants_features) {
        p.grad_features = grad_features.data_ptr();
        p.grad_features_at = strides_of("grad_features", grad_features);
        STD_TORCH_CHECK(has_planes(p.features_at) == has_planes(p.grad_features_at), "planes: not as features are");
    }
    run_and_record([p] { STD_TORCH_CHECK(softmax_aggregate::run(active_isa(), p), kNoMemory); }, grad, grad_shares,
                   features, shares, grad_features, grad_logits);
    return {grad_features, grad_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def("softmax_aggregate_cpu(Tensor features, Tensor hidden, Tensor? weight, bool planes) -> (Tensor, Tensor)");
    m.def(
        "softmax_aggregate_backward_cpu(Tensor grad, Tensor? grad_shares, Tensor features, Tensor shares, bool planes, "
        "bool wants_features) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) {
    m.impl("softmax_aggregate_cpu", TORCH_BOX(&aggregate));
    m.impl("softmax_aggregate_backward_cpu", TORCH_BOX(&aggregate_backward));
}

}  // namespace bindings
}  // namespace pdn
