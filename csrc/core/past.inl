// Stores past the caches, for results that nobody reads before they are out of them. Included once per ISA level.
#pragma once

#include "vec.h"

namespace pdn {
namespace {

// Whether store_past may write to `p`.
PDN_INLINE bool streams_to(const void* p) { return reinterpret_cast<uintptr_t>(p) % (kWidth * sizeof(float)) == 0; }

// Without reading the line first that is written, nor keeping it.
PDN_INLINE void store_past(float* p, vf v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
    _mm_stream_ps(p, (__m128)v);
#else
    store(p, v);
#endif
}

// After the last of them: other threads see what was stored only then.
PDN_INLINE void finish_past() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace
}  // namespace pdn
