#include "dispatch.h"

#include <atomic>

#include "../core/levels.h"
#include "../core/threads.h"

namespace pdn {
namespace routed_norm {

PDN_FLOAT_LEVELS(KernelSet, kernels, kSets)

namespace {

constexpr int64_t kRangeItems = 32768;  // elements below which waking another thread costs more than it saves
constexpr int64_t kWidest = 16;         // floats of the widest vector

int64_t row_floats(const Params& p) { return (p.channels + kWidest - 1) / kWidest * kWidest; }

// `body(begin, end, scratch)` over `count` items of `elements` each, with `rows` rows of scratch.
template <class Body>
bool run_items(const Params& p, int64_t count, int64_t elements, int64_t rows, const Body& body) {
    std::atomic<bool> enough{true};
    const int64_t grain = elements < kRangeItems ? (kRangeItems + elements - 1) / elements : 1;
    parallel_ranges(count, grain, [&](int64_t begin, int64_t end) {
        const int64_t bytes = rows * row_floats(p) * static_cast<int64_t>(sizeof(float));
        auto* scratch = static_cast<float*>(thread_scratch(bytes));
        if (scratch == nullptr)
            enough = false;
        else
            body(begin, end, scratch);
    });
    return enough;
}

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

bool run(Isa isa, const Params& p) {
    const KernelSet& set = kernel_set(isa);
    return run_items(p, p.batch * p.tokens, p.channels, 1,
                     [&](int64_t begin, int64_t end, float* scratch) { set.forward(p, begin, end, scratch); });
}

bool run(Isa isa, const GradParams& p) {
    const KernelSet& set = kernel_set(isa);
    const int64_t chunks = chunks_of(p.forward.tokens);
    return run_items(p.forward, p.forward.batch * chunks, kChunk * p.forward.channels, 2,
                     [&](int64_t begin, int64_t end, float* scratch) {
                         for (int64_t item = begin; item < end; ++item)
                             set.backward(p, item / chunks, item % chunks, scratch);
                     });
}

}  // namespace routed_norm
}  // namespace pdn
