#include "dispatch.h"

#include <atomic>
#include <memory>
#include <new>
#include <thread>

#include "../core/levels.h"
#include "../core/threads.h"

namespace pdn {
namespace norm_quantize {

PDN_FLOAT_LEVELS(KernelSet, kernels, kSets)

namespace {

constexpr int64_t kSerialElements = 24576;  // below, waking another thread costs more than it saves

// How far an image is: its chunks count up here, and whoever finishes the last one folds.
struct Progress {
    std::atomic<int64_t> chunks{0};
    std::atomic<bool> folded{false};

    void wait() const {
        for (int i = 0; !folded.load(std::memory_order_acquire); ++i)
            if (i > 1000) std::this_thread::yield();  // the thread that we wait for may need this core
    }
};

// Floats for everything a call shares, then `per_range` bytes for each of `ranges` loop bodies.
struct Memory {
    char* data;
    int64_t shared, per_range;

    Memory(int64_t floats, int64_t ranges, int64_t per_range_bytes)
        : shared((floats * 4 + 63) / 64 * 64), per_range((per_range_bytes + 63) / 64 * 64) {
        data = static_cast<char*>(thread_scratch(shared + ranges * per_range));
    }
    float* floats(int64_t offset) const { return reinterpret_cast<float*>(data) + offset; }
    void* scratch(int64_t range) const { return data + shared + range * per_range; }
};

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

bool run(Isa isa, const GroupNormParams& p) {
    const KernelSet& set = kernel_set(isa);
    const int64_t chunk = set.group_chunk(p), chunks = (p.pixels + chunk - 1) / chunk, items = p.batch * chunks;
    const int64_t partial = set.group_partial(p), coefficients = set.group_coefficients(p);
    const Memory memory(items * partial + p.batch * coefficients, items, set.group_scratch(p));
    if (memory.data == nullptr) return false;
    const auto partials = [&](int64_t item) { return memory.floats(item * partial); };
    const auto image_coefficients = [&](int64_t image) {
        return memory.floats(items * partial + image * coefficients);
    };
    const std::unique_ptr<Progress[]> progress(new (std::nothrow) Progress[static_cast<size_t>(p.batch)]);
    if (progress == nullptr) return false;
    const auto step = [&](int64_t image, int64_t i) {
        Progress& own = progress[static_cast<size_t>(image)];
        const int64_t item = image * chunks + i % chunks;
        if (i < chunks) {
            set.group_statistics(p, image, i, partials(item));
            if (own.chunks.fetch_add(1, std::memory_order_acq_rel) + 1 < chunks) return;
            set.group_fold(p, image, partials(image * chunks), image_coefficients(image));
            own.folded.store(true, std::memory_order_release);
        } else {
            own.wait();
            set.group_write(p, image, i % chunks, image_coefficients(image), memory.scratch(item));
        }
    };
    // One loop for both passes, image by image: starting a second one would cost as much as a small image. A step waits
    // for lower-numbered ones only, and ranges are begun in ascending order, so that those are done or being done.
    const int64_t grain = p.batch * p.pixels * p.channels <= kSerialElements ? 2 * items : 1;
    parallel_ranges(2 * items, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) step(i / (2 * chunks), i % (2 * chunks));
    });
    return true;
}

bool run(Isa isa, const LayerNormParams& p) {
    const KernelSet& set = kernel_set(isa);
    const int64_t films = p.film ? p.rows / p.film_rows : 1;
    const int64_t coefficients = set.layer_coefficients(p);
    const int64_t ranges_rows = kSerialElements / p.channels > 0 ? kSerialElements / p.channels : 1;
    const int64_t items = (p.rows + ranges_rows - 1) / ranges_rows;
    const Memory memory(films * coefficients, items, set.layer_scratch(p));
    if (memory.data == nullptr) return false;
    for (int64_t film = 0; film < films; ++film) set.layer_fold(p, film, memory.floats(film * coefficients));
    parallel_ranges(items, 1, [&](int64_t begin, int64_t end) {
        const int64_t last = end * ranges_rows < p.rows ? end * ranges_rows : p.rows;
        set.layer_rows(p, begin * ranges_rows, last, memory.floats(0), memory.scratch(begin));
    });
    return true;
}

}  // namespace norm_quantize
}  // namespace pdn
