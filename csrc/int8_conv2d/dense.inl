// The convolution as a matrix product: packed weights, and the loop over strips, blocks of output channels and tiles.
#pragma once

#include "finish.inl"
#include "fused.inl"
#include "gather.inl"
#include "plan.inl"
#include "tile.inl"

namespace pdn {
namespace int8_conv2d {
namespace {

// ------------------------------------------------------------------------------------------------ packed weights

// [group][block]: weights [tap][step][width][kChannels], then their sums: [tap][width], and [width] over all taps. Full
// blocks are kLanes wide, the last one kWidth if no more lanes are needed.
struct Packing {
    int64_t taps, steps, blocks, group_bytes;

    explicit Packing(const ConvParams& p) {
        taps = p.rows.kernel * p.columns.kernel;
        steps = ceil_div(p.in_channels, kChannels);
        blocks = blocks_of(p);
        group_bytes = (blocks - 1) * block_bytes(kLanes) + block_bytes(block_width(p, blocks - 1));
    }

    int64_t weight_bytes(int width) const { return taps * steps * width * 4; }
    int64_t block_bytes(int width) const { return weight_bytes(width) + (taps + 1) * width * 4; }
    int64_t block_offset(int64_t group, int64_t block) const {
        return group * group_bytes + block * block_bytes(kLanes);
    }
};

int64_t dense_packed_bytes(const ConvParams& p) { return p.groups * Packing(p).group_bytes; }

int64_t dense_pack_items(const ConvParams& p) { return p.groups * blocks_of(p); }

void dense_pack(const ConvParams& p, const int8_t* weight, void* packed, int64_t begin, int64_t end) {
    const Packing layout(p);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item / layout.blocks, block = item % layout.blocks;
        const int width = block_width(p, block);
        const int64_t lanes = min64(width, p.out_channels - block * kLanes);
        const int8_t* first = weight + (group * p.out_channels + block * kLanes) * p.in_channels * layout.taps;
        char* to = static_cast<char*>(packed) + layout.block_offset(group, block);
        std::memset(to, 0, static_cast<size_t>(layout.block_bytes(width)));
        Weight* weights = reinterpret_cast<Weight*>(to);
        int32_t* sums = reinterpret_cast<int32_t*>(to + layout.weight_bytes(width));
        for (int64_t o = 0; o < lanes; ++o) {
            const int8_t* row = first + o * p.in_channels * layout.taps;
            for (int64_t tap = 0; tap < layout.taps; ++tap) {
                Weight* at = weights + (tap * layout.steps * width + o) * kChannels;
                int32_t sum = 0;
                int64_t c = 0;
                for (; c + kChannels <= p.in_channels; c += kChannels, at += width * kChannels) {
                    Weight step[kChannels];  // stored as one word
                    for (int i = 0; i < kChannels; ++i) sum += step[i] = row[(c + i) * layout.taps + tap];
                    std::memcpy(at, step, sizeof step);
                }
                for (int i = 0; c < p.in_channels; ++i, ++c) sum += at[i] = row[c * layout.taps + tap];
                sums[tap * width + o] = sum;
                sums[layout.taps * width + o] += sum;
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------ running

// What the scratch of a thread holds, so that the next item of the same strip need not copy it again.
struct Held {
    uint64_t call;
    int64_t strip;
};

struct DenseRun {
    const ConvParams& p;
    const Plan& plan;
    const Packing layout;
    Finisher finisher;
    const uint64_t call;
    Held* held;
    int8_t* border;
    Gather gather;
    int32_t* offsets;
    char* codes;

    static Sums sums_of(const ConvParams& p) {
        if (!p.per_pixel) return Sums::integer;
        return p.rows.kernel * p.columns.kernel == 1 ? Sums::per_row : Sums::rescaled;
    }

    DenseRun(const ConvParams& params, void* scratch, uint64_t number)
        : p(params), plan(params.plan), layout(params), finisher(params, sums_of(params)), call(number) {
        char* at = static_cast<char*>(scratch);
        held = reinterpret_cast<Held*>(at);
        border = reinterpret_cast<int8_t*>(at + 64);
        gather.pointers = reinterpret_cast<const int8_t**>(at + plan.pointers_at);
        gather.scales = reinterpret_cast<float*>(at + plan.scales_at);
        gather.zeros = reinterpret_cast<int32_t*>(at + plan.zeros_at);
        gather.border = border;
        offsets = reinterpret_cast<int32_t*>(at + plan.offsets_at);
        codes = at + plan.codes_at;
        if (held->call == call) return;
        held->call = call;
        held->strip = -1;
        const int zero = !p.per_pixel && p.input_zero_point ? *p.input_zero_point : 0;
        std::memset(border, zero, static_cast<size_t>(plan.border_bytes));
        for (int64_t tap = 0; tap < plan.taps; ++tap) {
            const int64_t row = tap_start(p.rows, plan.rows, plan.row_parts, tap / p.columns.kernel);
            const int64_t column = tap_start(p.columns, plan.columns, plan.column_parts, tap % p.columns.kernel);
            const int64_t position = row * plan.column_parts.length + column;
            for (int64_t step = 0; step < plan.steps; ++step)
                offsets[tap * plan.steps + step] = static_cast<int32_t>((step * plan.pitch + position) * 4);
        }
    }

    // Strips are numbered image by image, group by group, top to bottom, left to right.
    void item(int64_t number) {
        const int64_t index = number / plan.chunks, chunk = number % plan.chunks;
        int64_t rest = index;
        Strip strip;
        strip.column = rest % plan.strips_across * plan.columns, rest /= plan.strips_across;
        strip.row = rest % plan.strips_down * plan.rows, rest /= plan.strips_down;
        strip.group = rest % p.groups, strip.n = rest / p.groups;
        if (held->strip != index) {
            gather.strip(p, plan, strip);
            copy_codes(gather.pointers, plan.pitch, p.in_channels, codes);
            held->strip = index;
        }
        const int64_t last = first_block(chunk + 1);
        for (int64_t block = first_block(chunk); block < last; ++block)
            block_of_strip(strip, block, block + 1 < last ? block + 1 : next_block(chunk));
    }

    int64_t first_block(int64_t chunk) const { return chunk * plan.blocks / plan.chunks; }

    // The block that this thread will probably take when it is through with the chunk: threads take turns.
    int64_t next_block(int64_t chunk) const {
        if (chunk + p.threads < plan.chunks) return first_block(chunk + p.threads);
        return -1;
    }

    void block_of_strip(const Strip& strip, int64_t block, int64_t next) {
        const int width = block_width(p, block), vectors = width / kWidth;
        const int lanes = static_cast<int>(min64(width, p.out_channels - block * kLanes));
        const bool rescaled = finisher.sums == Sums::rescaled;
        const int64_t widest = rescaled ? kScaledTile : kTile;
        const char* packed = static_cast<const char*>(p.packed) + layout.block_offset(strip.group, block);
        TileTask task;
        task.offsets = offsets;
        task.weights = packed;
        task.steps = rescaled ? plan.steps : plan.taps * plan.steps;
        task.taps = plan.taps;
        task.weight_sums = reinterpret_cast<const int32_t*>(packed + layout.weight_bytes(width));
        task.ahead = next < 0 ? packed : static_cast<const char*>(p.packed) + layout.block_offset(strip.group, next);
        finisher.prepare(strip.n, strip.group * p.out_channels + block * kLanes, lanes,
                         task.weight_sums + plan.taps * width);
        const bool fused = is_fusable(finisher.task, finisher.sums, p.out_dtype, width);
        alignas(64) int32_t sums[kTile * kLanes];
        const int64_t rows = min64(plan.rows, p.rows.out_size - strip.row);
        const int64_t columns = min64(plan.columns, p.columns.out_size - strip.column);
        const int64_t tiles = ceil_div(columns, widest);
        const int64_t ahead_bytes = next < 0 ? 0 : layout.weight_bytes(block_width(p, next));
        task.ahead_step = ceil_div(ceil_div(ahead_bytes, rows * tiles), plan.taps * plan.steps);
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t i = 0; i < tiles; ++i) {
                const int64_t first = i * columns / tiles;
                const int pixels = static_cast<int>((i + 1) * columns / tiles - first);
                const int64_t position = row * plan.column_parts.length + first;
                task.codes = codes + position * 4;
                task.scales = gather.scales + position;
                task.zeros = gather.zeros + position;
                finisher.move_to(strip.n, strip.row + row, strip.column + first);
                if (fused) {
                    kFusedTiles[pixels - 1][vectors - 1](task, finisher.task);
                } else {
                    (rescaled ? kScaledTiles : kIntegerTiles)[pixels - 1][vectors - 1](task, sums);
                    finisher.task.row_scales = task.scales;
                    finisher.task.row_zeros = task.zeros;
                    finisher.pixels(sums, pixels, width);
                }
                task.ahead += task.ahead_step * plan.taps * plan.steps;
            }
        }
    }
};

void dense_run(const ConvParams& p, int64_t begin, int64_t end, void* scratch, uint64_t call) {
    DenseRun run(p, scratch, call);
    for (int64_t item = begin; item < end; ++item) run.item(item);
    if (run.finisher.task.streamed) finish_past();
}

const char* dense_unsupported(const ConvParams&) { return nullptr; }

constexpr Algorithm kDense = {"dense",    dense_unsupported, dense_packed_bytes, dense_pack_items,
                              dense_pack, dense_plan,        dense_run};

}  // namespace
}  // namespace int8_conv2d
}  // namespace pdn
