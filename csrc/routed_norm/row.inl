// A token's channels in vectors, and its masked sum with the update. Included once per ISA level.
#pragma once

#include "../core/epilogue.inl"
#include "../core/fp16.h"
#include "params.h"

namespace pdn {
namespace routed_norm {
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
PDN_INLINE vf counted(vf v, All) { return v; }
PDN_INLINE vf counted(vf v, Some some) {  // 0 in the lanes that do not count
    vi lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return select(lane < some.count, v, vf{});
}

// `body(at, lanes)` for every vector of `count` elements.
template <class Body>
PDN_INLINE void each_vector(int64_t count, Body body) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) body(i, All{});
    if (i < count) body(i, Some{static_cast<int>(count - i)});
}

// Where a sample's coefficients lie; null stays.
PDN_INLINE const float* of_sample(const Coefficients& c, int64_t batch) {
    return c.data == nullptr ? nullptr : c.data + batch * c.step;
}

// The pointers of one sample's coefficients.
struct Sample {
    const float *mask, *gate, *scale, *shift;
};
PDN_INLINE Sample sample_of(const Params& p, int64_t batch) {
    return {of_sample(p.mask, batch), of_sample(p.gate, batch), of_sample(p.scale, batch), of_sample(p.shift, batch)};
}

template <class T>
PDN_INLINE const T* token_at(const void* data, int64_t batch, int64_t token, int64_t batch_step, int64_t token_step) {
    return static_cast<const T*>(data) + batch * batch_step + token * token_step;
}

}  // namespace
}  // namespace routed_norm
}  // namespace pdn
