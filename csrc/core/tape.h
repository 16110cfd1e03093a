// A tape: kernel calls that were recorded once, with all their pointers, and are run again without the code that made
// them. While a thread records, outputs come from the tape's arena: memory that one call gives back is used by a later
// one, and since the replay makes the same calls in the same order, what was right once is right every time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace pdn {

// Buffers of one tape. Outlives it as long as a tensor uses one of its buffers.
class Arena {
  public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena();
    void* take(int64_t bytes);  // 64-byte aligned, uninitialised; null if memory is exhausted
    void give(void* data);
    bool owns(const void* data) const;  // whether `data` points into one of the buffers
    int64_t bytes() const;

  private:
    struct Buffer {
        char* data;
        int64_t capacity;
        bool used;
    };
    mutable std::mutex mutex_;
    std::vector<Buffer> buffers_;
};

struct Tape {
    std::vector<std::function<void()>> steps;
    std::vector<std::shared_ptr<void>> held;  // what the steps point to, outside the arena
    std::shared_ptr<Arena> arena = std::make_shared<Arena>();
    std::string refusal;  // why the calls cannot be replayed, if so

    void replay(int64_t begin, int64_t end) const;
};

// The tape on which this thread records, or null.
Tape* recording();
void record_on(Tape* tape);  // null stops

}  // namespace pdn
