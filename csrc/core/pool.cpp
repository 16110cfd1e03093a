#include "pool.h"

#include <cstdlib>
#include <list>
#include <mutex>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pdn {
namespace {

constexpr int64_t kHeader = 64;  // in front of the data: the block's capacity, and its alignment kept
constexpr int64_t kHugePage = 2 << 20;

struct Block {
    char* memory;  // starts with the header
    int64_t capacity;
};

struct Pool {
    std::mutex mutex;
    std::list<Block> unused;  // latest first: most likely still in the cache
    int64_t unused_bytes = 0;
};

Pool& pool() {
    static Pool* instance = new Pool;  // never destroyed: tensors may outlive static destructors
    return *instance;
}

int64_t& capacity_of(char* memory) { return *reinterpret_cast<int64_t*>(memory); }

char* allocate(int64_t capacity) {
    const int64_t whole = (capacity + kHeader + kHugePage - 1) / kHugePage * kHugePage;
    char* memory = static_cast<char*>(std::aligned_alloc(kHugePage, static_cast<size_t>(whole)));
    if (memory == nullptr) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(memory, static_cast<size_t>(whole), MADV_HUGEPAGE);  // advice only: the result does not depend on it
#endif
    capacity_of(memory) = whole - kHeader;
    return memory;
}

}  // namespace

int64_t pool_limit() {
    static const int64_t limit = [] {
        const char* text = std::getenv("PYDENOISE_POOL_MIB");
        char* end = nullptr;
        const long long mebibytes = text ? std::strtoll(text, &end, 10) : 256;
        const bool usable = text == nullptr || (end != text && *end == '\0' && mebibytes >= 0 && mebibytes < (1 << 24));
        return static_cast<int64_t>(usable ? mebibytes : 256) << 20;
    }();
    return limit;
}

void* pool_take(int64_t bytes) {
    {
        Pool& p = pool();
        const std::lock_guard<std::mutex> lock(p.mutex);
        for (auto block = p.unused.begin(); block != p.unused.end(); ++block) {
            // not much larger than asked for: a small tensor must not hold a large block
            if (block->capacity < bytes || block->capacity > bytes + bytes / 2 + kHugePage) continue;
            char* memory = block->memory;
            p.unused_bytes -= block->capacity;
            p.unused.erase(block);
            return memory + kHeader;
        }
    }
    char* memory = allocate(bytes);
    if (memory == nullptr) {
        pool_clear();
        memory = allocate(bytes);
    }
    return memory ? memory + kHeader : nullptr;
}

void pool_give(void* data) {
    if (data == nullptr) return;
    char* memory = static_cast<char*>(data) - kHeader;
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.unused.push_front({memory, capacity_of(memory)});
    p.unused_bytes += p.unused.front().capacity;
    while (p.unused_bytes > pool_limit()) {  // the longest unused go first
        p.unused_bytes -= p.unused.back().capacity;
        std::free(p.unused.back().memory);
        p.unused.pop_back();
    }
}

int64_t pool_unused() {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    return p.unused_bytes;
}

void pool_clear() {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    for (const Block& block : p.unused) std::free(block.memory);
    p.unused.clear();
    p.unused_bytes = 0;
}

}  // namespace pdn
