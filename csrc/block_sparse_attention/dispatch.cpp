#include "dispatch.h"

#include <atomic>

#include "../core/levels.h"
#include "../core/pool.h"
#include "../core/threads.h"

namespace pdn {
namespace block_sparse_attention {

PDN_FLOAT_LEVELS(KernelSet, kernels, kSets)

namespace {

// By sizes alone, never by the number of threads, so that sums are added up in the same order everywhere.
constexpr int64_t kWorkspaces = 64 << 20;  // bytes at a time, or one head
constexpr int64_t kItems = 32;             // at least so many at a time, if there are enough blocks
constexpr int64_t kRounds = 16;            // at most

constexpr double kSerialProducts = 100000.;  // below, waking another thread costs more than it saves

// Heads of keys at a time; all times have about as many.
int64_t heads_at_once(int64_t heads, int64_t bytes) {
    const int64_t fitting = kWorkspaces / bytes < 1 ? 1 : kWorkspaces / bytes;
    const int64_t times = (heads + fitting - 1) / fitting;
    return (heads + times - 1) / times;
}

// How often all items run, and into how many segments the blocks of a head are cut.
int64_t rounds_of(const BackwardParams& p, int64_t heads) {
    const auto at_most = [](int64_t a, int64_t b) { return a < b ? a : b; };
    const int64_t blocks = (at_most(p.query.count, p.key.count) + p.block - 1) / p.block;
    return at_most(at_most((kItems + heads - 1) / heads, kRounds), blocks);
}

// The heads of keys [first, first + count), each with a workspace of its own.
struct Wave {
    const KernelSet& set;
    const BackwardParams& p;
    int64_t first, count, bytes;
    char* workspaces;
    bool serial;

    int64_t group() const { return p.heads / p.kv_heads; }
    int64_t image(int64_t i) const { return (first + i) / p.kv_heads; }
    int64_t kv_head(int64_t i) const { return (first + i) % p.kv_heads; }
    void* workspace(int64_t i) const { return workspaces + i * bytes; }

    // body(item) for every item, on all threads.
    template <class Body>
    void each(int64_t items, const Body& body) const {
        parallel_ranges(items, serial ? items : 1, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) body(item);
        });
    }

    using Step = void (*)(const BackwardParams& p, int64_t image, int64_t head, int64_t piece, void* workspace);

    // A step for every piece of the keys, and one for every piece of the queries.
    void each_piece(Step keys, Step queries) const {
        const int64_t key_pieces = (p.key.count + kPiece - 1) / kPiece;
        const int64_t query_pieces = (p.query.count + kPiece - 1) / kPiece;
        const int64_t pieces = key_pieces + group() * query_pieces;
        each(count * pieces, [&](int64_t item) {
            const int64_t i = item / pieces, piece = item % pieces - key_pieces;
            if (piece < 0)
                keys(p, image(i), kv_head(i), piece + key_pieces, workspace(i));
            else
                queries(p, image(i), kv_head(i) * group() + piece / query_pieces, piece % query_pieces, workspace(i));
        });
    }

    // Blocks of keys and of queries are cut into as many segments as there are rounds. In a round, every segment of
    // keys meets another one of queries, so that no two items add to the same sums.
    bool accumulate(int64_t rounds) const {
        const int64_t query_blocks = (p.query.count + p.block - 1) / p.block;
        const int64_t key_blocks = (p.key.count + p.block - 1) / p.block;
        std::atomic<bool> enough{true};
        for (int64_t round = 0; round < rounds; ++round)
            each(count * rounds, [&](int64_t item) {
                void* scratch = thread_scratch(set.scratch_bytes(p));
                if (scratch == nullptr) {
                    enough = false;
                    return;
                }
                const int64_t i = item / rounds, keys = item % rounds, queries = (keys + round) % rounds;
                set.accumulate(p, image(i), kv_head(i), keys * key_blocks / rounds, (keys + 1) * key_blocks / rounds,
                               queries * query_blocks / rounds, (queries + 1) * query_blocks / rounds, workspace(i),
                               scratch);
            });
        return enough;
    }
};

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

bool run(Isa isa, const BackwardParams& p) {
    const KernelSet& set = kernel_set(isa);
    const int64_t bytes = (set.workspace_bytes(p) + 63) / 64 * 64, heads = p.batch * p.kv_heads;
    if (heads == 0) return true;
    const int64_t wave = heads_at_once(heads, bytes), rounds = rounds_of(p, wave);
    char* workspaces = static_cast<char*>(pool_take(wave * bytes));
    if (workspaces == nullptr) return false;
    const double products = static_cast<double>(p.batch * p.heads * p.query.count) * static_cast<double>(p.key.count) *
                            static_cast<double>(p.size);
    bool enough = true;
    for (int64_t first = 0; first < heads && enough; first += wave) {
        const Wave w = {
            set, p, first, wave < heads - first ? wave : heads - first, bytes, workspaces, products < kSerialProducts};
        w.each_piece(set.begin_keys, set.begin_queries);
        enough = w.accumulate(rounds);
        w.each_piece(set.end_keys, set.end_queries);
    }
    pool_give(workspaces);
    return enough;
}

}  // namespace block_sparse_attention
}  // namespace pdn
