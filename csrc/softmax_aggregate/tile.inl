// A tile of pixels in vectors: loads and stores of whole and of last, partial vectors. Included once per ISA level.
#pragma once

#include "../core/epilogue.inl"
#include "../core/fp16.h"
#include "../core/past.inl"
#include "params.h"

namespace pdn {
namespace softmax_aggregate {
namespace {

// How many lanes of a vector count: all, or fewer.
struct All {};
struct Some {
    int count;
};

template <class T>
PDN_INLINE vf load_lanes(const T* p, All) {
    return load(p);
}
template <class T>
PDN_INLINE vf load_lanes(const T* p, Some some) {
    return load_partial(p, some.count);
}
template <class T>
PDN_INLINE void store_lanes(T* p, vf v, All) {
    store(p, v);
}
template <class T>
PDN_INLINE void store_lanes(T* p, vf v, Some some) {
    store_partial(p, v, some.count);
}

// Whole vectors past the caches, if that is asked for: of float32 only, and `p` is aligned then.
template <bool Past, class T>
PDN_INLINE void put_lanes(T* p, vf v, All lanes) {
    if constexpr (Past && sizeof(T) == sizeof(float))
        store_past(p, v);
    else
        store_lanes(p, v, lanes);
}
template <bool Past, class T>
PDN_INLINE void put_lanes(T* p, vf v, Some lanes) {
    store_lanes(p, v, lanes);
}

// Whether put_lanes may write past the caches to results at `at`: every vector of them is aligned.
template <class T>
PDN_INLINE bool all_stream(const void* results, const Strides& at) {
    const int64_t runs = has_planes(at) ? at.channel : at.pixel;  // apart
    return sizeof(T) == sizeof(float) && results && streams_to(results) && runs % kWidth == 0 && at.map % kWidth == 0 &&
           at.batch % kWidth == 0;
}

// `body(at, lanes)` for every vector of `count` elements.
template <class Body>
PDN_INLINE void each_vector(int64_t count, Body body) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) body(i, All{});
    if (i < count) body(i, Some{static_cast<int>(count - i)});
}

template <class T>
PDN_INLINE const T* at(const void* data, const Strides& strides, int64_t batch, int64_t map, int64_t channel,
                       int64_t pixel) {
    return static_cast<const T*>(data) + batch * strides.batch + map * strides.map + channel * strides.channel +
           pixel * strides.pixel;
}
template <class T>
PDN_INLINE T* at(void* data, const Strides& strides, int64_t batch, int64_t map, int64_t channel, int64_t pixel) {
    return const_cast<T*>(at<T>(static_cast<const void*>(data), strides, batch, map, channel, pixel));
}

}  // namespace
}  // namespace softmax_aggregate
}  // namespace pdn
