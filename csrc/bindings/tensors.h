// Helpers between torch tensors (stable ABI) and raw pointers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace pdn {
namespace bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An uninitialised CPU tensor [N, C, *spatial] whose memory is channels_last, for any number of spatial axes.
inline Tensor empty_channels_last(const std::vector<int64_t>& shape, ScalarType dtype) {
    std::vector<int64_t> strides(shape.size());
    int64_t stride = shape[1];
    for (size_t axis = shape.size() - 1; axis >= 2; --axis) {
        strides[axis] = stride;
        stride *= shape[axis];
    }
    strides[1] = 1;
    strides[0] = stride;
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                           torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                                           aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

// `tensor` itself if its channels are adjacent in memory, else a copy in which they are.
inline Tensor with_adjacent_channels(const Tensor& tensor) {
    if (tensor.stride(1) == 1 || tensor.size(1) == 1) return tensor;
    std::vector<int64_t> shape;
    for (int64_t axis = 0; axis < tensor.dim(); ++axis) shape.push_back(tensor.size(axis));
    Tensor copy = empty_channels_last(shape, tensor.scalar_type());
    torch::stable::copy_(copy, tensor);
    return copy;
}

// Row-major: `tensor` itself, or a copy.
inline Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

inline Tensor to_dtype(const Tensor& tensor, ScalarType dtype) { return torch::stable::to(tensor, dtype); }

}  // namespace bindings
}  // namespace pdn
