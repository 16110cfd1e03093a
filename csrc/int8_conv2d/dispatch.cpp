#include "dispatch.h"

#include <atomic>

#include "../core/levels.h"
#include "../core/threads.h"

namespace pdn {
namespace int8_conv2d {

PDN_INT8_LEVELS(KernelSet, kernels, kSets)

namespace {

// Below this many products waking a second thread costs more than it brings.
constexpr double kSerialProducts = 1e6;

// A number that no other call has; it does not begin at a value that unwritten memory is likely to hold.
std::atomic<uint64_t> next_call{0x9d5c0fb3a2e41687u};

ConvParams joined(const ConvParams& p) {
    const auto plain = [](const Axis& a) { return a.kernel == 1 && a.step == 1 && a.offset == 0 && a.out_size > 0; };
    if (!plain(p.rows) || !plain(p.columns) || p.upsample != 1 || p.rows.in_size != p.rows.out_size ||
        p.columns.in_size != p.columns.out_size)
        return p;
    ConvParams q = p;
    Axis &a = q.rows, &b = q.columns;
    const int64_t width = b.out_size;
    if (a.out_size > 1 && (a.in_stride != width * b.in_stride || a.out_stride != width * b.out_stride ||
                           (p.residual && a.residual_stride != width * b.residual_stride)))
        return p;
    b.in_size = b.out_size = width * a.out_size;
    a.in_size = a.out_size = 1;
    const int64_t pixels = b.out_size;
    if (q.batch == 1 || p.channel_bias || p.film || q.in_batch_stride != pixels * b.in_stride ||
        q.out_batch_stride != pixels * b.out_stride ||
        (p.residual && q.residual_batch_stride != pixels * b.residual_stride))
        return q;
    b.in_size = b.out_size = pixels * q.batch;
    q.batch = 1;
    return q;
}

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

int choose_algorithm(Isa isa, const ConvParams& p) {
    const KernelSet& set = kernel_set(isa);
    for (int i = 0; i < set.algorithm_count; ++i)
        if (set.algorithms[i].unsupported(p) == nullptr) return i;
    return -1;
}

void pack(const Algorithm& algorithm, const ConvParams& p, const int8_t* weight, void* packed) {
    const int64_t elements = p.in_channels * p.out_channels * p.groups * p.rows.kernel * p.columns.kernel;
    const int64_t items = algorithm.pack_items(p);
    parallel_ranges(items, elements < 65536 ? items : 1,
                    [&](int64_t begin, int64_t end) { algorithm.pack(p, weight, packed, begin, end); });
}

ConvParams prepared(const Algorithm& algorithm, const ConvParams& given) {
    ConvParams p = joined(given);
    const double products = static_cast<double>(p.batch) * p.groups * p.in_channels * p.out_channels * p.rows.kernel *
                            p.columns.kernel * p.rows.out_size * p.columns.out_size;
    if (products < kSerialProducts) p.threads = 1;
    p.plan = algorithm.plan(p);
    return p;
}

bool run(const Algorithm& algorithm, const ConvParams& p) {
    const uint64_t call = next_call.fetch_add(1);
    std::atomic<bool> enough{true};
    parallel_ranges(p.plan.items, p.threads == 1 ? p.plan.items : 1, [&](int64_t begin, int64_t end) {
        void* scratch = thread_scratch(p.plan.scratch_bytes);
        if (scratch == nullptr && p.plan.scratch_bytes > 0) {
            enough = false;
            return;
        }
        algorithm.run(p, begin, end, scratch, call);
    });
    return enough;
}

}  // namespace int8_conv2d
}  // namespace pdn
