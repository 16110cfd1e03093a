// What both directions of ode_stage share: elements, lanes, and the split of an image into chunks. Included once per
// ISA level.
#pragma once

#include "../core/quantize.inl"
#include "params.h"

namespace pdn {
namespace ode_stage {
namespace {

constexpr int64_t kBlock = kWidth == 16 ? 16 : 8;  // pixels whose values of one vector of channels lie in registers
constexpr int64_t kChunkElements = 16384;
constexpr int64_t kMostChunks = 64;  // of an image: what is folded by one thread

int64_t chunk_pixels(int64_t pixels, int64_t channels) {
    int64_t chunk = kChunkElements / channels;
    const int64_t least = (pixels + kMostChunks - 1) / kMostChunks;
    if (chunk < least) chunk = least;
    return (chunk + kBlock - 1) / kBlock * kBlock;
}

// Pixels [begin, end) of a chunk.
struct Span {
    int64_t begin, end;
};

PDN_INLINE Span span_of(int64_t pixels, int64_t channels, int64_t chunk) {
    const int64_t size = chunk_pixels(pixels, channels), begin = chunk * size;
    return {begin, begin + size < pixels ? begin + size : pixels};
}

// Floats of an array over the channels, with room for a whole vector that begins at the last one.
int64_t channel_array(int64_t channels) { return (channels + 2 * kWidth - 1) / kWidth * kWidth; }

// body(first, lanes) for the vectors of a row, no channel twice: what is written may be what is read.
template <class Body>
PDN_INLINE void vectors_once(int64_t count, const Body& body) {
    int64_t first = 0;
    for (; first + kWidth <= count; first += kWidth) body(first, AllLanes{});
    if (first < count) body(first, static_cast<int>(count - first));
}

PDN_INLINE void put(float* to, float x) { *to = x; }
PDN_INLINE void put(bf16* to, float x) { *to = to_bf16(x); }
PDN_INLINE void put(fp16* to, float x) { *to = to_fp16(x); }

}  // namespace
}  // namespace ode_stage
}  // namespace pdn
