#include "dispatch.h"

#include <atomic>

#include "../core/levels.h"
#include "../core/pool.h"
#include "../core/threads.h"

namespace pdn {
namespace attention {

PDN_FLOAT_LEVELS(KernelSet, kernels, kSets)

namespace {

constexpr int64_t kManyHeads = 32;           // enough to keep threads busy with whole heads
constexpr double kSerialProducts = 200000.;  // below, waking another thread costs more than it saves

int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Call {
    const KernelSet& set;
    const AttentionParams& p;
    int64_t blocks, query_blocks, grain;

    void pack(int64_t head, int64_t block, void* packed) const {
        set.pack(p, head / p.heads, head % p.heads, block, packed);
    }
    void attend(int64_t head, int64_t block, const void* packed, void* scratch) const {
        const int64_t first = block * kQueryBlock;
        const int64_t last = first + kQueryBlock < p.query.count ? first + kQueryBlock : p.query.count;
        set.attend(p, head / p.heads, head % p.heads, first, last, packed, scratch);
    }
};

// A thread packs the keys and values of a head and uses them at once, while they are in its cache.
bool run_heads(const Call& call, int64_t heads, int64_t packed_bytes, int64_t scratch_bytes) {
    std::atomic<bool> enough{true};
    parallel_ranges(heads, call.grain == 1 ? 1 : heads, [&](int64_t begin, int64_t end) {
        char* memory = static_cast<char*>(thread_scratch(packed_bytes + scratch_bytes));
        if (memory == nullptr) {
            enough = false;
            return;
        }
        for (int64_t head = begin; head < end; ++head) {
            for (int64_t block = 0; block < call.blocks; ++block) call.pack(head, block, memory);
            for (int64_t block = 0; block < call.query_blocks; ++block)
                call.attend(head, block, memory, memory + packed_bytes);
        }
    });
    return enough;
}

// Few heads with many queries: all keys and values are packed first, then every block of queries is an item.
bool run_blocks(const Call& call, int64_t heads, int64_t packed_bytes, int64_t scratch_bytes) {
    char* packed = static_cast<char*>(pool_take(heads * packed_bytes));
    if (packed == nullptr) return false;
    const auto all = [&](int64_t items) { return call.grain == 1 ? 1 : items; };
    parallel_ranges(heads * call.blocks, all(heads * call.blocks), [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item)
            call.pack(item / call.blocks, item % call.blocks, packed + item / call.blocks * packed_bytes);
    });
    std::atomic<bool> enough{true};
    parallel_ranges(heads * call.query_blocks, all(heads * call.query_blocks), [&](int64_t begin, int64_t end) {
        void* scratch = thread_scratch(scratch_bytes);
        if (scratch == nullptr) {
            enough = false;
            return;
        }
        for (int64_t item = begin; item < end; ++item)
            call.attend(item / call.query_blocks, item % call.query_blocks,
                        packed + item / call.query_blocks * packed_bytes, scratch);
    });
    pool_give(packed);
    return enough;
}

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

bool run(Isa isa, const AttentionParams& p) {
    const KernelSet& set = kernel_set(isa);
    const int64_t key_block = set.key_block(p), heads = p.batch * p.heads;
    const double products =
        static_cast<double>(heads) * static_cast<double>(p.query.count) * static_cast<double>(p.key.count * p.size);
    const Call call = {set, p, (p.key.count + key_block - 1) / key_block,
                       (p.query.count + kQueryBlock - 1) / kQueryBlock, products < kSerialProducts ? 0 : 1};
    const int64_t packed_bytes = padded(set.packed_bytes(p)), scratch_bytes = padded(set.scratch_bytes(p));
    if (heads >= kManyHeads || call.query_blocks == 1) return run_heads(call, heads, packed_bytes, scratch_bytes);
    return run_blocks(call, heads, packed_bytes, scratch_bytes);
}

}  // namespace attention
}  // namespace pdn
