// Karatsuba's trick for correlations: two outputs of two taps cost three products instead of four,
//   y0 = a w0 + b w1 = (a - b) w0 + b (w0 + w1),
//   y1 = b w0 + c w1 =              b (w0 + w1) + (c - b) w1.
// Along an axis, a, b and c are every second position, so one long correlation becomes three of half the length and
// half the taps; each of those can be split again. Included once per ISA level.
//
// All coefficients are 1 or -1, so nothing is scaled up and down again, and chains of additions get shorter: the
// rounding error stays that of the direct sum. It is relative to the values of the neighbourhood, though: a non-finite
// or huge value is felt up to step - 1 positions beyond the taps that read it.
#pragma once

#include "kernel.inl"

namespace pdn {
namespace weighted_conv {
namespace {

// One axis, split `levels` times: output piece q holds positions step * q + [0, step), input piece i the positions
// step * i + offset + [0, 2 * step - 1), and in each of the `parts` correlations output piece q reads the input pieces
// q + [0, taps). Part c has one digit in base 3 per split, the first split's digit foremost: 0 for (a - b) w0, 1 for
// b (w0 + w1), 2 for (c - b) w1.
struct SplitAxis {
    int64_t levels, step, parts, taps, pieces;
    int64_t in_size, out_size, offset;

    SplitAxis() = default;
    SplitAxis(const Axis& a, int64_t splits) {
        levels = splits;
        step = int64_t{1} << levels;
        parts = levels == 0 ? 1 : levels == 1 ? 3 : 9;
        taps = ceil_div(a.kernel, step);
        pieces = ceil_div(a.out_size, step);
        in_size = a.in_size, out_size = a.out_size, offset = a.offset;
    }

    int64_t digit(int64_t part, int64_t level) const { return levels == 2 && level == 0 ? part / 3 : part % 3; }

    // First and last position of an input piece that `part` reads, counted from the piece's first.
    int64_t nearest(int64_t part) const {
        int64_t at = 0;
        for (int64_t l = 0; l < levels; ++l) at += (digit(part, l) > 0) << l;
        return at;
    }
    int64_t farthest(int64_t part) const {
        int64_t at = 0;
        for (int64_t l = 0; l < levels; ++l) at += (1 + (digit(part, l) > 1)) << l;
        return at;
    }

    // The input pieces in which `part` meets the image: [first, end).
    int64_t first(int64_t part) const {
        const int64_t least = -offset - farthest(part);
        return least >= 0 ? ceil_div(least, step) : -(-least / step);
    }
    int64_t end(int64_t part) const {
        const int64_t most = in_size - 1 - offset - nearest(part);
        return most >= 0 ? most / step + 1 : -ceil_div(-most, step) + 1;
    }

    // Whether the products of `part` count in position `at` of an output piece; the same for the taps of a weight.
    bool uses(int64_t part, int64_t at) const {
        for (int64_t l = 0; l < levels; ++l) {
            const int64_t d = digit(part, l), odd = at >> l & 1;
            if (d != 1 && d != 2 * odd) return false;
        }
        return true;
    }
};

// The parts that use each position of a piece, as `uses` says: step of them.
struct PartLists {
    int64_t part[4][4];

