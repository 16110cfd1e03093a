// A parallel loop that the host installs: torch's pool in the extension, plain serial in stand-alone harnesses.
#pragma once

#include <cstdint>

namespace pdn {

using RangeBody = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeBody body, void* context);

// Replace the serial default. Call once, before any kernel runs.
void install_parallel_for(ParallelFor implementation);

// Run `body` over [0, count) in ranges of at least `grain` items. Ranges are begun in ascending order: the body of one
// may wait for what those before it do.
void parallel_for(int64_t count, int64_t grain, RangeBody body, void* context);

// The same for a callable that takes (begin, end).
template <class Body>
void parallel_ranges(int64_t count, int64_t grain, const Body& body) {
    parallel_for(
        count, grain,
        [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// Scratch memory of the calling thread, 64-byte aligned, valid until its next call with this slot (0 or 1) on this
// thread; grows, never shrinks. Null if memory is exhausted. Slot 1 is for the body of a parallel loop whose caller
// holds slot 0.
void* thread_scratch(int64_t bytes, int slot = 0);

}  // namespace pdn
