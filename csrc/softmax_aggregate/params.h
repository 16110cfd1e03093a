// The weighted sum of feature maps under a softmax over them: plain structs between the bindings, the dispatcher and
// the per-ISA kernels. Strides count elements.
#pragma once

#include <cstdint>

namespace pdn {
namespace softmax_aggregate {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Element (b, n, c, p) lies at b * batch + n * map + c * channel + p * pixel. Either `pixel` or `channel` is 1: whole
// planes, or rows of adjacent channels. Where there is one map only, `map` is not read.
struct Strides {
    int64_t batch, map, channel, pixel;
};

struct Params {
    DType dtype;  // of features, hidden and out
    int64_t batch, maps, channels, pixels;
    int64_t depth;         // channels of hidden
    const void* features;  // [batch, maps, channels, pixels]
    Strides features_at;
    const void* hidden;  // [batch, depth, pixels]
    Strides hidden_at;
    const float* weight;  // [maps, depth], dense; or null: hidden are the logits
    void* out;            // [batch, channels, pixels], laid out as features
    Strides out_at;
    float* shares;     // [batch, maps, pixels], dense: the softmax
    bool past_caches;  // out is too large to stay in the caches
};

struct GradParams {
    DType dtype;  // of grad, features and grad_features
    int64_t batch, maps, channels, pixels;
    const void* grad;  // [batch, channels, pixels], laid out as features
    Strides grad_at;
    const float* grad_shares;  // [batch, maps, pixels], dense; or null
    const void* features;      // [batch, maps, channels, pixels]
    Strides features_at;
    const float* shares;  // [batch, maps, pixels], dense
    void* grad_features;  // like features, or null: not wanted
    Strides grad_features_at;
    float* grad_logits;  // [batch, maps, pixels], dense
    bool past_caches;    // grad_features are too large to stay in the caches
};

// Pixels that are done at a time: of planes, long enough to read a page's worth of each; of rows, few. A pixel's result
// does not depend on them.
constexpr int64_t kPlaneTile = 1024, kRowTile = 32;

inline bool has_planes(const Strides& at) { return at.pixel == 1; }
inline int64_t tile_of(const Strides& features_at) { return has_planes(features_at) ? kPlaneTile : kRowTile; }
inline int64_t scratch_floats(int64_t maps) { return maps * kPlaneTile; }

// The kernels of one ISA level. `scratch`: scratch_floats() of them, 64-byte aligned.
struct KernelSet {
    int width;  // floats per vector
    void (*forward)(const Params& p, int64_t batch, int64_t first, int64_t count, float* scratch);
    void (*backward)(const GradParams& p, int64_t batch, int64_t first, int64_t count, float* scratch);
};

}  // namespace softmax_aggregate
}  // namespace pdn
