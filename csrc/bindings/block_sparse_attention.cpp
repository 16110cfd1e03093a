// Torch op of the CPU kernels of attention over listed blocks of keys. Arguments were checked in Python; what is
// checked again here is what would make a kernel touch memory that is not its own. Numbers in the lists that are no
// block are not read from.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../attention/dispatch.h"
#include "heads.h"

namespace pdn {
namespace bindings {
namespace {

using attention::AttentionParams;
using attention::BlockLists;

BlockLists lists_of(const Tensor& counts, const Tensor& indices, int64_t batch, int64_t heads, int64_t rows) {
    STD_TORCH_CHECK(counts.dim() == 3 && indices.dim() == 4, "kv_counts, kv_indices: expected 3 and 4 dims");
    const int64_t batches = counts.size(0), lists = counts.size(1);
    STD_TORCH_CHECK((batches == 1 || batches == batch) && (lists == 1 || lists == heads) && counts.size(2) == rows,
                    "kv_counts: does not fit query");
    STD_TORCH_CHECK(indices.size(0) == batches && indices.size(1) == lists && indices.size(2) == rows,
                    "kv_indices: does not fit kv_counts");
    const bool narrow = indices.scalar_type() == ScalarType::Short;
    check_dense(counts, ScalarType::Int, counts.numel(), "kv_counts");
    check_dense(indices, narrow ? ScalarType::Short : ScalarType::Int, indices.numel(), "kv_indices");
    return {static_cast<const int32_t*>(counts.data_ptr()),
            indices.data_ptr(),
            narrow,
            indices.size(3),
            batches == 1 ? 0 : lists,
            lists == 1 ? 0 : 1};
}

std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& kv_counts,
                                  const Tensor& kv_indices, int64_t block_size, double scale,
                                  const std::optional<Tensor>& key_lengths, bool int8_qk) {
    check_heads(query, key, "key");
    check_heads(query, value, "value");
    STD_TORCH_CHECK(value.size(1) == key.size(1) && value.size(2) == key.size(2), "value: shape does not fit key");
    check_block_size(block_size);
    const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
    check_dense(key_lengths, ScalarType::Int, batch, "key_lengths");
    AttentionParams p{};
    p.dtype = attention_dtype(query.scalar_type());
    p.lists = lists_of(kv_counts, kv_indices, batch, heads, (queries + block_size - 1) / block_size);
    const Tensor q = with_adjacent_elements(query), k = with_adjacent_elements(key), v = with_adjacent_elements(value);
    Tensor output = empty_in_order(q);
    Tensor lse = empty_row_major({batch, heads, queries}, ScalarType::Float);
    if (output.numel() == 0) return {output, lse};
    p.batch = batch;
    p.heads = heads;
    p.group = heads / key.size(1);
    p.size = query.size(3);
    p.query = heads_of(q);
    p.key = heads_of(k);
    p.value = heads_of(v);
    p.block_size = block_size;
    p.key_lengths = data_of<int32_t>(key_lengths);
    p.scale = static_cast<float>(scale);
    p.int8 = int8_qk;
    p.output = output.data_ptr();
    p.output_batch_stride = output.stride(0);
    p.output_head_stride = output.stride(1);
    p.output_row_stride = output.stride(2);
    p.lse = static_cast<float*>(lse.data_ptr());
    run_and_record(
        [p] {
            STD_TORCH_CHECK(attention::run(active_isa(), p),
                            "out of memory for the scratch buffers of block-sparse attention");
        },
        q, k, v, kv_counts, kv_indices, key_lengths, output, lse);
    return {output, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "block_sparse_attention_cpu(Tensor query, Tensor key, Tensor value, Tensor kv_counts, Tensor kv_indices, "
        "int block_size, float scale, Tensor? key_lengths, bool int8_qk) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) { m.impl("block_sparse_attention_cpu", TORCH_BOX(&attend)); }

}  // namespace bindings
}  // namespace pdn
