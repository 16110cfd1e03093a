// Block-sparse attention on CUDA. Raw pointers only; no torch.
//
// query, output and grad are [B, H, Lq, D], key and value [B, Hkv, Lk, D] with adjacent last dims; D is a multiple of 8
// and at most kMaxSize, rows start at multiples of 16 bytes. lse and delta are dense float32 [B, H, Lq].
#pragma once

#include "../core/cuda_attention.h"

namespace pdn {
namespace block_sparse_attention {
namespace cuda {

using pdn::cuda::BlockLists;
using pdn::cuda::Element;
using pdn::cuda::Tokens;

constexpr int kMaxSize = 256;

struct Problem {
    Element type;
    int batch, heads, kv_heads, queries, keys, size;
    int log_block, query_blocks, key_blocks;
    float scale;
    const int32_t* key_lengths;  // [B] or null
    Tokens query, key, value;
    float* lse;
};

struct ForwardProblem : Problem {
    BlockLists kept;  // blocks of keys for each block of queries
    Tokens output;    // written
    bool int8_scores;
    void* workspace;  // workspace_bytes() bytes at a multiple of 16
};

struct BackwardProblem : Problem {
    BlockLists kept, readers;  // blocks of keys for each of queries, blocks of queries for each of keys
    const float* delta;
    Tokens grad;
    Tokens grad_query, grad_key, grad_value;  // written
};

// Codes, scales and means for int8 scores; 0 without them.
int64_t workspace_bytes(const ForwardProblem& p);

// Return null, or why nothing was launched. `stream` is a cudaStream_t; the calls do not wait.
const char* forward(const ForwardProblem& p, void* stream);
const char* backward(const BackwardProblem& p, void* stream);

}  // namespace cuda
}  // namespace block_sparse_attention
}  // namespace pdn
