#include "dispatch.h"

#include <atomic>

#include "../core/levels.h"
#include "../core/pool.h"
#include "../core/threads.h"

namespace pdn {
namespace token_confidence {

PDN_FLOAT_LEVELS(KernelSet, kernels, kSets)

namespace {

constexpr int64_t kManyRows = 32;       // enough to keep threads busy with whole rows
constexpr int64_t kRangeItems = 16384;  // logits below which waking another thread costs more than it saves

bool run_rows(const KernelSet& set, const Params& p, int64_t pieces) {
    std::atomic<bool> enough{true};
    const int64_t grain = p.rows * p.vocabulary < 2 * kRangeItems ? p.rows : kRangeItems / p.vocabulary;
    parallel_ranges(p.rows, grain > 0 ? grain : 1, [&](int64_t begin, int64_t end) {
        auto* partials = static_cast<Partial*>(thread_scratch(pieces * static_cast<int64_t>(sizeof(Partial))));
        if (partials == nullptr) {
            enough = false;
            return;
        }
        for (int64_t row = begin; row < end; ++row) {
            for (int64_t i = 0; i < pieces; ++i) set.piece(p, row, i * kPiece, partials + i);
            set.finish(p, row, partials, pieces);
        }
    });
    return enough;
}

// Few rows: their pieces are spread over the threads.
bool run_pieces(const KernelSet& set, const Params& p, int64_t pieces) {
    const int64_t bytes = p.rows * pieces * static_cast<int64_t>(sizeof(Partial));
    auto* partials = static_cast<Partial*>(pool_take(bytes));
    if (partials == nullptr) return false;
    parallel_ranges(p.rows * pieces, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item)
            set.piece(p, item / pieces, item % pieces * kPiece, partials + item);
    });
    for (int64_t row = 0; row < p.rows; ++row) set.finish(p, row, partials + row * pieces, pieces);
    pool_give(partials);
    return true;
}

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

bool run(Isa isa, const Params& p) {
    const KernelSet& set = kernel_set(isa);
    const int64_t pieces = (p.vocabulary + kPiece - 1) / kPiece;
    if (p.rows >= kManyRows || pieces == 1) return run_rows(set, p, pieces);
    return run_pieces(set, p, pieces);
}

}  // namespace token_confidence
}  // namespace pdn
