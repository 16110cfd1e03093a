// Memory of harnesses that begins at a cache line, as a tensor's does, and ends where the tensor ends: sanitizers see
// what lies beyond.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

template <class T>
struct Aligned {
    using value_type = T;
    Aligned() = default;
    template <class U>
    Aligned(const Aligned<U>&) {}
    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})); }
    void deallocate(T* memory, size_t) { ::operator delete(memory, std::align_val_t{64}); }
    bool operator==(const Aligned&) const { return true; }
};

template <class T>
using Values = std::vector<T, Aligned<T>>;
