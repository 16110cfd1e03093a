// pydenoise._cuda: torch ops of the CUDA attention kernels. Outputs are allocated in Python.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../block_importance/cuda.h"
#include "../block_sparse_attention/cuda.h"
#include "cuda_tensors.h"

namespace pdn {
namespace bindings {
namespace {

using cuda::BlockLists;
using cuda::Element;
using cuda::Tokens;

Element float_element(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return Element::float32;
        case ScalarType::BFloat16:
            return Element::bfloat16;
        case ScalarType::Half:
            return Element::float16;
        default:
            STD_TORCH_CHECK(false, "attention on CUDA takes float32, float16 and bfloat16");
    }
}

void check_place(const char* name, const Tensor& tensor, const Tensor& like, ScalarType type) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                    ": not on query's device");
    STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": unexpected dtype");
}

void check_dense(const char* name, const Tensor& tensor, const Tensor& like, ScalarType type, int64_t numel) {
    check_place(name, tensor, like, type);
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == numel, name, ": expected ", numel,
                    " contiguous elements");
}

const int32_t* lengths_of(const MaybeTensor& lengths, const Tensor& like) {
    if (lengths) check_dense("key_lengths", *lengths, like, ScalarType::Int, like.size(0));
    return static_cast<const int32_t*>(pointer(lengths));
}

// [B, heads, tokens, D] with an adjacent last dim and rows at multiples of 16 bytes.
Tokens tokens(const char* name, const Tensor& tensor, const Tensor& like, int64_t heads, int64_t length) {
    check_place(name, tensor, like, like.scalar_type());
    STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == like.size(0) && tensor.size(1) == heads &&
                        tensor.size(2) == length && tensor.size(3) == like.size(3),
                    name, ": unexpected shape");
    const int64_t step = tensor.scalar_type() == ScalarType::Float ? 4 : 8;
    bool whole = tensor.stride(3) == 1 && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
    int64_t stride[3];
    for (int i = 0; i < 3; ++i) {
        stride[i] = tensor.size(i) > 1 ? tensor.stride(i) : 0;
        whole = whole && stride[i] % step == 0;
    }
    STD_TORCH_CHECK(whole, name, ": expected rows at multiples of 16 bytes");
    return {tensor.data_ptr(), stride[0], stride[1], stride[2]};
}

int32_t narrow(const char* name, int64_t value) {
    STD_TORCH_CHECK(value >= 0 && value < int64_t{1} << 30, name, ": ", value, " is out of range");
    return static_cast<int32_t>(value);
}

int log_of(int64_t block_size) {
    for (int log = 4; log <= 7; ++log)
        if (int64_t{1} << log == block_size) return log;
    STD_TORCH_CHECK(false, "block_size: expected 16, 32, 64 or 128, got ", block_size);
}

// Sizes, query and key of a problem of either op.
template <typename Problem>
void set_problem(Problem& p, const Tensor& query, const Tensor& key, int64_t block_size, double scale,
                 const MaybeTensor& key_lengths) {
    STD_TORCH_CHECK(query.is_cuda() && query.dim() == 4 && key.dim() == 4, "query, key: expected four dims on CUDA");
    p.type = float_element(query), p.scale = static_cast<float>(scale), p.log_block = log_of(block_size);
    p.batch = narrow("query", query.size(0)), p.heads = narrow("query", query.size(1));
    p.queries = narrow("query", query.size(2)), p.size = narrow("query", query.size(3));
    p.kv_heads = narrow("key", key.size(1)), p.keys = narrow("key", key.size(2));
    STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "key: its heads do not divide those of query");
    STD_TORCH_CHECK(p.size % 8 == 0 && p.size > 0 && p.size <= block_importance::cuda::kMaxSize,
                    "query: expected heads of a multiple of 8 and at most 256");
    p.query_blocks = (p.queries + static_cast<int>(block_size) - 1) >> p.log_block;
    p.key_blocks = (p.keys + static_cast<int>(block_size) - 1) >> p.log_block;
    p.query = tokens("query", query, query, p.heads, p.queries);
    p.key = tokens("key", key, query, p.kv_heads, p.keys);
    p.key_lengths = lengths_of(key_lengths, query);
}

// counts [b, h, rows], indices [b, h, rows, longest]; b and h are 1 or those of the problem.
template <typename Problem>
BlockLists lists_of(const char* name, const Tensor& counts, const Tensor& indices, const Problem& p, int64_t rows,
                    const Tensor& like) {
    STD_TORCH_CHECK(counts.dim() == 3 && indices.dim() == 4, name, ": unexpected number of dims");
    const int64_t batch = counts.size(0), heads = counts.size(1);
    STD_TORCH_CHECK((batch == 1 || batch == p.batch) && (heads == 1 || heads == p.heads) && counts.size(2) == rows,
                    name, ": unexpected shape");
    check_dense(name, counts, like, ScalarType::Int, batch * heads * rows);
    const bool wide = indices.scalar_type() == ScalarType::Int;
    check_dense(name, indices, like, wide ? ScalarType::Int : ScalarType::Short,
                batch * heads * rows * indices.size(3));
    return {static_cast<const int32_t*>(counts.data_ptr()),
            indices.data_ptr(),
            wide,
            indices.size(3),
            batch > 1 ? heads * rows : 0,
            heads > 1 ? rows : 0};
}

void check_launch(const char* op, const char* why) { STD_TORCH_CHECK(why == nullptr, op, " on CUDA: ", why); }

