// Tensors as rows of adjacent channels: the pixels of channels_last images, or tokens.
#pragma once

#include <utility>

#include "tape.h"
#include "tensors.h"

namespace pdn {
namespace bindings {

// dim 1 of images [N, C, H, W], else the last.
inline int64_t channel_dim(const Tensor& tensor) { return tensor.dim() == 4 ? 1 : tensor.dim() - 1; }

// Elements between neighbours along the axes [begin, end) read as one, the channels left out; -1 if that is no one
// stride.
inline int64_t joined_stride(const Tensor& tensor, int64_t begin, int64_t end) {
    const int64_t channels = channel_dim(tensor);
    int64_t stride = -1, expected = 0;
    for (int64_t axis = end - 1; axis >= begin; --axis) {
        if (axis == channels || tensor.size(axis) == 1) continue;
        if (stride < 0)
            stride = tensor.stride(axis);
        else if (tensor.stride(axis) != expected)
            return -1;
        expected = tensor.stride(axis) * tensor.size(axis);
    }
    return stride < 0 ? tensor.size(channels) : stride;
}

inline bool has_adjacent_channels(const Tensor& tensor) {
    const int64_t channels = channel_dim(tensor);
    return tensor.size(channels) == 1 || tensor.stride(channels) == 1;
}

// An uninitialised tensor in the layout of results: images in channels_last memory, all else row-major.
inline Tensor empty_rows(const std::vector<int64_t>& shape, ScalarType dtype) {
    if (shape.size() == 4) return empty_channels_last(shape, dtype);
    return empty_row_major(shape, dtype);
}

inline Tensor copied_rows(const Tensor& tensor) {
    Tensor copy = empty_rows(shape_of(tensor), tensor.scalar_type());
    copy_and_record(copy, tensor);
    return copy;
}

struct Rows {
    Tensor tensor;  // the one given, or a copy
    int64_t rows, channels, row_stride;
};

// All of a tensor; negative strides do not exist in torch.
inline Rows rows_of(const Tensor& given) {
    const auto usable = [](const Tensor& t) { return has_adjacent_channels(t) && joined_stride(t, 0, t.dim()) >= 0; };
    const Tensor tensor = given.numel() == 0 || usable(given) ? given : copied_rows(given);
    const int64_t channels = tensor.size(channel_dim(tensor));
    return {tensor, channels > 0 ? tensor.numel() / channels : 0, channels, joined_stride(tensor, 0, tensor.dim())};
}

// float32 or int32 values as kernels read them, or null.
template <class T>
const T* pointer(const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

inline void check_numel(const std::optional<Tensor>& tensor, ScalarType dtype, int64_t count, const char* name) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->scalar_type() == dtype && tensor->numel() == count, name, ": wrong dtype or length");
}

}  // namespace bindings
}  // namespace pdn
