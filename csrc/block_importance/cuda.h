// Importance of blocks on CUDA. Raw pointers only; no torch.
//
// query [B, H, Lq, D], key [B, Hkv, Lk, D] with adjacent last dims; D is a multiple of 8 and at most kMaxSize, rows
// start at multiples of 16 bytes. Everything else is dense.
#pragma once

#include "../core/cuda_attention.h"

namespace pdn {
namespace block_importance {
namespace cuda {

using pdn::cuda::Element;
using pdn::cuda::Tokens;

constexpr int kMaxSize = 256;

struct Problem {
    Element type;
    int batch, heads, kv_heads, queries, keys, size;
    int log_block, query_blocks, key_blocks;
    int first_generated;  // a block of keys; key_blocks: none is
    float scale;
    const int32_t* key_lengths;  // [B] or null
    Tokens query, key;
    const float* lse;       // float32 [B, H, Lq]: over all keys; or null: it is computed
    float* over_all;        // [B, H, query_blocks, key_blocks]
    float* over_generated;  // [B, H, query_blocks, key_blocks - first_generated]
    float* workspace;       // workspace_floats() floats
};

int64_t workspace_floats(const Problem& p);

// Returns null, or why nothing was launched. `stream` is a cudaStream_t; the call does not wait.
const char* run(const Problem& p, void* stream);

}  // namespace cuda
}  // namespace block_importance
}  // namespace pdn
