// Helpers between torch tensors (stable ABI) and raw pointers.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "../core/pool.h"
#include "../core/tape.h"

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

// The dtype as kernels of `op` name it; an error where it is none of theirs.
template <class DType>
DType float_dtype(const char* op, ScalarType dtype) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                    "cpu kernels of ", op, " take float32, bfloat16 and float16");
    return dtype == ScalarType::Float ? DType::float32 : dtype == ScalarType::Half ? DType::float16 : DType::bfloat16;
}

// An uninitialised CPU tensor. While this thread records a tape, its memory belongs to the tape; else large ones come
// from the pool of buffers and go back to it.
inline Tensor empty_strided(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) {
    const int64_t dims = static_cast<int64_t>(shape.size());
    const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    int64_t bytes = element_bytes(dtype);
    for (int64_t size : shape) bytes *= size;
    const auto from_blob = from_blob_with_deleter();
    AtenTensorHandle handle = nullptr;
    const auto wrap = [&](void* data, void (*give)(void*, void*), void* context) {
        STD_TORCH_CHECK(data != nullptr, "out of memory: an output of ", bytes, " bytes");
        STABLE_TORCH_ERROR_CODE_CHECK(from_blob(data, dims, shape.data(), strides.data(), 0, type,
                                                aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
                                                nullptr, 0, give, context));
    };
    if (Tape* tape = recording(); tape != nullptr && from_blob != nullptr) {
        wrap(
            tape->arena->take(bytes),
            [](void* memory, void* context) {
                auto* arena = static_cast<std::shared_ptr<Arena>*>(context);
                (*arena)->give(memory);
                delete arena;
            },
            new std::shared_ptr<Arena>(tape->arena));
    } else if (bytes >= kPoolSmallest && pool_limit() > 0 && from_blob != nullptr) {
        wrap(pool_take(bytes), [](void* memory, void*) { pool_give(memory); }, nullptr);
    } else {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, shape.data(), strides.data(), type,
                                                               aoti_torch_device_type_cpu(), 0, &handle));
    }
    return Tensor(handle);
}

// An uninitialised CPU tensor [N, C, *spatial] whose memory is channels_last, for any number of spatial axes.
inline Tensor empty_channels_last(const std::vector<int64_t>& shape, ScalarType dtype) {
    std::vector<int64_t> strides(shape.size());
    int64_t elements = shape[1];
    for (size_t axis = shape.size() - 1; axis >= 2; --axis) {
        strides[axis] = elements;
        elements *= shape[axis];
    }
    strides[1] = 1;
    strides[0] = elements;
    return empty_strided(shape, strides, dtype);
}

// An uninitialised row-major CPU tensor.
inline Tensor empty_row_major(const std::vector<int64_t>& shape, ScalarType dtype) {
    std::vector<int64_t> strides(shape.size());
    int64_t elements = 1;
    for (size_t axis = shape.size(); axis-- > 0;) {
        strides[axis] = elements;
        elements *= shape[axis];
    }
    return empty_strided(shape, strides, dtype);
}

// An uninitialised CPU tensor as torch.empty_like makes it, the last axis innermost: of the strides of `like` where
// that is dense, else dense with its axes in the same order.
inline Tensor empty_in_order(const Tensor& like) {
    std::vector<int64_t> shape, strides, axes;
    for (int64_t axis = 0; axis < like.dim(); ++axis) {
        shape.push_back(like.size(axis));
        strides.push_back(like.stride(axis));
        axes.insert(axes.begin(), axis);
    }
    for (size_t i = 2; i < axes.size(); ++i)  // by stride; an axis of stride 0 says nothing and stays where it is
        for (size_t inner = i, outer = i; inner-- > 1;) {
            const int64_t a = strides[axes[inner]], b = strides[axes[outer]];
            if (a == 0 || b == 0) continue;
            if (a < b || (a == b && shape[axes[inner]] <= shape[axes[outer]])) break;
            std::swap(axes[inner], axes[outer]);
            outer = inner;
        }
    bool dense = true;
    int64_t elements = 1;
    std::vector<int64_t> packed(strides.size());
    for (const int64_t axis : axes) {
        packed[axis] = elements;
        dense = dense && (shape[axis] == 1 || strides[axis] == elements);
        elements *= shape[axis];
    }
    return empty_strided(shape, dense ? strides : packed, like.scalar_type());
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
    std::vector<int64_t> shape;
    for (int64_t axis = 0; axis < tensor.dim(); ++axis) shape.push_back(tensor.size(axis));
    return shape;
}

// Fill `copy` from `source`, now and in every replay.
inline void copy_and_record(Tensor& copy, const Tensor& source) {
    torch::stable::copy_(copy, source);
    if (Tape* tape = recording())
        tape->steps.push_back([copy = copy, source = source]() mutable { torch::stable::copy_(copy, source); });
}

// `tensor` itself if its channels are adjacent in memory, else a copy in which they are.
inline Tensor with_adjacent_channels(const Tensor& tensor) {
    if (tensor.stride(1) == 1 || tensor.size(1) == 1) return tensor;
    Tensor copy = empty_channels_last(shape_of(tensor), tensor.scalar_type());
    copy_and_record(copy, tensor);
    return copy;
}

// Row-major: `tensor` itself, or a copy.
inline Tensor dense(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor;
    Tensor copy = empty_row_major(shape_of(tensor), tensor.scalar_type());
    copy_and_record(copy, tensor);
    return copy;
}

inline Tensor to_dtype(const Tensor& tensor, ScalarType dtype) { return torch::stable::to(tensor, dtype); }

}  // namespace bindings
}  // namespace pdn
