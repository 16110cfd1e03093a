// Gradients. Weights are computed anew: once around every pixel for the gradients of its own sigma and of its own value
// as a centre, once around every place of the mirrored image for what its readers leave there. Nobody writes where
// another one does. Included once per ISA level.
//
// With e = g / N: A = w sum_c e_c (x_D,c - y_c), see pydenoise/reference/adaptive_bilateral_filter.py. Differences are
// taken from the centre, x_D - x less y - x, so that little cancels.
#pragma once

#include "block.inl"

namespace pdn {
namespace adaptive_bilateral_filter {
namespace {

// Planes have [rows + 2 radius][pitch] floats; their first column is `first` of the image, which is further left than
// the block's window at the image's left border. What lies outside the image is mirrored in `x` and 0 in the others.
struct BackwardBlock {
    int64_t top, bottom, left, right, radius;
    int64_t begin, end;  // columns where gradients are gathered: the block's, and those mirrored into it
    int64_t first;
    int64_t line, pitch, plane;     // of rows of own pixels or of gathered columns; of rows with their surroundings
    float* x;                       // [channels] planes
    float* e;                       // [channels] planes: the gradient over N
    float* shift;                   // a plane: the sum over channels of e (y - x)
    float *of_x, *of_y, *of_range;  // planes
    float* gathered;                // [channels][line]
    float* dx;                      // [channels][bottom - top][line]
    float* sums;                    // [3][line], over the rows of a cell
    float *distance, *product;      // [2 radius + 1][kWidth]
};

inline int64_t plan(BackwardBlock& b, int64_t channels, int64_t rows, int64_t columns, int64_t radius) {
    b.radius = radius;
    b.line = round_up(columns + 2 * radius, kWidth);
    b.pitch = round_up(b.line + 2 * radius, kWidth);
    b.plane = (rows + 2 * radius) * b.pitch;
    return (2 * channels + 4) * b.plane + (channels * (1 + rows) + 3) * b.line + 2 * (2 * radius + 1) * kWidth;
}

inline int64_t backward_floats(int64_t channels, int64_t rows, int64_t columns, int64_t radius) {
    BackwardBlock b;
    return plan(b, channels, rows, columns, radius);
}

inline void place(BackwardBlock& b, int64_t channels, float* scratch) {
    b.x = scratch;
    b.e = b.x + channels * b.plane;
    b.shift = b.e + channels * b.plane;
    b.of_x = b.shift + b.plane, b.of_y = b.of_x + b.plane, b.of_range = b.of_y + b.plane;
    b.gathered = b.of_range + b.plane;
    b.dx = b.gathered + channels * b.line;
    b.sums = b.dx + channels * (b.bottom - b.top) * b.line;
    b.distance = b.sums + 3 * b.line;
    b.product = b.distance + (2 * b.radius + 1) * kWidth;
}

// e and the shift of all pixels that lie in the image, 0 elsewhere.
inline void read_gradients(const Params& p, const Block& block, const BackwardBlock& b) {
    const int64_t top = block.top - b.radius, bottom = block.bottom + b.radius;
    const int64_t left = b.first > 0 ? b.first : 0;
    const int64_t right = b.first + b.pitch < p.width ? b.first + b.pitch : p.width;
    clear(b.e, (p.channels + 4) * b.plane);  // and the factors of sigma
    float* output = b.gathered;              // a row, not yet in use: the line is as long as the part of the pitch
    for (int64_t y = top > 0 ? top : 0; y < (bottom < p.height ? bottom : p.height); ++y) {
        const int64_t row = (y - top) * b.pitch + left - b.first;
        const float* norm = p.norm + (block.image * p.height + y) * p.width + left;
        for (int64_t c = 0; c < p.channels; ++c) {
            float *e = b.e + c * b.plane + row, *shift = b.shift + row;
            const float* x = b.x + c * b.plane + row;
            read_rows(p, p.grad, block.image, c, y, y + 1, left, right, e, right - left);
            for (int64_t from = 0; from < right - left; from += b.line) {
                const int64_t to = from + b.line < right - left ? from + b.line : right - left;
                read_rows(p, p.output, block.image, c, y, y + 1, left + from, left + to, output, to - from);
                for (int64_t i = from; i < to; ++i) {
                    e[i] /= norm[i];
                    shift[i] += e[i] * (output[i - from] - x[i]);
                }
            }
        }
        read_factors(p, block.image, y, left, right, b.of_x + row, b.of_y + row, b.of_range + row);
    }
}

// ------------------------------------------------------------------------------------------------- as the centre

// Adds to the gradients of sigma, not yet over sigma^3.
PDN_INLINE void add_sums(const BackwardBlock& b, int64_t at, vf x, vf y, vf range) {
    store(b.sums + at, load(b.sums + at) + x);
    store(b.sums + b.line + at, load(b.sums + b.line + at) + y);
    store(b.sums + 2 * b.line + at, load(b.sums + 2 * b.line + at) + range);
}

// Up to kFixedChannels channels; `row` of the block, `at` from the block's left edge.
template <int Channels>
PDN_INLINE void centre(const BackwardBlock& b, int64_t row, int64_t at) {
    const int64_t radius = b.radius, here = (row + radius) * b.pitch + b.left - b.first + at;
    const vf of_x = load(b.of_x + here), of_y = load(b.of_y + here), of_range = load(b.of_range + here);
    const vf shift = load(b.shift + here);
    vf own[Channels], e[Channels];
    vf pull[Channels] = {}, of_columns{}, of_rows{}, of_distance{};
    for (int c = 0; c < Channels; ++c) {
        own[c] = load(b.x + c * b.plane + here);
        e[c] = load(b.e + c * b.plane + here);
    }
    const auto tap = [&](int64_t place, vf exponent) __attribute__((always_inline)) -> vf {
        vf difference[Channels], distance{}, product = -shift;
        for (int c = 0; c < Channels; ++c) {
            difference[c] = load(b.x + c * b.plane + place) - own[c];
            distance = c == 0 ? difference[c] * difference[c] : difference[c] * difference[c] + distance;
            product = e[c] * difference[c] + product;
        }
        const vf a = exp2_negative(of_range * distance + exponent) * product;
        of_distance = a * distance + of_distance;
        for (int c = 0; c < Channels; ++c) pull[c] = a * difference[c] + pull[c];
        return a;
    };
    for (int64_t dy = -radius; dy <= radius; ++dy) {
        const int64_t place = here + dy * b.pitch;
        const vf down = of_y * static_cast<float>(dy * dy);
        vf line = tap(place, down);
        for (int64_t dx = 1; dx <= radius; ++dx) {
            const float square = static_cast<float>(dx * dx);
            const vf exponent = of_x * square + down;
            const vf a = tap(place - dx, exponent) + tap(place + dx, exponent);
            of_columns = a * square + of_columns;
            line += a;
        }
        of_rows = line * static_cast<float>(dy * dy) + of_rows;
    }
    add_sums(b, at, of_columns, of_rows, of_distance);
    const vf precision = of_range * kMinusTwoLn2;
    for (int c = 0; c < Channels; ++c) store(b.dx + (c * (b.bottom - b.top) + row) * b.line + at, pull[c] * precision);
}

// Any number of channels.
inline void centre_channels(const BackwardBlock& b, int64_t channels, int64_t row, int64_t at) {
    const int64_t radius = b.radius, count = 2 * radius + 1;
    const int64_t here = (row + radius) * b.pitch + b.left - b.first + at;
    const vf of_x = load(b.of_x + here), of_y = load(b.of_y + here), of_range = load(b.of_range + here);
    const vf shift = load(b.shift + here);
    vf of_columns{}, of_rows{}, of_distance{};
    for (int64_t c = 0; c < channels; ++c) store(b.dx + (c * (b.bottom - b.top) + row) * b.line + at, vf{});
    for (int64_t dy = -radius; dy <= radius; ++dy) {
        const int64_t place = here + dy * b.pitch - radius;
        clear(b.distance, 2 * count * kWidth);
        for (int64_t c = 0; c < channels; ++c) {
            const float* x = b.x + c * b.plane;
            const vf own = load(x + here), e = load(b.e + c * b.plane + here);
            for (int64_t i = 0; i < count; ++i) {
                const vf difference = load(x + place + i) - own;
                store(b.distance + i * kWidth, difference * difference + load(b.distance + i * kWidth));
                store(b.product + i * kWidth, e * difference + load(b.product + i * kWidth));
            }
        }
        vf line{};
        for (int64_t i = 0; i < count; ++i) {
            const float square = static_cast<float>((i - radius) * (i - radius));
            const vf exponent = of_x * square + of_y * static_cast<float>(dy * dy);
            const vf distance = load(b.distance + i * kWidth);
            const vf a = exp2_negative(of_range * distance + exponent) * (load(b.product + i * kWidth) - shift);
            store(b.product + i * kWidth, a);
            of_distance = a * distance + of_distance;
            of_columns = a * square + of_columns;
            line += a;
        }
        of_rows = line * static_cast<float>(dy * dy) + of_rows;
        for (int64_t c = 0; c < channels; ++c) {
            const float* x = b.x + c * b.plane;
            float* to = b.dx + (c * (b.bottom - b.top) + row) * b.line + at;
            const vf own = load(x + here);
            vf pull = load(to);
            for (int64_t i = 0; i < count; ++i)
                pull = load(b.product + i * kWidth) * (load(x + place + i) - own) + pull;
            store(to, pull);
        }
    }
    const vf precision = of_range * kMinusTwoLn2;
    for (int64_t c = 0; c < channels; ++c) {
        float* to = b.dx + (c * (b.bottom - b.top) + row) * b.line + at;
        store(to, load(to) * precision);
    }
    add_sums(b, at, of_columns, of_rows, of_distance);
}

// --------------------------------------------------------------------------------------------- as a neighbour

// The places in the planes of the readers of one vector of gathered columns.
struct Readers {
    int64_t rows, first_dy;  // readers lie in so many rows; y of the target less y of the first of them
    int64_t place;           // of the reader in the first row, at the target's column
};

PDN_INLINE vf squares_of(const BackwardBlock& b, int64_t place, float of_column, float of_row) {
    return load(b.of_x + place) * of_column + load(b.of_y + place) * of_row;
}

// Up to kFixedChannels channels: what the readers of row `y` of the mirrored image leave `at` columns from b.begin.
template <int Channels>
PDN_INLINE void gather(const BackwardBlock& b, const Readers& readers, const float* target, int64_t at) {
    const int64_t radius = b.radius;
    vf own[Channels], total[Channels];
    for (int c = 0; c < Channels; ++c) own[c] = load(target + c * b.plane), total[c] = vf{};
    for (int64_t row = 0; row < readers.rows; ++row) {
        const float dy = static_cast<float>(readers.first_dy - row), of_row = dy * dy;
        const int64_t line = readers.place + row * b.pitch;
        for (int64_t dx = -radius; dx <= radius; ++dx) {
            const int64_t place = line + dx;
            vf difference[Channels], e[Channels], distance{}, product = load(b.shift + place);
            for (int c = 0; c < Channels; ++c) {
                difference[c] = load(b.x + c * b.plane + place) - own[c];
                e[c] = load(b.e + c * b.plane + place);
                distance = c == 0 ? difference[c] * difference[c] : difference[c] * difference[c] + distance;
                product = e[c] * difference[c] + product;
            }
            const vf of_range = load(b.of_range + place);
            const vf exponent = squares_of(b, place, static_cast<float>(dx * dx), of_row);
            const vf weight = exp2_negative(of_range * distance + exponent);
            const vf pull = product * (of_range * -kMinusTwoLn2);
            for (int c = 0; c < Channels; ++c) total[c] = weight * (pull * difference[c] + e[c]) + total[c];
        }
    }
    for (int c = 0; c < Channels; ++c) store(b.gathered + c * b.line + at, total[c]);
}

// Any number of channels.
inline void gather_channels(const BackwardBlock& b, int64_t channels, const Readers& readers, const float* target,
                            int64_t at) {
    const int64_t radius = b.radius, count = 2 * radius + 1;
    for (int64_t c = 0; c < channels; ++c) store(b.gathered + c * b.line + at, vf{});
    for (int64_t row = 0; row < readers.rows; ++row) {
        const float dy = static_cast<float>(readers.first_dy - row), of_row = dy * dy;
        const int64_t line = readers.place + row * b.pitch - radius;
        clear(b.distance, 2 * count * kWidth);
        for (int64_t c = 0; c < channels; ++c) {
            const float *x = b.x + c * b.plane + line, *e = b.e + c * b.plane + line;
            const vf own = load(target + c * b.plane);
            for (int64_t i = 0; i < count; ++i) {
                const vf difference = load(x + i) - own;
                store(b.distance + i * kWidth, difference * difference + load(b.distance + i * kWidth));
                store(b.product + i * kWidth, load(e + i) * difference + load(b.product + i * kWidth));
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            const vf of_range = load(b.of_range + line + i);
            const float square = static_cast<float>((i - radius) * (i - radius));
            const vf exponent = squares_of(b, line + i, square, of_row);
            const vf weight = exp2_negative(of_range * load(b.distance + i * kWidth) + exponent);
            const vf product = load(b.product + i * kWidth) + load(b.shift + line + i);
            store(b.distance + i * kWidth, weight);
            store(b.product + i * kWidth, weight * product * (of_range * -kMinusTwoLn2));
        }
        for (int64_t c = 0; c < channels; ++c) {
            const float *x = b.x + c * b.plane + line, *e = b.e + c * b.plane + line;
            const vf own = load(target + c * b.plane);
            vf total = load(b.gathered + c * b.line + at);
            for (int64_t i = 0; i < count; ++i) {
                total = load(b.distance + i * kWidth) * load(e + i) + total;
                total = load(b.product + i * kWidth) * (load(x + i) - own) + total;
            }
            store(b.gathered + c * b.line + at, total);
        }
    }
}

// Adds the gathered row, and what lies in it beyond the image's sides, to row `row` of dx.
inline void fold(const Params& p, const BackwardBlock& b, int64_t row) {
    for (int64_t c = 0; c < p.channels; ++c) {
        float* to = b.dx + (c * (b.bottom - b.top) + row) * b.line;
        const float* from = b.gathered + c * b.line - b.begin;
        for (int64_t i = b.left; i < b.right; ++i) to[i - b.left] += from[i];
        for (int64_t i = b.begin; i < b.left; ++i) to[reflected(i, p.width) - b.left] += from[i];
        for (int64_t i = b.right; i < b.end; ++i) to[reflected(i, p.width) - b.left] += from[i];
    }
}

// Everything that comes to row `y` of the mirrored image.
inline void gather_row(const Params& p, const BackwardBlock& b, int64_t y) {
    const int64_t own = reflected(y, p.height), top = b.top - b.radius;
    const int64_t first = y - b.radius > 0 ? y - b.radius : 0;
    const int64_t last = y + b.radius < p.height ? y + b.radius : p.height - 1;
    Readers readers{last - first + 1, y - first, 0};
    for (int64_t at = 0; at < b.end - b.begin; at += kWidth) {
        const int64_t column = b.begin - b.first + at;
        readers.place = (first - top) * b.pitch + column;
        const float* target = b.x + (own - top) * b.pitch + column;
        switch (p.channels) {
            case 1:
                gather<1>(b, readers, target, at);
                break;
            case 2:
                gather<2>(b, readers, target, at);
                break;
            case 3:
                gather<3>(b, readers, target, at);
                break;
            case 4:
                gather<4>(b, readers, target, at);
                break;
            default:
                gather_channels(b, p.channels, readers, target, at);
        }
    }
    fold(p, b, own - b.top);
}

// ----------------------------------------------------------------------------------------------------- a block

PDN_INLINE float sum_of(const float* values, int64_t count) {
    vf total{};
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) total += load(values + i);
    if (i < count) total += load_partial(values + i, static_cast<int>(count - i));
    return reduce_add(total);
}

// The sums of a row of cells, whose last pixel row is `y`, over sigma^3.
inline void write_cells(const Params& p, const Block& block, const BackwardBlock& b, int64_t y) {
    const int64_t across = p.width / p.tile_width;
    const float* sigma = p.sigma + (block.image * (p.height / p.tile_height) + y / p.tile_height) * across * 3;
    float* to = block.cells + (y - block.top) / block.cell_height * block.cell_stride;
    for (int64_t left = block.left; left < block.right; left += block.cell_width, to += 3)
        for (int k = 0; k < 3; ++k) {
            const float s = sigma[left / p.tile_width * 3 + k];
            to[k] = sum_of(b.sums + k * b.line + left - block.left, block.cell_width) / s / s / s;
        }
}

inline void centre_row(const Params& p, const BackwardBlock& b, int64_t row) {
    for (int64_t at = 0; at < b.right - b.left; at += kWidth) switch (p.channels) {
            case 1:
                centre<1>(b, row, at);
                break;
            case 2:
                centre<2>(b, row, at);
                break;
            case 3:
                centre<3>(b, row, at);
                break;
            case 4:
                centre<4>(b, row, at);
                break;
            default:
                centre_channels(b, p.channels, row, at);
        }
}

inline void backward(const Params& p, const Block& block, float* scratch) {
    BackwardBlock b;
    plan(b, p.channels, block.bottom - block.top, block.right - block.left, block.radius);
    b.top = block.top, b.bottom = block.bottom, b.left = block.left, b.right = block.right;
    b.begin = b.left == 0 ? -b.radius : b.left;
    b.end = b.right == p.width ? p.width + b.radius : b.right;
    b.first = b.begin - b.radius;
    place(b, p.channels, scratch);
    for (int64_t c = 0; c < p.channels; ++c)
        read_rows(p, p.input, block.image, c, b.top - b.radius, b.bottom + b.radius, b.first, b.end + b.radius,
                  b.x + c * b.plane, b.pitch);
    read_gradients(p, block, b);
    clear(b.sums, 3 * b.line);
    for (int64_t y = b.top; y < b.bottom; ++y) {
        centre_row(p, b, y - b.top);
        if (p.dsigma != nullptr && ((y + 1 - b.top) % block.cell_height == 0)) {
            write_cells(p, block, b, y);
            clear(b.sums, 3 * b.line);
        }
    }
    if (p.dinput.data == nullptr) return;
    for (int64_t y = -b.radius; y < p.height + b.radius; ++y) {
        const int64_t own = reflected(y, p.height);
        if (own >= b.top && own < b.bottom) gather_row(p, b, y);
    }
    for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t y = b.top; y < b.bottom; ++y)
            write_row(p, p.dinput, block.image, c, y, b.left, b.right - b.left,
                      b.dx + (c * (b.bottom - b.top) + y - b.top) * b.line);
}

}  // namespace
}  // namespace adaptive_bilateral_filter
}  // namespace pdn
