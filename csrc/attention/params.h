// Attention of all keys or of listed blocks of them: plain structs between the bindings, the dispatcher and the per-ISA
// kernels. Dense attention is the case without lists.
#pragma once

#include "../core/attention/tokens.h"

namespace pdn {
namespace attention {

// Of the scores [batch, heads, queries, keys]; the keys of a row are adjacent. Stride 0 repeats.
struct Mask {
    const void* data;  // null: none. Bytes, of which 0 drops a score, or floats to be added
    bool boolean;
    int64_t batch_stride, head_stride, query_stride;
};

// The blocks of keys that each block of queries reads: ascending, distinct.
struct BlockLists {
    const int32_t* counts;  // [batch or 1, heads or 1, blocks of queries]; null: every query reads every key
    const void* indices;    // [batch or 1, heads or 1, blocks of queries, longest], of which `counts` are looked at
    bool narrow;            // int16_t; else int32_t
    int64_t longest, batch_stride, head_stride;  // strides in lists; 0 repeats
};

struct AttentionParams {
    DType dtype;  // of query, key, value and output
    int64_t batch, heads;
    int64_t group;  // heads that share one head of keys and values
    int64_t size;   // of a head
    Tokens query, key, value;
    Mask mask;         // only without lists
    BlockLists lists;  // of blocks of `block_size` queries and keys
    int64_t block_size;
    const int32_t* key_lengths;  // [batch]: keys from there on do not count; null: all do
    float scale;                 // of the scores, before the mask
    bool int8;                   // scores from codes of 8 bits, see codes.inl; only with lists
    void* output;                // as `query`: the elements of a head's token are adjacent
    int64_t output_batch_stride, output_head_stride, output_row_stride;
    float* lse;  // [batch, heads, query.count], dense: logarithms of the sums of exponentials; null: not wanted
};

// The kernels of one ISA level. Every item of `attend`, the queries [first, last) of one head, is computed by itself,
// so any split gives the same bits. `codes` are those of all heads' keys, where int8 is asked for.
struct KernelSet {
    int width;  // floats per vector
    int64_t (*scratch_bytes)(const AttentionParams& p);
    void (*attend)(const AttentionParams& p, int64_t image, int64_t head, int64_t first, int64_t last,
                   const void* codes, void* scratch);
    int64_t (*code_bytes)(const AttentionParams& p);  // of one head of keys
    void (*average_keys)(const AttentionParams& p, int64_t image, int64_t kv_head, void* codes);
    void (*encode_keys)(const AttentionParams& p, int64_t image, int64_t kv_head, int64_t block, void* codes);
};

constexpr int64_t kQueryBlock = 128;  // the most queries that `attend` takes at once; the largest block of lists

}  // namespace attention
}  // namespace pdn
