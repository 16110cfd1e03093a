// Torch op of the CPU kernels of attention. Arguments were checked in Python; what is checked again here is what would
// make a kernel touch memory that is not its own.
#include <torch/csrc/stable/library.h>

#include "../attention/dispatch.h"
#include "heads.h"

namespace pdn {
namespace bindings {
namespace {

using attention::AttentionParams;
using attention::Mask;
using attention::Tokens;

Tokens tokens_of(const Tensor& tensor, int64_t size) {
    return {tensor.data_ptr(), tensor.size(1), tensor.stride(0), size, tensor.stride(1)};
}

// [N or 1, heads or 1, T or 1, S]
Mask mask_of(const Tensor& mask, const AttentionParams& p) {
    const auto stride = [&](int64_t axis, int64_t size) {
        STD_TORCH_CHECK(mask.size(axis) == 1 || mask.size(axis) == size, "mask: does not broadcast to the scores");
        return mask.size(axis) == 1 ? 0 : mask.stride(axis);
    };
    STD_TORCH_CHECK(mask.dim() == 4 && mask.size(3) == p.key.count, "mask: expected 4 dims and a column for each key");
    STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool || mask.scalar_type() == ScalarType::Float,
                    "mask: expected bool or float32");
    return {mask.data_ptr(), mask.scalar_type() == ScalarType::Bool, stride(0, p.batch), stride(1, p.heads),
            stride(2, p.query.count)};
}

Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, int64_t heads, double scale,
              const std::optional<Tensor>& mask) {
    STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3, "query, key, value: expected 3 dims");
    STD_TORCH_CHECK(heads > 0 && query.size(2) % heads == 0, "num_heads: does not divide the last dim");
    for (const Tensor* other : {&key, &value})
        STD_TORCH_CHECK(other->size(0) == query.size(0) && other->size(2) == query.size(2) &&
                            other->size(1) == key.size(1) && other->scalar_type() == query.scalar_type(),
                        "key, value: shape or dtype does not fit query");
    const Tensor q = with_adjacent_elements(query), k = with_adjacent_elements(key), v = with_adjacent_elements(value);
    Tensor output = empty_row_major(shape_of(query), query.scalar_type());
    AttentionParams p{};
    p.dtype = attention_dtype(query.scalar_type());
    p.batch = query.size(0);
    p.heads = heads;
    p.group = 1;
    p.size = query.size(2) / heads;
    p.query = tokens_of(q, p.size);
    p.key = tokens_of(k, p.size);
    p.value = tokens_of(v, p.size);
    p.scale = static_cast<float>(scale);
    p.output = output.data_ptr();
    p.output_batch_stride = output.stride(0);
    p.output_head_stride = p.size;
    p.output_row_stride = output.stride(1);
    if (output.numel() == 0) return output;
    STD_TORCH_CHECK(p.key.count > 0, "key: expected at least one token");
    std::optional<Tensor> m = mask;
    if (m) {
        m = with_adjacent_elements(*m);
        p.mask = mask_of(*m, p);
    }
    run_and_record(
        [p] { STD_TORCH_CHECK(attention::run(active_isa(), p), "out of memory for the scratch buffers of attention"); },
        q, k, v, m, output);
    return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def("attention_cpu(Tensor query, Tensor key, Tensor value, int num_heads, float scale, Tensor? mask) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) { m.impl("attention_cpu", TORCH_BOX(&attend)); }

}  // namespace bindings
}  // namespace pdn
