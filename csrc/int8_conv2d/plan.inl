// How the work is cut up, and where things lie in a thread's scratch memory.
//
// A strip is a rectangle of output pixels of one image. The input positions it reads are copied once into scratch,
// borders and upsampling resolved, so that the register tiles know nothing of either. One item is one strip times a
// range of blocks of output channels; a thread that takes several items of a strip copies it once.
#pragma once

#include "../core/dot.inl"
#include "params.h"

namespace pdn {
namespace int8_conv2d {
namespace {

constexpr int kBlock = 2;                         // vectors of output channels per tile
constexpr int kTile = kWidth == 16 ? 14 : 6;      // pixels per tile: kTile * kBlock accumulators, the rest for operands
constexpr int kLanes = kBlock * kWidth;           // output channels per full block
constexpr int64_t kStripBytes = 96 * 1024;        // of copied input: lies in L2 beside the weights that stream through
constexpr int64_t kStripColumns = 5 * kTile;      // a wider strip would be lower: more copied borders
constexpr int64_t kRowStripColumns = 32 * kTile;  // where there are no rows
constexpr int64_t kItemsPerThread = 4;            // so that a thread slowed down by others holds nobody up for long

PDN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
PDN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
PDN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PDN_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The parts of an axis that `count` adjoining outputs read. With a step of 1 it is one part that all taps share,
// shifted; with a larger step one part per phase (tap * dilation modulo step). Where taps lie further apart than
// outputs, every tap has a part of its own.

// Calls f(part's first tap, part's length) for each part with shared taps.
template <class F>
PDN_INLINE void each_shared_part(const Axis& a, int64_t count, const F& f) {
    for (int64_t t = 0; t < a.kernel; ++t) {
        const int64_t phase = t * a.dilation % a.step;
        bool seen = false;
        for (int64_t u = 0; u < t; ++u) seen |= u * a.dilation % a.step == phase;
        if (seen) continue;
        int64_t last = t;
        for (int64_t u = t; u < a.kernel; ++u)
            if (u * a.dilation % a.step == phase) last = u;
        f(t, count + (last - t) * a.dilation / a.step);
    }
}

PDN_INLINE Parts parts_of(const Axis& a, int64_t count) {
    Parts parts = {0, 0, false};
    each_shared_part(a, count, [&](int64_t, int64_t length) { ++parts.count, parts.length += length; });
    if (parts.length > a.kernel * count) parts = {a.kernel, a.kernel * count, true};
    return parts;
}

// Where tap t's positions begin.
PDN_INLINE int64_t tap_start(const Axis& a, int64_t count, const Parts& parts, int64_t t) {
    if (parts.per_tap) return t * count;
    int64_t start = 0, found = 0;
    each_shared_part(a, count, [&](int64_t first, int64_t length) {
        if ((t - first) * a.dilation % a.step == 0 && t >= first) found = start + (t - first) * a.dilation / a.step;
        start += length;
    });
    return found;
}

// Calls f(start, length, first tap) for each part.
template <class F>
PDN_INLINE void each_part(const Axis& a, int64_t count, const Parts& parts, const F& f) {
    int64_t start = 0;
    if (parts.per_tap) {
        for (int64_t t = 0; t < a.kernel; ++t, start += count) f(start, count, t);
        return;
    }
    each_shared_part(a, count, [&](int64_t first, int64_t length) {
        f(start, length, first);
        start += length;
    });
}

PDN_INLINE int64_t blocks_of(const ConvParams& p) { return ceil_div(p.out_channels, kLanes); }
PDN_INLINE int block_width(const ConvParams& p, int64_t block) {
    return p.out_channels - block * kLanes > kWidth ? kLanes : kWidth;
}

PDN_INLINE int64_t positions_of(const ConvParams& p, int64_t height, int64_t width) {
    return parts_of(p.rows, height).length * parts_of(p.columns, width).length;
}

// Counts the strips; returns how many there are in all images and groups.
PDN_INLINE int64_t count_strips(const ConvParams& p, Plan& plan) {
    plan.strips_down = ceil_div(p.rows.out_size, plan.rows);
    plan.strips_across = ceil_div(p.columns.out_size, plan.columns);
    return p.batch * p.groups * plan.strips_down * plan.strips_across;
}

// The largest strip whose copy keeps to kStripBytes.
void size_strips(const ConvParams& p, Plan& plan) {
    const int64_t fit = max64(1, kStripBytes / (plan.steps * 4));
    plan.columns = min64(p.columns.out_size, p.rows.out_size == 1 ? kRowStripColumns : kStripColumns);
    while (plan.columns > kTile && positions_of(p, 1, plan.columns) > fit)
        plan.columns = max64(kTile, plan.columns / 2);
    int64_t low = 1, high = p.rows.out_size + 1;  // low fits, high does not
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (positions_of(p, middle, plan.columns) <= fit ? low : high) = middle;
    }
    plan.rows = low;
}

// Enough items for all threads: by ranges of output channels where the weights are more to read than the image, by
// smaller strips otherwise, and by the other of the two for what is still missing.
void share_out(const ConvParams& p, Plan& plan) {
    const int64_t wanted = p.threads > 1 ? p.threads * kItemsPerThread : 1;
    const auto ranges = [&] { return max64(1, min64(plan.blocks, ceil_div(wanted, max64(1, count_strips(p, plan))))); };
    const bool heavy = plan.taps * p.out_channels > p.rows.out_size * p.columns.out_size;
    plan.chunks = heavy ? ranges() : 1;
    const int64_t across = ceil_div(p.columns.out_size, plan.columns);
    const int64_t bands = ceil_div(wanted, p.batch * p.groups * across * plan.chunks);
    const int64_t halo = (p.rows.kernel - 1) * p.rows.dilation / p.rows.step;
    const int64_t lowest = max64(1, min64(plan.rows, 2 * halo));
    plan.rows = max64(lowest, min64(plan.rows, ceil_div(p.rows.out_size, bands)));
    if (p.rows.out_size == 1) {  // tokens
        const int64_t part = ceil_div(p.columns.out_size, ceil_div(wanted, p.batch * p.groups * plan.chunks));
        plan.columns = min64(plan.columns, max64(4 * kTile, round_up(part, kTile)));
    }
    if (!heavy) plan.chunks = ranges();
    count_strips(p, plan);
    plan.rows = ceil_div(p.rows.out_size, plan.strips_down);  // of equal size
    plan.columns = ceil_div(p.columns.out_size, plan.strips_across);
    plan.items = count_strips(p, plan) * plan.chunks;
}

// A step's positions begin an odd number of cache lines after those of the step before: the lines of a tile then spread
// over the sets of the cache.
void lay_out(const ConvParams& p, Plan& plan) {
    plan.row_parts = parts_of(p.rows, plan.rows);
    plan.column_parts = parts_of(p.columns, plan.columns);
    plan.positions = plan.row_parts.length * plan.column_parts.length;
    plan.pitch = (ceil_div(plan.positions, 16) | 1) * 16;
    plan.border_bytes = round_up(p.in_channels, 64);
    plan.pointers_at = 64 + plan.border_bytes;  // the first cache line says what the scratch holds
    plan.scales_at = plan.pointers_at + plan.pitch * 8;
    plan.zeros_at = plan.scales_at + (p.per_pixel ? plan.pitch * 4 : 0);
    plan.offsets_at = plan.zeros_at + (p.per_pixel ? plan.pitch * 4 : 0);
    plan.codes_at = plan.offsets_at + round_up(plan.taps * plan.steps * 4, 64);
    plan.scratch_bytes = plan.codes_at + plan.steps * plan.pitch * 4;
}

Plan dense_plan(const ConvParams& p) {
    Plan plan{};
    plan.taps = p.rows.kernel * p.columns.kernel;
    plan.steps = ceil_div(p.in_channels, kChannels);
    plan.blocks = blocks_of(p);
    if (p.batch == 0 || p.rows.out_size == 0 || p.columns.out_size == 0) return plan;
    size_strips(p, plan);
    share_out(p, plan);
    lay_out(p, plan);
    return plan;
}

}  // namespace
}  // namespace int8_conv2d
}  // namespace pdn
