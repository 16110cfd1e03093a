// Torch op of the CPU kernels for the gradients of block-sparse attention. Arguments were checked in Python; what is
// checked again here is what would make a kernel touch memory that is not its own. The numbers in the lists are
// trusted: BlockMask checked them when it was made.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../block_sparse_attention/dispatch.h"
#include "heads.h"

namespace pdn {
namespace bindings {
namespace {

using block_sparse_attention::BackwardParams;
using block_sparse_attention::Readers;

Readers readers_of(const Tensor& counts, const Tensor& indices, int64_t batch, int64_t heads, int64_t columns) {
    STD_TORCH_CHECK(counts.dim() == 3 && indices.dim() == 4, "q_counts, q_indices: expected 3 and 4 dims");
    const int64_t batches = counts.size(0), lists = counts.size(1);
    STD_TORCH_CHECK((batches == 1 || batches == batch) && (lists == 1 || lists == heads) && counts.size(2) == columns,
                    "q_counts: does not fit query and key");
    STD_TORCH_CHECK(indices.size(0) == batches && indices.size(1) == lists && indices.size(2) == columns,
                    "q_indices: does not fit q_counts");
    const bool narrow = indices.scalar_type() == ScalarType::Short;
    check_dense(counts, ScalarType::Int, counts.numel(), "q_counts");
    check_dense(indices, narrow ? ScalarType::Short : ScalarType::Int, indices.numel(), "q_indices");
    return {static_cast<const int32_t*>(counts.data_ptr()),
            indices.data_ptr(),
            narrow,
            indices.size(3),
            batches == 1 ? 0 : lists * columns,
            lists == 1 ? 0 : columns};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                            const Tensor& value, const Tensor& lse, const Tensor& delta,
                                            const Tensor& q_counts, const Tensor& q_indices, int64_t block_size,
                                            double scale, const std::optional<Tensor>& key_lengths) {
    check_heads(query, key, "key");
    check_heads(query, value, "value");
    STD_TORCH_CHECK(value.size(1) == key.size(1) && value.size(2) == key.size(2), "value: shape does not fit key");
    STD_TORCH_CHECK(shape_of(grad) == shape_of(query) && grad.scalar_type() == query.scalar_type(),
                    "grad: shape or dtype does not fit query");
    check_block_size(block_size);
    const int64_t batch = query.size(0), heads = query.size(1), rows = batch * heads * query.size(2);
    check_dense(lse, ScalarType::Float, rows, "lse");
    check_dense(delta, ScalarType::Float, rows, "delta");
    check_dense(key_lengths, ScalarType::Int, batch, "key_lengths");
    const Tensor g = with_adjacent_elements(grad), q = with_adjacent_elements(query);
    const Tensor k = with_adjacent_elements(key), v = with_adjacent_elements(value);
    Tensor grads[3] = {empty_row_major(shape_of(query), query.scalar_type()),
                       empty_row_major(shape_of(key), query.scalar_type()),
                       empty_row_major(shape_of(key), query.scalar_type())};
    const BackwardParams p = {
        attention_dtype(query.scalar_type()),
        batch,
        heads,
        key.size(1),
        query.size(3),
        block_size,
        heads_of(g),
        heads_of(q),
        heads_of(k),
        heads_of(v),
        static_cast<const float*>(lse.data_ptr()),
        static_cast<const float*>(delta.data_ptr()),
        readers_of(q_counts, q_indices, batch, heads, (key.size(2) + block_size - 1) / block_size),
        static_cast<float>(scale),
        data_of<int32_t>(key_lengths),
        grads[0].data_ptr(),
        grads[1].data_ptr(),
        grads[2].data_ptr()};
    run_and_record(
        [p] {
            STD_TORCH_CHECK(block_sparse_attention::run(active_isa(), p),
                            "out of memory for the scratch buffers of block-sparse attention's gradients");
        },
        g, q, k, v, lse, delta, q_counts, q_indices, key_lengths, grads[0], grads[1], grads[2]);
    return {grads[0], grads[1], grads[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "block_sparse_attention_backward_cpu(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor lse, "
        "Tensor delta, Tensor q_counts, Tensor q_indices, int block_size, float scale, Tensor? key_lengths) "
        "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) { m.impl("block_sparse_attention_backward_cpu", TORCH_BOX(&backward)); }

}  // namespace bindings
}  // namespace pdn
