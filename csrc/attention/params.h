// Dense attention: plain structs between the bindings, the dispatcher and the per-ISA kernels. The heads of a token lie
// next to each other.
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

struct AttentionParams {
    DType dtype;  // of query, key, value and output
    int64_t batch, heads;
    int64_t size;  // of a head
    Tokens query, key, value;
    Mask mask;
    float scale;   // of the scores, before the mask
    void* output;  // [batch, query.count, heads * size], dense
};

// The kernels of one ISA level. `pack` brings a block of keys and values of one head into the order in which `attend`
// reads them; `attend` computes the queries [first, last) of that head, each by itself, so any split gives the same
// bits.
struct KernelSet {
    int width;                                           // floats per vector
    int64_t (*key_block)(const AttentionParams& p);      // keys of a block
    int64_t (*packed_bytes)(const AttentionParams& p);   // of one head
    int64_t (*scratch_bytes)(const AttentionParams& p);  // of `attend`
    void (*pack)(const AttentionParams& p, int64_t image, int64_t head, int64_t block, void* packed);
    void (*attend)(const AttentionParams& p, int64_t image, int64_t head, int64_t first, int64_t last,
                   const void* packed, void* scratch);
};

constexpr int64_t kQueryBlock = 96;  // the most queries that `attend` takes at once

}  // namespace attention
}  // namespace pdn
