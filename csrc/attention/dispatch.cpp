#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "../core/levels.h"
#include "../core/pool.h"
#include "../core/threads.h"

namespace pdn {
namespace attention {

PDN_ALL_LEVELS(KernelSet, kernels, kSets)

namespace {

constexpr double kSerialProducts = 200000.;  // below, waking another thread costs more than it saves

// The blocks of queries [image][head][block], those with most keys first: what is left to the end is short, so threads
// end together. Empty: in their own order.
std::vector<int32_t> by_work(const AttentionParams& p, int64_t blocks) {
    const BlockLists& lists = p.lists;
    const int64_t items = p.batch * p.heads * blocks;
    if (lists.counts == nullptr || items > INT32_MAX) return {};
    const auto keys = [&](int64_t item) {
        const int64_t head = item / blocks;
        const int64_t list = head / p.heads * lists.batch_stride + head % p.heads * lists.head_stride;
        return std::clamp<int64_t>(lists.counts[list * blocks + item % blocks], 0, lists.longest);
    };
    std::vector<int64_t> starts(static_cast<size_t>(lists.longest) + 2);
    for (int64_t item = 0; item < items; ++item) ++starts[static_cast<size_t>(lists.longest - keys(item)) + 1];
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<int32_t> order(static_cast<size_t>(items));
    for (int64_t item = 0; item < items; ++item)
        order[static_cast<size_t>(starts[static_cast<size_t>(lists.longest - keys(item))]++)] =
            static_cast<int32_t>(item);
    return order;
}

// int8 codes of all keys, in memory that the caller gives back to the pool; null if there is none.
void* encode(const KernelSet& set, const AttentionParams& p) {
    const int64_t kv_heads = p.heads / p.group, heads = p.batch * kv_heads;
    const int64_t blocks = (p.key.count + p.block_size - 1) / p.block_size;
    void* codes = pool_take(heads * set.code_bytes(p));
    if (codes == nullptr) return nullptr;
    parallel_ranges(heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t head = begin; head < end; ++head) set.average_keys(p, head / kv_heads, head % kv_heads, codes);
    });
    parallel_ranges(heads * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t head = item / blocks;
            set.encode_keys(p, head / kv_heads, head % kv_heads, item % blocks, codes);
        }
    });
    return codes;
}

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

bool run(Isa isa, const AttentionParams& p) {
    const KernelSet& set = kernel_set(isa);
    const int64_t block = p.lists.counts != nullptr ? p.block_size : kQueryBlock;
    const int64_t blocks = (p.query.count + block - 1) / block, items = p.batch * p.heads * blocks;
    const double products = static_cast<double>(p.batch * p.heads) * static_cast<double>(p.query.count) *
                            static_cast<double>(p.key.count * p.size);
    void* codes = nullptr;
    if (p.int8 && (codes = encode(set, p)) == nullptr) return false;
    const std::vector<int32_t> order = by_work(p, blocks);
    const int64_t scratch_bytes = set.scratch_bytes(p);
    std::atomic<bool> enough{true};
    parallel_ranges(items, products < kSerialProducts ? items : 1, [&](int64_t begin, int64_t end) {
        void* scratch = thread_scratch(scratch_bytes);
        if (scratch == nullptr) {
            enough = false;
            return;
        }
        for (int64_t i = begin; i < end; ++i) {
            const int64_t item = order.empty() ? i : order[static_cast<size_t>(i)], head = item / blocks;
            const int64_t first = item % blocks * block, last = std::min(first + block, p.query.count);
            set.attend(p, head / p.heads, head % p.heads, first, last, codes, scratch);
        }
    });
    pool_give(codes);
    return enough;
}

}  // namespace attention
}  // namespace pdn
