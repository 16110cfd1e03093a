#include "threads.h"

#include <cstdlib>

namespace pdn {
namespace {

void serial(int64_t count, int64_t, RangeBody body, void* context) {
    if (count > 0) body(context, 0, count);
}

ParallelFor current = serial;

struct Scratch {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Scratch() { std::free(data); }
};

}  // namespace

void install_parallel_for(ParallelFor implementation) { current = implementation; }

void parallel_for(int64_t count, int64_t grain, RangeBody body, void* context) { current(count, grain, body, context); }

void* thread_scratch(int64_t bytes, int slot) {
    static thread_local Scratch slots[2];
    Scratch& scratch = slots[slot];
    if (scratch.bytes < bytes) {
        std::free(scratch.data);
        const int64_t rounded = (bytes + 4095) / 4096 * 4096;
        scratch.data = std::aligned_alloc(64, static_cast<size_t>(rounded));
        scratch.bytes = scratch.data ? rounded : 0;
    }
    return scratch.data;
}

}  // namespace pdn
