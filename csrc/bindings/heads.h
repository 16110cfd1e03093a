// Tensors [B, H, L, D] for the kernels of attention over blocks.
#pragma once

#include "../core/attention/tokens.h"
#include "tape.h"
#include "tensors.h"

namespace pdn {
namespace bindings {

inline attention::DType attention_dtype(ScalarType dtype) {
    using attention::DType;
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                    "cpu kernels of attention take float32, bfloat16 and float16");
    return dtype == ScalarType::Float ? DType::float32 : dtype == ScalarType::Half ? DType::float16 : DType::bfloat16;
}

// `tensor` itself if its last dim is adjacent in memory, else a copy of which that is true.
inline Tensor with_adjacent_elements(const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    return tensor.stride(last) == 1 || tensor.size(last) == 1 ? tensor : dense(tensor);
}

inline attention::Tokens heads_of(const Tensor& tensor) {
    return {tensor.data_ptr(), tensor.size(2), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// `key` is [B, Hkv, Lk, D] for `query` [B, H, Lq, D].
inline void check_heads(const Tensor& query, const Tensor& key, const char* name) {
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, name, ": expected 4 dims, as those of query");
    STD_TORCH_CHECK(
        key.size(0) == query.size(0) && key.size(3) == query.size(3) && key.scalar_type() == query.scalar_type(), name,
        ": shape or dtype does not fit query");
    STD_TORCH_CHECK(key.size(1) > 0 && query.size(1) % key.size(1) == 0 && key.size(2) > 0 && key.size(3) > 0, name,
                    ": its heads do not divide those of query, or it is empty");
}

inline void check_block_size(int64_t block) {
    STD_TORCH_CHECK(block == 16 || block == 32 || block == 64 || block == 128,
                    "block_size: expected 16, 32, 64 or 128, got ", block);
}

// A row-major tensor of this dtype and number of elements, or none.
inline void check_dense(const std::optional<Tensor>& tensor, ScalarType dtype, int64_t count, const char* name) {
    STD_TORCH_CHECK(!tensor || (tensor->scalar_type() == dtype && tensor->numel() == count && tensor->is_contiguous()),
                    name, ": wrong dtype, size or strides");
}

template <class T>
const T* data_of(const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

}  // namespace bindings
}  // namespace pdn