// ------------------------------------------------------------------------------------------------------------- the ops

void forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& kv_counts,
             const Tensor& kv_indices, int64_t block_size, double scale, const MaybeTensor& key_lengths, bool int8_qk,
             Tensor output, Tensor lse) {
    block_sparse_attention::cuda::ForwardProblem p{};
    set_problem(p, query, key, block_size, scale, key_lengths);
    p.value = tokens("value", value, query, p.kv_heads, p.keys);
    p.output = tokens("output", output, query, p.heads, p.queries);
    check_dense("lse", lse, query, ScalarType::Float, static_cast<int64_t>(p.batch) * p.heads * p.queries);
    p.lse = static_cast<float*>(lse.data_ptr());
    p.kept = lists_of("kv_counts, kv_indices", kv_counts, kv_indices, p, p.query_blocks, query);
    p.int8_scores = int8_qk;
    if (query.numel() == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
    MaybeTensor workspace;
    if (const int64_t bytes = block_sparse_attention::cuda::workspace_bytes(p)) {
        workspace = torch::stable::new_empty(query, Ints{bytes / 4}, ScalarType::Float);
        p.workspace = workspace->data_ptr();
    }
    check_launch("block_sparse_attention",
                 block_sparse_attention::cuda::forward(p, current_stream(query.get_device_index())));
}

void backward(const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& lse,
              const Tensor& delta, const Tensor& kv_counts, const Tensor& kv_indices, const Tensor& q_counts,
              const Tensor& q_indices, int64_t block_size, double scale, const MaybeTensor& key_lengths,
              Tensor grad_query, Tensor grad_key, Tensor grad_value) {
    block_sparse_attention::cuda::BackwardProblem p{};
    set_problem(p, query, key, block_size, scale, key_lengths);
    const int64_t rows = static_cast<int64_t>(p.batch) * p.heads * p.queries;
    p.value = tokens("value", value, query, p.kv_heads, p.keys);
    p.grad = tokens("grad", grad, query, p.heads, p.queries);
    p.grad_query = tokens("grad_query", grad_query, query, p.heads, p.queries);
    p.grad_key = tokens("grad_key", grad_key, query, p.kv_heads, p.keys);
    p.grad_value = tokens("grad_value", grad_value, query, p.kv_heads, p.keys);
    check_dense("lse", lse, query, ScalarType::Float, rows);
    check_dense("delta", delta, query, ScalarType::Float, rows);
    p.lse = static_cast<float*>(lse.data_ptr()), p.delta = static_cast<const float*>(delta.data_ptr());
    p.kept = lists_of("kv_counts, kv_indices", kv_counts, kv_indices, p, p.query_blocks, query);
    p.readers = lists_of("q_counts, q_indices", q_counts, q_indices, p, p.key_blocks, query);
    const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
    check_launch("block_sparse_attention_backward",
                 block_sparse_attention::cuda::backward(p, current_stream(query.get_device_index())));
}

void importance(const Tensor& query, const Tensor& key, int64_t block_size, int64_t first_generated, double scale,
                const MaybeTensor& lse, const MaybeTensor& key_lengths, Tensor over_all, Tensor over_generated) {
    block_importance::cuda::Problem p{};
    set_problem(p, query, key, block_size, scale, key_lengths);
    STD_TORCH_CHECK(first_generated >= 0 && first_generated <= p.key_blocks, "first_generated: out of range");
    const int64_t heads = static_cast<int64_t>(p.batch) * p.heads, rows = heads * p.query_blocks;
    p.first_generated = static_cast<int>(first_generated);
    check_dense("over_all", over_all, query, ScalarType::Float, rows * p.key_blocks);
    check_dense("over_generated", over_generated, query, ScalarType::Float, rows * (p.key_blocks - first_generated));
    if (lse) check_dense("lse", *lse, query, ScalarType::Float, heads * p.queries);
    p.lse = static_cast<const float*>(pointer(lse));
    p.over_all = static_cast<float*>(over_all.data_ptr());
    p.over_generated = static_cast<float*>(over_generated.data_ptr());
    if (query.numel() == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
    const Tensor workspace =
        torch::stable::new_empty(query, Ints{block_importance::cuda::workspace_floats(p)}, ScalarType::Float);
    p.workspace = static_cast<float*>(workspace.data_ptr());
    check_launch("block_importance", block_importance::cuda::run(p, current_stream(query.get_device_index())));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "block_sparse_attention_cuda(Tensor query, Tensor key, Tensor value, Tensor kv_counts, Tensor kv_indices, "
        "int block_size, float scale, Tensor? key_lengths, bool int8_qk, Tensor(a!) output, Tensor(b!) lse) -> ()");
    m.def(
        "block_sparse_attention_backward_cuda(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor lse, "
        "Tensor delta, Tensor kv_counts, Tensor kv_indices, Tensor q_counts, Tensor q_indices, int block_size, "
        "float scale, Tensor? key_lengths, Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value) -> ()");
    m.def(
        "block_importance_cuda(Tensor query, Tensor key, int block_size, int first_generated, float scale, Tensor? "
        "lse, "
        "Tensor? key_lengths, Tensor(a!) over_all, Tensor(b!) over_generated) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CUDA, m) {
    m.impl("block_sparse_attention_cuda", TORCH_BOX(&forward));
    m.impl("block_sparse_attention_backward_cuda", TORCH_BOX(&backward));
    m.impl("block_importance_cuda", TORCH_BOX(&importance));
}

}  // namespace bindings
}  // namespace pdn
