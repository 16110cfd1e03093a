#include "dispatch.h"

#include <atomic>

#include "../core/levels.h"
#include "../core/threads.h"

namespace pdn {
namespace quantize {

PDN_FLOAT_LEVELS(KernelSet, kernels, kSets)

namespace {

constexpr int64_t kStretch = 4096;      // elements of a row made of many short ones
constexpr int64_t kRangeItems = 16384;  // elements below which waking another thread costs more than it saves

int64_t element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

int64_t grain(int64_t rows, int64_t channels, int64_t cost) {
    if (rows * channels * cost < 2 * kRangeItems) return rows > 0 ? rows : 1;
    const int64_t least = kRangeItems / (channels * cost);
    return least > 0 ? least : 1;
}

// Rows may be joined where nothing depends on the row or the channel.
bool is_flat(const QuantizeParams& p) {
    return p.scale && p.scale_step == 0 && p.channel_scale == nullptr && p.activation != Activation::geglu &&
           p.row_stride == p.channels;
}

template <class Params>
void reshape(Params& p, int64_t rows, int64_t channels) {
    p.rows = rows;
    p.channels = p.row_stride = channels;
}

bool run_rows(const KernelSet& set, const QuantizeParams& p) {
    const int64_t scratch_bytes = set.scratch_bytes(p);
    const bool cheap =
        p.activation == Activation::none || p.activation == Activation::relu || is_leaky_relu(p.activation);
    const int64_t cost = cheap ? 1 : 4;
    std::atomic<bool> enough{true};
    parallel_ranges(p.rows, grain(p.rows, p.channels, cost), [&](int64_t begin, int64_t end) {
        void* scratch = scratch_bytes > 0 ? thread_scratch(scratch_bytes) : nullptr;
        if (scratch == nullptr && scratch_bytes > 0) {
            enough = false;
            return;
        }
        set.quantize(p, begin, end, scratch);
    });
    return enough;
}

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

bool run(Isa isa, const QuantizeParams& p) {
    const KernelSet& set = kernel_set(isa);
    if (!is_flat(p)) return run_rows(set, p);
    const int64_t total = p.rows * p.channels, joined = total / kStretch * kStretch;
    QuantizeParams rest = p;
    reshape(rest, total > joined ? 1 : 0, total - joined);
    rest.input = static_cast<const char*>(p.input) + joined * element_bytes(p.dtype);
    rest.output = p.output + joined;
    set.quantize(rest, 0, rest.rows, nullptr);
    QuantizeParams flat = p;
    reshape(flat, joined / kStretch, kStretch);
    return run_rows(set, flat);
}

void run(Isa isa, const DequantizeParams& p) {
    const KernelSet& set = kernel_set(isa);
    const auto rows = [&](const DequantizeParams& q) {
        parallel_ranges(q.rows, grain(q.rows, q.channels, 1),
                        [&](int64_t begin, int64_t end) { set.dequantize(q, begin, end); });
    };
    if (p.scale_step != 0 || p.row_stride != p.channels) return rows(p);
    const int64_t total = p.rows * p.channels, joined = total / kStretch * kStretch;
    DequantizeParams rest = p;
    reshape(rest, total > joined ? 1 : 0, total - joined);
    rest.input = p.input + joined;
    rest.output = static_cast<char*>(p.output) + joined * element_bytes(p.dtype);
    set.dequantize(rest, 0, rest.rows);
    DequantizeParams flat = p;
    reshape(flat, joined / kStretch, kStretch);
    rows(flat);
}

}  // namespace quantize
}  // namespace pdn