    explicit PartLists(const SplitAxis& axis) {
        for (int64_t at = 0; at < axis.step; ++at) {
            int64_t count = 0;
            for (int64_t p = 0; p < axis.parts; ++p)
                if (axis.uses(p, at)) part[at][count++] = p;
        }
    }
};

// ------------------------------------------------------------------- the three transforms along one axis, in registers

// Input: 2 * step - 1 positions -> parts.
template <int L>
PDN_INLINE void split_input(const vf* x, vf* to) {
    if constexpr (L == 0) {
        to[0] = x[0];
    } else if constexpr (L == 1) {
        to[0] = x[0] - x[1];
        to[1] = x[1];
        to[2] = x[2] - x[1];
    } else {
        vf half[3][3];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) split_input<1>(x + 2 * j, half[j]);
#pragma GCC unroll 3
        for (int c = 0; c < 3; ++c) {
            const vf along[3] = {half[0][c], half[1][c], half[2][c]};
            split_input<1>(along, to + 3 * c);
        }
    }
}

// Output gradient (a weight the same way): step positions -> parts.
template <int L>
PDN_INLINE void split_sums(const vf* y, vf* to) {
    if constexpr (L == 0) {
        to[0] = y[0];
    } else if constexpr (L == 1) {
        to[0] = y[0];
        to[1] = y[0] + y[1];
        to[2] = y[1];
    } else {
        vf half[2][3];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) split_sums<1>(y + 2 * j, half[j]);
#pragma GCC unroll 3
        for (int c = 0; c < 3; ++c) {
            const vf along[2] = {half[0][c], half[1][c]};
            split_sums<1>(along, to + 3 * c);
        }
    }
}

// Output: parts -> step positions.
template <int L>
PDN_INLINE void join(const vf* m, vf* y) {
    if constexpr (L == 0) {
        y[0] = m[0];
    } else if constexpr (L == 1) {
        y[0] = m[0] + m[1];
        y[1] = m[1] + m[2];
    } else {
        vf half[3][2];
#pragma GCC unroll 3
        for (int c = 0; c < 3; ++c) join<1>(m + 3 * c, half[c]);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const vf along[3] = {half[0][j], half[1][j], half[2][j]};
            join<1>(along, y + 2 * j);
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- planes

// The parts of one block of channels over one region: [row's part][column's part][row][column][lane]. Rows and columns
// count pieces from the region's first.
struct Planes {
    float* data;
    int64_t part, row;  // floats from one to the next

    float* at(int64_t index, int64_t r, int64_t c) const { return data + index * part + r * row + c * kWidth; }
};

// Pieces [row, row + rows) x [column, column + columns) of the output.
struct Region {
    int64_t row, rows, column, columns;
};

template <int L>
constexpr int kStep = 1 << L;
template <int L>
constexpr int kReach = 2 * kStep<L> - 1;
template <int L>
constexpr int kParts = L == 0   ? 1
                       : L == 1 ? 3
                                : 9;

// One channel block of an image whose rows and columns lie `row` and `column` elements apart.
template <class T>
struct Image {
    const T* data;
    int64_t row, column;
    int lanes;

    PDN_INLINE vf at(const T* x) const { return lanes == kWidth ? load(x) : load_partial(x, lanes); }
};

// Rows [0, reach) of an input piece, split into lines[part][column]: image columns [from, to), zeros around them where
// the region reaches beyond the image.
template <class T, int L>
void split_rows(const Image<T>& image, const SplitAxis& y, int64_t piece, int64_t from, int64_t to, float* lines,
                int64_t line) {
    const int64_t top = y.step * piece + y.offset;
    const bool whole = top >= 0 && top + kReach<L> <= y.in_size;
    const T* x = image.data + top * image.row + from * image.column;
    for (int64_t c = from; c < to; ++c, x += image.column, lines += kWidth) {
        vf rows[kReach<L>], parts[kParts<L>];
        if (whole && image.lanes == kWidth) {
#pragma GCC unroll 8
            for (int i = 0; i < kReach<L>; ++i) rows[i] = load(x + i * image.row);
        } else {
#pragma GCC unroll 8
            for (int i = 0; i < kReach<L>; ++i)
                rows[i] = inside(top + i, y.in_size) ? image.at(x + i * image.row) : vf{};
        }
        split_input<L>(rows, parts);
#pragma GCC unroll 9
        for (int p = 0; p < kParts<L>; ++p) store(lines + p * line, parts[p]);
    }
}

// One line, split into the pieces [0, count) of the planes' row.
template <int L>
void split_line(const float* line, int64_t count, float* to, int64_t part) {
    for (int64_t c = 0; c < count; ++c, line += kStep<L> * kWidth, to += kWidth) {
        vf x[kReach<L>], parts[kParts<L>];
#pragma GCC unroll 8
        for (int i = 0; i < kReach<L>; ++i) x[i] = load(line + i * kWidth);
        split_input<L>(x, parts);
#pragma GCC unroll 9
        for (int p = 0; p < kParts<L>; ++p) store(to + p * part, parts[p]);
    }
}

PDN_INLINE void zero_vectors(float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) store(to + i * kWidth, vf{});
}

// What a region of the output needs of the input, split. `lines` holds parts x `line` floats. Pieces that no part meets
// the image in are left as they are: nobody reads them.
template <class T, int LY, int LX>
void split_region(const Image<T>& image, const SplitAxis& y, const SplitAxis& x, const Region& region,
                  const Planes& planes, float* lines, int64_t line) {
    const int64_t left = x.step * region.column + x.offset;
    const int64_t width = (region.columns + x.taps - 1) * x.step + x.step - 1;
    const int64_t low = min64(max64(-left, 0), width), high = max64(low, min64(x.in_size - left, width));
    for (int64_t p = 0; p < kParts<LY>; ++p) {
        zero_vectors(lines + p * line, low);
        zero_vectors(lines + p * line + high * kWidth, width - high);
    }
    for (int64_t r = 0; r < region.rows + y.taps - 1; ++r) {
        const int64_t piece = region.row + r;
        if (piece < y.first(kParts<LY> - 1) || piece >= y.end(0)) continue;
        split_rows<T, LY>(image, y, piece, left + low, left + high, lines + low * kWidth, line);
        for (int64_t p = 0; p < kParts<LY>; ++p)
            split_line<LX>(lines + p * line, region.columns + x.taps - 1, planes.at(p * kParts<LX>, r, 0), planes.part);
    }
}

}  // namespace
}  // namespace weighted_conv
}  // namespace pdn
