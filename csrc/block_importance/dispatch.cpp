#include "dispatch.h"

#include <atomic>

#include "../core/levels.h"
#include "../core/pool.h"
#include "../core/threads.h"

namespace pdn {
namespace block_importance {

PDN_FLOAT_LEVELS(KernelSet, kernels, kSets)

namespace {

constexpr int64_t kWave = 8 << 20;           // bytes of packed keys at a time, or one head
constexpr double kSerialProducts = 200000.;  // below, waking another thread costs more than it saves

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

// As many heads of keys at a time as fit a cache are packed; then every block of their queries is an item.
bool run(Isa isa, const ImportanceParams& p) {
    const KernelSet& set = kernel_set(isa);
    const int64_t packed_bytes = (set.packed_bytes(p) + 63) / 64 * 64, kv_heads = p.batch * p.kv_heads;
    const int64_t group = p.heads / p.kv_heads, rows = (p.query.count + p.block - 1) / p.block;
    const int64_t chunks = (p.key.count + set.chunk(p) - 1) / set.chunk(p);
    const int64_t fitting = kWave / packed_bytes < 1 ? 1 : kWave / packed_bytes;
    const int64_t wave = fitting < kv_heads ? fitting : kv_heads;
    const double products = static_cast<double>(p.batch * p.heads * p.query.count) * static_cast<double>(p.key.count) *
                            static_cast<double>(p.size);
    const auto grain = [&](int64_t items) { return products < kSerialProducts ? items : 1; };
    char* packed = static_cast<char*>(pool_take(wave * packed_bytes));
    if (packed == nullptr) return false;
    std::atomic<bool> enough{true};
    for (int64_t first = 0; first < kv_heads; first += wave) {
        const int64_t heads = wave < kv_heads - first ? wave : kv_heads - first;
        parallel_ranges(heads * chunks, grain(heads * chunks), [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) {
                const int64_t kv = first + item / chunks;
                set.pack(p, kv / p.kv_heads, kv % p.kv_heads, item % chunks, packed + item / chunks * packed_bytes);
            }
        });
        const int64_t items = heads * group * rows;
        parallel_ranges(items, grain(items), [&](int64_t begin, int64_t end) {
            void* scratch = thread_scratch(set.scratch_bytes(p));
            if (scratch == nullptr) {
                enough = false;
                return;
            }
            for (int64_t item = begin; item < end; ++item) {
                const int64_t head = first * group + item / rows;
                set.measure(p, head / p.heads, head % p.heads, item % rows, packed + item / rows / group * packed_bytes,
                            scratch);
            }
        });
    }
    pool_give(packed);
    return enough;
}

}  // namespace block_importance
}  // namespace pdn
