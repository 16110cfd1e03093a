// Gradients of attention over listed blocks: plain structs between the bindings, the dispatcher and the per-ISA
// kernels. (The forward on the CPU is that of dense attention, which takes lists too: csrc/attention.)
#pragma once

#include "../core/attention/tokens.h"

namespace pdn {
namespace block_sparse_attention {

using attention::DType;
using attention::Tokens;

// For each block of keys, in ascending order, the blocks of queries that read it. Strides count blocks of keys; 0 where
// one list serves all batches or heads.
struct Readers {
    const int32_t* counts;
    const void* indices;  // int16 or int32, `longest` for each block of keys; those beyond the count mean nothing
    bool narrow;
    int64_t longest, batch_stride, head_stride;
};

struct BackwardParams {
    DType dtype;
    int64_t batch, heads, kv_heads;  // query head h reads key head h / (heads / kv_heads)
    int64_t size;                    // of a head
    int64_t block;                   // tokens: 16, 32, 64 or 128
    Tokens grad, query, key, value;  // grad is that of the output
    const float *lse, *delta;        // [batch, heads, query.count]
    Readers readers;
    float scale;                               // of the scores
    const int32_t* key_lengths;                // [batch]: keys from there on do not count; null: all count
    void *grad_query, *grad_key, *grad_value;  // like query, key and value; dense
};

// The kernels of one ISA level. What they keep about a head of keys and the heads of queries that read it lies in a
// workspace: packed tokens, and sums in float32. `begin_*` and `end_*` take the pieces of kPiece tokens one by one, in
// any order; end after all sums are complete. `accumulate` adds what blocks of keys [key_begin, key_end) and of queries
// [query_begin, query_end) give each other; calls at the same time must share neither.
struct KernelSet {
    int64_t (*workspace_bytes)(const BackwardParams& p);
    int64_t (*scratch_bytes)(const BackwardParams& p);  // of `accumulate`
    void (*begin_keys)(const BackwardParams& p, int64_t image, int64_t kv_head, int64_t piece, void* workspace);
    void (*begin_queries)(const BackwardParams& p, int64_t image, int64_t head, int64_t piece, void* workspace);
    void (*accumulate)(const BackwardParams& p, int64_t image, int64_t kv_head, int64_t key_begin, int64_t key_end,
                       int64_t query_begin, int64_t query_end, void* workspace, void* scratch);
    void (*end_keys)(const BackwardParams& p, int64_t image, int64_t kv_head, int64_t piece, void* workspace);
    void (*end_queries)(const BackwardParams& p, int64_t image, int64_t head, int64_t piece, void* workspace);
};

constexpr int64_t kPiece = 128;  // tokens

}  // namespace block_sparse_attention
}  // namespace pdn
