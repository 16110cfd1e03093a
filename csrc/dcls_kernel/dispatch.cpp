#include "dispatch.h"

#include <atomic>

#include "../core/levels.h"
#include "../core/threads.h"

namespace pdn {
namespace dcls_kernel {

PDN_FLOAT_LEVELS(KernelSet, kernels, kSets)

namespace {

constexpr int64_t kRangeWork = 40000;  // vector operations below which waking a thread costs more than it saves
constexpr int64_t kFactorWork = 10;    // of one factor

bool run(const KernelSet& set, void (*body)(const Params&, int64_t, float*), const Params& p) {
    int64_t taps = 1, factors = 0;
    for (const Axis& axis : p.axis) taps *= axis.size, factors += axis.size;
    const int64_t items = (p.pairs + set.width - 1) / set.width;
    const int64_t work = p.components * (taps + kFactorWork * factors), bytes = set.scratch_bytes(p);
    std::atomic<bool> enough{true};
    parallel_ranges(items, 1 + kRangeWork / work, [&](int64_t begin, int64_t end) {
        auto* scratch = static_cast<float*>(thread_scratch(bytes));
        if (scratch == nullptr) {
            enough = false;
            return;
        }
        for (int64_t item = begin; item < end; ++item) body(p, item, scratch);
    });
    return enough;
}

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

bool forward(Isa isa, const Params& p) { return run(kernel_set(isa), kernel_set(isa).forward, p); }
bool backward(Isa isa, const Params& p) { return run(kernel_set(isa), kernel_set(isa).backward, p); }

}  // namespace dcls_kernel
}  // namespace pdn
