// Large output buffers, kept for reuse. A fresh buffer of many megabytes costs one page fault per page before the first
// byte is useful, often more time than the kernel that fills it; a network asks for the same sizes over and over.
#pragma once

#include <cstdint>

namespace pdn {

// Smaller requests belong to the ordinary allocator.
constexpr int64_t kPoolSmallest = 512 * 1024;

// 64-byte aligned memory of at least `bytes`, uninitialised; null if memory is exhausted. Thread-safe.
void* pool_take(int64_t bytes);

// Give memory from pool_take back. Thread-safe.
void pool_give(void* data);

// Bytes that lie unused in the pool.
int64_t pool_unused();

// How many unused bytes the pool may keep: PYDENOISE_POOL_MIB (256 if unset; 0 keeps nothing).
int64_t pool_limit();

// Free everything that lies unused.
void pool_clear();

}  // namespace pdn
