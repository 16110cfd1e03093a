#include "dispatch.h"

#include <atomic>

#include "../core/levels.h"
#include "../core/threads.h"

namespace pdn {
namespace softmax_aggregate {

PDN_FLOAT_LEVELS(KernelSet, kernels, kSets)

namespace {

constexpr int64_t kLongStream = 8 << 20;  // bytes of a result that is out of the caches when it is read anyway
constexpr int64_t kRangeItems = 65536;    // features below which waking another thread costs more than it saves

// `body(batch, first pixel, pixels, scratch)` for every tile.
template <class P, class Body>
bool run_tiles(const P& p, const Body& body) {
    const int64_t tile = tile_of(p.features_at), tiles = (p.pixels + tile - 1) / tile;
    const int64_t elements = p.maps * p.channels * (p.pixels < tile ? p.pixels : tile);
    const int64_t grain = elements < kRangeItems ? (kRangeItems + elements - 1) / elements : 1;
    std::atomic<bool> enough{true};
    parallel_ranges(p.batch * tiles, grain, [&](int64_t begin, int64_t end) {
        const int64_t bytes = scratch_floats(p.maps) * static_cast<int64_t>(sizeof(float));
        auto* scratch = static_cast<float*>(thread_scratch(bytes));
        if (scratch == nullptr) {
            enough = false;
            return;
        }
        for (int64_t item = begin; item < end; ++item) {
            const int64_t first = item % tiles * tile, rest = p.pixels - first;
            body(item / tiles, first, rest < tile ? rest : tile, scratch);
        }
    });
    return enough;
}

// Whether a result of so many elements is.
template <class P>
bool is_long(const P& p, int64_t elements) {
    return elements * (p.dtype == DType::float32 ? 4 : 2) >= kLongStream;
}

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

bool run(Isa isa, Params p) {
    const KernelSet& set = kernel_set(isa);
    p.past_caches = is_long(p, p.batch * p.channels * p.pixels);
    return run_tiles(p, [&](int64_t batch, int64_t first, int64_t count, float* scratch) {
        set.forward(p, batch, first, count, scratch);
    });
}

bool run(Isa isa, GradParams p) {
    const KernelSet& set = kernel_set(isa);
    p.past_caches = is_long(p, p.batch * p.maps * p.channels * p.pixels);
    return run_tiles(p, [&](int64_t batch, int64_t first, int64_t count, float* scratch) {
        set.backward(p, batch, first, count, scratch);
    });
}

}  // namespace softmax_aggregate
}  // namespace pdn
