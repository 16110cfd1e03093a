// How the work is cut up, and where things lie in a thread's scratch memory.
//
// A strip is a rectangle of output pixels of one image. The input positions it reads are copied once into scratch,
// borders and upsampling resolved, so that the register tiles know nothing of either. One item is one strip times a
// range of blocks of output channels; a thread that takes several items of a strip copies it once.
#pragma once

#include "dot.inl"
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

// The parts of the axis, in scratch, that `count` adjoining outputs read. With a step of 1 it is one part that all taps
// share, shifted; with a larger step one part per phase (tap * dilation modulo step). Where taps lie further apart than
// outputs, every tap has a part of its own.
struct Parts {
    int64_t count, length;  // parts, and positions of all of them
    bool per_tap;
};

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

struct Plan {
    int64_t taps, steps;    // steps: of one tap
    int64_t rows, columns;  // outputs of a full strip
    int64_t strips_down, strips_across;
    int64_t blocks, chunks;  // blocks of output channels, and ranges of them per group
    Parts row_parts, column_parts;
    int64_t positions;  // input pixels of a full strip in scratch
    int64_t pitch;      // of the copy, in positions: an odd number of cache lines per step
    int64_t border_bytes, pointers_at, scales_at, zeros_at, offsets_at, codes_at, bytes;  // scratch

    explicit Plan(const ConvParams& p) {
        taps = p.rows.kernel * p.columns.kernel;
        steps = ceil_div(p.in_channels, kChannels);
        blocks = blocks_of(p);
        size_strips(p);
        share_out(p);
        lay_out(p);
    }

    int64_t items(const ConvParams& p) const { return p.batch * p.groups * strips_down * strips_across * chunks; }

  private:
    int64_t positions_of(const ConvParams& p, int64_t height, int64_t width) const {
        return parts_of(p.rows, height).length * parts_of(p.columns, width).length;
    }

    // The largest strip whose copy keeps to kStripBytes.
    void size_strips(const ConvParams& p) {
        const int64_t fit = max64(1, kStripBytes / (steps * 4));
        columns = min64(p.columns.out_size, p.rows.out_size == 1 ? kRowStripColumns : kStripColumns);
        while (columns > kTile && positions_of(p, 1, columns) > fit) columns = max64(kTile, columns / 2);
        rows = 1;
        while (rows < p.rows.out_size && positions_of(p, rows + 1, columns) <= fit) ++rows;
    }

    // Enough items for all threads: by ranges of output channels where the weights are more to read than the image, by
    // smaller strips otherwise, and by the other of the two for what is still missing.
    void share_out(const ConvParams& p) {
        const int64_t wanted = p.threads > 1 ? p.threads * kItemsPerThread : 1;
        const bool heavy = taps * p.out_channels > p.rows.out_size * p.columns.out_size;
        chunks = 1;
        if (heavy) chunks = missing(p, wanted, blocks);
        const int64_t halo = (p.rows.kernel - 1) * p.rows.dilation / p.rows.step;
        const int64_t lowest = min64(rows, 2 * halo);
        while (rows > max64(1, lowest) && count_strips(p) * chunks < wanted) rows = max64(max64(1, lowest), rows / 2);
        while (p.rows.out_size == 1 && columns > 4 * kTile && count_strips(p) * chunks < wanted)
            columns = max64(4 * kTile, columns / 2);
        if (!heavy) chunks = missing(p, wanted, blocks);
        count_strips(p);
        rows = ceil_div(p.rows.out_size, strips_down);
        columns = ceil_div(p.columns.out_size, strips_across);
        count_strips(p);
    }

    int64_t missing(const ConvParams& p, int64_t wanted, int64_t most) {
        return max64(1, min64(most, ceil_div(wanted, max64(1, count_strips(p)))));
    }

    int64_t count_strips(const ConvParams& p) {
        strips_down = ceil_div(p.rows.out_size, rows);
        strips_across = ceil_div(p.columns.out_size, columns);
        return p.batch * p.groups * strips_down * strips_across;
    }

    void lay_out(const ConvParams& p) {
        row_parts = parts_of(p.rows, rows);
        column_parts = parts_of(p.columns, columns);
        positions = row_parts.length * column_parts.length;
        pitch = (ceil_div(positions, 16) | 1) * 16;
        border_bytes = round_up(p.in_channels, 64);
        pointers_at = 64 + border_bytes;  // a cache line says what the scratch holds
        scales_at = pointers_at + pitch * 8;
        zeros_at = scales_at + (p.per_pixel ? pitch * 4 : 0);
        offsets_at = zeros_at + (p.per_pixel ? pitch * 4 : 0);
        codes_at = offsets_at + round_up(taps * steps * 4, 64);
        bytes = codes_at + steps * pitch * 4;
    }
};

}  // namespace
}  // namespace int8_conv2d
}  // namespace pdn
