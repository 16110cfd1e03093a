// A pass over images that needs sums over the whole image, and the pass that uses them: plain functions for the
// dispatchers, which are compiled once.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>

#include "threads.h"

namespace pdn {

// How far an image is: its chunks count up here, and whoever finishes the last one folds.
struct ImageProgress {
    std::atomic<int64_t> chunks{0};
    std::atomic<bool> folded{false};

    void wait() const {
        for (int i = 0; !folded.load(std::memory_order_acquire); ++i)
            if (i > 1000) std::this_thread::yield();  // the thread that we wait for may need this core
    }
};

// first(image, chunk) for all chunks of an image, fold(image) once, second(image, chunk) for all of them, and so on
// with the next image, on all threads; `grain` steps are worth waking one. False if memory is exhausted.
//
// One loop for both passes, image by image: starting a second one would cost as much as a small image. A step waits for
// lower-numbered ones only, and ranges are begun in ascending order, so that those are done or being done.
template <class First, class Fold, class Second>
bool two_passes(int64_t images, int64_t chunks, int64_t grain, const First& first, const Fold& fold,
                const Second& second) {
    const std::unique_ptr<ImageProgress[]> progress(new (std::nothrow) ImageProgress[static_cast<size_t>(images)]);
    if (progress == nullptr) return false;
    parallel_ranges(2 * chunks * images, grain, [&](int64_t begin, int64_t end) {
        for (int64_t step = begin; step < end; ++step) {
            const int64_t image = step / (2 * chunks), i = step % (2 * chunks);
            ImageProgress& own = progress[static_cast<size_t>(image)];
            if (i < chunks) {
                first(image, i);
                if (own.chunks.fetch_add(1, std::memory_order_acq_rel) + 1 < chunks) continue;
                fold(image);
                own.folded.store(true, std::memory_order_release);
            } else {
                own.wait();
                second(image, i - chunks);
            }
        }
    });
    return true;
}

}  // namespace pdn
