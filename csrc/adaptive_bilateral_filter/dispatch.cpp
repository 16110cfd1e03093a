#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "../core/levels.h"
#include "../core/pool.h"
#include "../core/threads.h"

namespace pdn {
namespace adaptive_bilateral_filter {

PDN_FLOAT_LEVELS(KernelSet, kernels, kSets)

namespace {

constexpr int64_t kBlockRows = 16, kBlockColumns = 128;  // at least, where the image has them
static_assert(kBlockColumns > kLargestRadius, "what is mirrored at a side comes from the block at that side");
constexpr int64_t kManyChannels = 8, kFewRows = 4;  // blocks of many channels are lower
constexpr int64_t kRangeTaps = 1 << 18;             // below it waking another thread costs more than it saves

// An axis cut into pieces that begin and end with tiles of sigma, or into parts of a tile. Pieces do not depend on the
// number of threads; the first and the last are longer than `least`, unless there is only one.
struct Cut {
    int64_t size, tile, pieces, tiles_in_piece, parts_of_tile, longest;
    Cut(int64_t given_size, int64_t given_tile, int64_t least) : size(given_size), tile(given_tile) {
        const int64_t tiles = size / tile;
        parts_of_tile = std::max<int64_t>(1, tile / least);
        tiles_in_piece = parts_of_tile > 1 ? 1 : (least + tile - 1) / tile;
        pieces = parts_of_tile > 1 ? tiles * parts_of_tile : std::max<int64_t>(1, tiles / tiles_in_piece);
        longest = 0;
        for (int64_t i = 0; i < pieces; ++i) longest = std::max(longest, begin(i + 1) - begin(i));
    }
    int64_t begin(int64_t i) const {
        if (i == pieces) return size;
        if (parts_of_tile > 1) return i / parts_of_tile * tile + i % parts_of_tile * tile / parts_of_tile;
        return i * tiles_in_piece * tile;
    }
    int64_t cells() const { return parts_of_tile > 1 ? pieces : size / tile; }
    int64_t first_cell(int64_t piece) const { return parts_of_tile > 1 ? piece : begin(piece) / tile; }
};

struct Plan {
    std::vector<int64_t> radius;  // of each image
    int64_t largest_radius;
    Cut rows, columns;
    int64_t blocks() const { return rows.pieces * columns.pieces; }  // of an image
};

std::vector<int64_t> radii(const KernelSet& set, const Params& p) {
    std::vector<int64_t> radius(static_cast<size_t>(p.batch), std::max<int64_t>(p.radius, 0));
    if (p.radius >= 0) return radius;
    const int64_t count = p.height / p.tile_height * (p.width / p.tile_width);
    for (int64_t i = 0; i < p.batch; ++i) {
        const float widest = std::ceil(set.largest(p.sigma + i * count * 3, count));
        radius[static_cast<size_t>(i)] = static_cast<int64_t>(std::min(widest, static_cast<float>(kLargestRadius)));
    }
    if (p.radius == kBatch) std::fill(radius.begin(), radius.end(), *std::max_element(radius.begin(), radius.end()));
    return radius;
}

Plan plan(const KernelSet& set, const Params& p) {
    std::vector<int64_t> radius = radii(set, p);
    const int64_t largest = *std::max_element(radius.begin(), radius.end());
    const int64_t rows = p.channels > kManyChannels ? kFewRows : kBlockRows;
    return {std::move(radius), largest, Cut(p.height, p.tile_height, rows), Cut(p.width, p.tile_width, kBlockColumns)};
}

template <class Kernel>
bool run_blocks(const Params& p, const Plan& plan, Kernel kernel, int64_t floats, float* cells) {
    const int64_t side = 2 * plan.largest_radius + 1;
    const int64_t taps = side * side * plan.rows.longest * plan.columns.longest * p.channels;
    const int64_t across = plan.columns.cells(), of_image = plan.rows.cells() * across * 3;
    std::atomic<bool> enough{true};
    parallel_ranges(p.batch * plan.blocks(), std::max<int64_t>(1, kRangeTaps / taps), [&](int64_t first, int64_t last) {
        auto* scratch = static_cast<float*>(thread_scratch(floats * static_cast<int64_t>(sizeof(float))));
        if (scratch == nullptr) {
            enough = false;
            return;
        }
        for (int64_t item = first; item < last; ++item) {
            const int64_t image = item / plan.blocks(), row = item % plan.blocks() / plan.columns.pieces,
                          column = item % plan.columns.pieces;
            Block block{};
            block.image = image, block.radius = plan.radius[static_cast<size_t>(image)];
            block.top = plan.rows.begin(row), block.bottom = plan.rows.begin(row + 1);
            block.left = plan.columns.begin(column), block.right = plan.columns.begin(column + 1);
            block.cell_stride = across * 3;
            block.cell_height = std::min(p.tile_height, block.bottom - block.top);
            block.cell_width = std::min(p.tile_width, block.right - block.left);
            if (cells != nullptr)
                block.cells = cells + image * of_image + plan.rows.first_cell(row) * block.cell_stride +
                              plan.columns.first_cell(column) * 3;
            kernel(p, block, scratch);
        }
    });
    return enough;
}

// The gradient of a sigma whose tile lies in several blocks: the sum over its cells.
void add_cells(const Params& p, const Plan& plan, const float* cells) {
    const int64_t rows = p.height / p.tile_height, columns = p.width / p.tile_width;
    const int64_t down = plan.rows.parts_of_tile, along = plan.columns.parts_of_tile, across = plan.columns.cells();
    float* to = p.dsigma;
    for (int64_t row = 0; row < p.batch * rows; ++row)
        for (int64_t column = 0; column < columns; ++column)
            for (int64_t k = 0; k < 3; ++k, ++to) {
                double total = 0;
                for (int64_t y = row * down; y < (row + 1) * down; ++y)
                    for (int64_t x = column * along; x < (column + 1) * along; ++x)
                        total += cells[(y * across + x) * 3 + k];
                *to = static_cast<float>(total);
            }
}

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

bool forward(Isa isa, const Params& p) {
    const KernelSet& set = kernel_set(isa);
    const Plan made = plan(set, p);
    const int64_t floats = set.forward_floats(p.channels, made.rows.longest, made.columns.longest, made.largest_radius);
    return run_blocks(p, made, set.forward, floats, nullptr);
}

bool backward(Isa isa, const Params& p) {
    const KernelSet& set = kernel_set(isa);
    const Plan made = plan(set, p);
    const int64_t floats =
        set.backward_floats(p.channels, made.rows.longest, made.columns.longest, made.largest_radius);
    const bool whole = made.rows.parts_of_tile == 1 && made.columns.parts_of_tile == 1;
    if (p.dsigma == nullptr || whole) return run_blocks(p, made, set.backward, floats, p.dsigma);
    const int64_t count = p.batch * made.rows.cells() * made.columns.cells() * 3;
    auto* cells = static_cast<float*>(pool_take(count * static_cast<int64_t>(sizeof(float))));
    if (cells == nullptr) return false;
    const bool enough = run_blocks(p, made, set.backward, floats, cells);
    if (enough) add_cells(p, made, cells);
    pool_give(cells);
    return enough;
}

}  // namespace adaptive_bilateral_filter
}  // namespace pdn
