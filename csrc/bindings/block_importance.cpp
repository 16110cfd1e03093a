// Torch op of the CPU kernels of block importance. Arguments were checked in Python; what is checked again here is what
// would make a kernel touch memory that is not its own.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../block_importance/dispatch.h"
#include "heads.h"

namespace pdn {
namespace bindings {
namespace {

using block_importance::ImportanceParams;

std::tuple<Tensor, Tensor> importance(const Tensor& query, const Tensor& key, int64_t block_size,
                                      int64_t first_generated, double scale, const std::optional<Tensor>& lse,
                                      const std::optional<Tensor>& key_lengths) {
    check_heads(query, key, "key");
    check_block_size(block_size);
    const auto blocks = [&](int64_t tokens) { return (tokens + block_size - 1) / block_size; };
    const int64_t batch = query.size(0), heads = query.size(1), rows = blocks(query.size(2));
    const int64_t columns = blocks(key.size(2));
    STD_TORCH_CHECK(first_generated >= 0 && first_generated < columns, "first_generated: expected 0 to ", columns - 1);
    check_dense(lse, ScalarType::Float, batch * heads * query.size(2), "lse");
    check_dense(key_lengths, ScalarType::Int, batch, "key_lengths");
    Tensor over_all = empty_row_major({batch, heads, rows, columns}, ScalarType::Float);
    Tensor over_generated = empty_row_major({batch, heads, rows, columns - first_generated}, ScalarType::Float);
    if (query.numel() == 0) return {over_all, over_generated};
    const Tensor q = with_adjacent_elements(query), k = with_adjacent_elements(key);
    const ImportanceParams p = {attention_dtype(query.scalar_type()),
                                batch,
                                heads,
                                key.size(1),
                                query.size(3),
                                block_size,
                                first_generated,
                                heads_of(q),
                                heads_of(k),
                                static_cast<float>(scale),
                                data_of<float>(lse),
                                data_of<int32_t>(key_lengths),
                                static_cast<float*>(over_all.data_ptr()),
                                static_cast<float*>(over_generated.data_ptr())};
    run_and_record(
        [p] {
            STD_TORCH_CHECK(block_importance::run(active_isa(), p),
                            "out of memory for the scratch buffers of block importance");
        },
        q, k, lse, key_lengths, over_all, over_generated);
    return {over_all, over_generated};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "block_importance_cpu(Tensor query, Tensor key, int block_size, int first_generated, float scale, Tensor? lse, "
        "Tensor? key_lengths) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) { m.impl("block_importance_cpu", TORCH_BOX(&importance)); }

}  // namespace bindings
}  // namespace pdn
