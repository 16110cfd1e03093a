// Helpers between torch tensors (stable ABI) and raw pointers.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../core/pool.h"

namespace pdn {
namespace bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch_from_blob came with torch 2.11; under 2.10 every tensor comes from torch's own allocator.
using FromBlob = AOTITorchError (*)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t,
                                    AtenTensorHandle*, int32_t, const uint8_t*, int64_t, void (*)(void*, void*), void*);

inline FromBlob from_blob_with_deleter() {
    static const auto function = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
    return function;
}

inline int64_t element_bytes(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Char:
        case ScalarType::Byte:
            return 1;
        case ScalarType::BFloat16:
        case ScalarType::Half:
            return 2;
        default:
            return 4;
    }
}

// An uninitialised CPU tensor [N, C, *spatial] whose memory is channels_last, for any number of spatial axes. Large
// ones come from the pool of buffers and go back to it.
inline Tensor empty_channels_last(const std::vector<int64_t>& shape, ScalarType dtype) {
    const int64_t dims = static_cast<int64_t>(shape.size());
    std::vector<int64_t> strides(shape.size());
    int64_t elements = shape[1];
    for (size_t axis = shape.size() - 1; axis >= 2; --axis) {
        strides[axis] = elements;
        elements *= shape[axis];
    }
    strides[1] = 1;
    strides[0] = elements;
    elements *= shape[0];
    const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    const int64_t bytes = elements * element_bytes(dtype);
    AtenTensorHandle handle = nullptr;
    if (bytes >= kPoolSmallest && pool_limit() > 0 && from_blob_with_deleter() != nullptr) {
        void* data = pool_take(bytes);
        STD_TORCH_CHECK(data != nullptr, "out of memory: an output of ", bytes, " bytes");
        STABLE_TORCH_ERROR_CODE_CHECK(from_blob_with_deleter()(
            data, dims, shape.data(), strides.data(), 0, type, aoti_torch_device_type_cpu(), -1, &handle,
            aoti_torch_layout_strided(), nullptr, 0, [](void* memory, void*) { pool_give(memory); }, nullptr));
    } else {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, shape.data(), strides.data(), type,
                                                               aoti_torch_device_type_cpu(), 0, &handle));
    }
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
inline Tensor dense(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor to_dtype(const Tensor& tensor, ScalarType dtype) { return torch::stable::to(tensor, dtype); }

}  // namespace bindings
}  // namespace pdn
