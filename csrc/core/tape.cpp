#include "tape.h"

#include <cstdlib>

namespace pdn {
namespace {

thread_local Tape* current = nullptr;

constexpr int64_t kAlignment = 64;

}  // namespace

Arena::~Arena() {
    for (const Buffer& buffer : buffers_) std::free(buffer.data);
}

void* Arena::take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Buffer* best = nullptr;  // the smallest that fits
    for (Buffer& buffer : buffers_)
        if (!buffer.used && buffer.capacity >= bytes && (best == nullptr || buffer.capacity < best->capacity))
            best = &buffer;
    if (best == nullptr) {
        const int64_t capacity = (bytes / kAlignment + 1) * kAlignment;
        char* data = static_cast<char*>(std::aligned_alloc(kAlignment, static_cast<size_t>(capacity)));
        if (data == nullptr) return nullptr;
        buffers_.push_back({data, capacity, false});
        best = &buffers_.back();
    }
    best->used = true;
    return best->data;
}

void Arena::give(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Buffer& buffer : buffers_)
        if (buffer.data == data) buffer.used = false;
}

bool Arena::owns(const void* data) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Buffer& buffer : buffers_)
        if (data >= buffer.data && data < buffer.data + buffer.capacity) return true;
    return false;
}

int64_t Arena::bytes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t sum = 0;
    for (const Buffer& buffer : buffers_) sum += buffer.capacity;
    return sum;
}

void Tape::replay(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) steps[static_cast<size_t>(i)]();
}

Tape* recording() { return current; }
void record_on(Tape* tape) { current = tape; }

}  // namespace pdn
