// Gated Haar wavelets: plain structs between the bindings, the dispatcher and the per-ISA kernels. Strides count
// elements.
//
// An image [batch, channels, height, width] is read as blocks of 2 x 2 pixels a b / c d; a last row or column without
// partner makes blocks of its own. Its bands have rows x columns pixels, one per block. Down: one coarse image of
// `channels`. Up: the coarse tensor holds four bands of `channels` each, one after the other.
#pragma once

#include <cstdint>

namespace pdn {
namespace wavelet_gate {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr int kBands = 4;  // LL, B1 (difference of columns), B2 (of rows), HH; as many as pixels in a block

// Four-dimensional data; what is not there has no data.
struct View {
    void* data;
    int64_t n, c, h, w;
};

struct Params {
    DType dtype;
    bool up;
    bool channels_last;  // neighbouring channels are adjacent, else neighbouring columns
    bool past_caches;    // the result is too large to stay in the caches
    int64_t batch, channels, height, width;
    View fine;            // down: the input; up, backward: the gradient of the result
    View coarse;          // up: the input; down, backward: the gradient of the result
    View out;             // what is written: the result, or the gradient of the input
    const float* gate;    // [batch, 4, gates]
    int64_t gates;        // channels, or 1: one gate for all of them
    const float* offset;  // backward: [batch, channels of the input], added to the gradient of the input; or null
    float* gate_grad;     // backward: [batch, 4, gates], or null
    // Made by the dispatcher:
    const float* factors;     // [batch, 4, factor_channels]: of the pixels of a block (down), or half the gates (up)
    int64_t factor_channels;  // 1, or channels
    float* partials;          // sums of each item, or null
    int64_t item_rows;        // rows of blocks in an item
};

// The mean over the pixels of [batch, channels, height, width].
struct PoolParams {
    DType dtype;
    bool channels_last;
    int64_t batch, channels, height, width;
    View input;
    float* mean;  // [batch, channels]
    // Made by the dispatcher:
    float* partials;
    int64_t item_rows;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t block_rows(const Params& p) { return ceil_div(p.height, 2); }
constexpr int64_t block_columns(const Params& p) { return ceil_div(p.width, 2); }

// Work is split into items that do not know of each other: some rows of one plane, or with adjacent channels of one
// image. Floats that the sums of an item take: four a plane; four a channel and as many to work with, where channels
// are adjacent. Means: a quarter of that.
constexpr int64_t partial_size(const Params& p) { return p.channels_last ? 2 * kBands * p.channels : kBands; }
constexpr int64_t partial_size(const PoolParams& p) { return p.channels_last ? 2 * p.channels : 1; }

// The kernels of one ISA level.
struct KernelSet {
    int width;  // floats per vector
    void (*forward)(const Params& p, int64_t item);
    void (*backward)(const Params& p, int64_t item);
    void (*pool)(const PoolParams& p, int64_t item);
};

}  // namespace wavelet_gate
}  // namespace pdn
