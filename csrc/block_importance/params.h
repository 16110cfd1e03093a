// Attention mass of blocks of keys: plain structs between the bindings, the dispatcher and the per-ISA kernels.
#pragma once

#include "../core/attention/tokens.h"

namespace pdn {
namespace block_importance {

using attention::DType;
using attention::Tokens;

// Results are [batch, heads, query blocks, key blocks], the second one of the key blocks from `first_generated` on.
struct ImportanceParams {
    DType dtype;
    int64_t batch, heads, kv_heads;  // query head h reads key head h / (heads / kv_heads)
    int64_t size;                    // of a head
    int64_t block;                   // tokens: 16, 32, 64 or 128
    int64_t first_generated;         // a block of keys
    Tokens query, key;
    float scale;                 // of the scores
    const float* lse;            // [batch, heads, query.count], or null: computed
    const int32_t* key_lengths;  // [batch]: keys from there on do not count; null: all count
    float *over_all, *over_generated;
};

// The kernels of one ISA level. `pack` brings a chunk of keys of one head into the order in which `measure` reads them;
// `measure` computes a row of blocks in both results, by itself, so any split gives the same bits.
struct KernelSet {
    int64_t (*chunk)(const ImportanceParams& p);          // keys
    int64_t (*packed_bytes)(const ImportanceParams& p);   // of one head
    int64_t (*scratch_bytes)(const ImportanceParams& p);  // of `measure`
    void (*pack)(const ImportanceParams& p, int64_t image, int64_t kv_head, int64_t chunk, void* packed);
    void (*measure)(const ImportanceParams& p, int64_t image, int64_t head, int64_t row, const void* packed,
                    void* scratch);
};

}  // namespace block_importance
}  // namespace pdn
