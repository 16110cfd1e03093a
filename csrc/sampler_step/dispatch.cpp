#include "dispatch.h"

#include <atomic>

#include "../core/levels.h"
#include "../core/pool.h"
#include "../core/threads.h"

namespace pdn {
namespace sampler_step {

PDN_FLOAT_LEVELS(KernelSet, kernels, kSets)

namespace {

// Elements below which waking another thread costs more than it saves.
constexpr int64_t kRange = 32768, kRangeWithNoise = 16384;

constexpr int64_t kLongStream = 4 << 20;  // bytes; a core's share of the last cache holds two or three of them

// Units, cut at the multiples of kChunk of their sample.
struct Split {
    int64_t per_sample, length;  // units of a sample, columns of one
    int64_t chunks;              // of a unit at most

    explicit Split(const Params& p) {
        per_sample = units(p) / p.batch;
        length = p.size / per_sample;
        chunks = (length + kChunk - 1) / kChunk;
        if (length % kChunk != 0 && per_sample > 1) ++chunks;  // a unit may begin amid a chunk
    }
};

bool run_item(const KernelSet& set, const Params& p, const Split& split, int64_t item, double* sums) {
    const int64_t unit = item / split.chunks;
    const int64_t begin = unit % split.per_sample * split.length, end = begin + split.length;
    int64_t first = (begin / kChunk + item % split.chunks) * kChunk, last = first + kChunk;
    if (first < begin) first = begin;
    if (last > end) last = end;
    if (first >= last) {
        for (int k = 0; k < sum_count(p); ++k) sums[k] = 0;
        return true;
    }
    const int64_t row = p.rows ? p.rows[p.groups == 1 ? 0 : unit] : p.row;
    return set.chunk(p, unit / split.per_sample, row, first, last - first, sums);
}

int64_t grain_of(const Params& p, const Split& split) {
    const int64_t range = p.keys ? kRangeWithNoise : kRange;
    if (p.batch * p.size < 2 * range) return units(p) * split.chunks;
    const int64_t one = split.length / split.chunks;
    return one >= range ? 1 : range / (one > 0 ? one : 1);
}

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

bool exceeds_caches(const Params& p) {
    const int64_t bytes = p.batch * p.size * (p.state == DType::float32 ? 4 : 2);
    return bytes >= kLongStream;
}

Result run(Isa isa, const Params& p, double* sums) {
    if (p.batch * p.size == 0) return {true, true};
    const KernelSet& set = kernel_set(isa);
    const Split split(p);
    const int64_t items = units(p) * split.chunks;
    const int count = sum_count(p);
    double* partials = sums;
    if (count > 0 && split.chunks > 1) {
        partials = static_cast<double*>(pool_take(items * count * static_cast<int64_t>(sizeof(double))));
        if (partials == nullptr) return {false, true};
    }
    std::atomic<bool> finite{true};
    parallel_ranges(items, grain_of(p, split), [&](int64_t begin, int64_t end) {
        bool good = true;
        for (int64_t item = begin; item < end; ++item)
            good &= run_item(set, p, split, item, count > 0 ? partials + item * count : nullptr);
        if (!good) finite.store(false, std::memory_order_relaxed);
    });
    if (partials != sums) {
        for (int64_t unit = 0; unit < units(p); ++unit)
            for (int k = 0; k < count; ++k) {
                double sum = 0;
                for (int64_t c = 0; c < split.chunks; ++c) sum += partials[(unit * split.chunks + c) * count + k];
                sums[unit * count + k] = sum;
            }
        pool_give(partials);
    }
    return {true, finite.load()};
}

}  // namespace sampler_step
}  // namespace pdn
