// The filter. A vector of pixels keeps its sums in registers while its window goes by. Included once per ISA level.
#pragma once

#include "block.inl"

namespace pdn {
namespace adaptive_bilateral_filter {
namespace {

// Scratch of a forward block: `x` [channels][rows + 2 radius][pitch], then rows of `line` floats.
struct ForwardBlock {
    int64_t rows, columns, radius;
    int64_t line, pitch, plane;  // floats of an own row, of a row with its surroundings, and of all those of a channel
    float* x;
    float *of_x, *of_y, *of_range;  // a row of factors
    float* norm;                    // a row
    float* result;                  // [channels][line]
    float* weights;                 // [2 radius + 1][kWidth]
};

PDN_INLINE int64_t line_of(int64_t columns) { return round_up(columns, kWidth); }

inline int64_t forward_floats(int64_t channels, int64_t rows, int64_t columns, int64_t radius) {
    const int64_t line = line_of(columns), pitch = round_up(line + 2 * radius, kWidth);
    return channels * (rows + 2 * radius) * pitch + (4 + channels) * line + (2 * radius + 1) * kWidth;
}

// Up to kFixedChannels channels, Vectors of pixels at once, from column `at` of the row whose window begins at `x`.
template <int Channels, int Vectors>
PDN_INLINE void filter(const ForwardBlock& b, const float* x, int64_t at) {
    vf own[Channels][Vectors], total[Channels][Vectors], of_x[Vectors], of_y[Vectors], of_range[Vectors];
    vf norm[Vectors];
    const int64_t radius = b.radius;
    const float* centre = x + at + radius;
    for (int v = 0; v < Vectors; ++v) {
        const int64_t i = at + v * kWidth;
        of_x[v] = load(b.of_x + i), of_y[v] = load(b.of_y + i), of_range[v] = load(b.of_range + i);
        norm[v] = vf{};
        for (int c = 0; c < Channels; ++c) {
            own[c][v] = load(centre + c * b.plane + radius * b.pitch + v * kWidth);
            total[c][v] = vf{};
        }
    }
    const auto tap = [&](int64_t offset, int v, vf exponent) __attribute__((always_inline)) {
        vf neighbour[Channels], distance{};
        for (int c = 0; c < Channels; ++c) {
            neighbour[c] = load(centre + c * b.plane + offset + v * kWidth);
            const vf difference = neighbour[c] - own[c][v];
            distance = c == 0 ? difference * difference : difference * difference + distance;
        }
        const vf weight = exp2_negative(of_range[v] * distance + exponent);
        norm[v] += weight;
        for (int c = 0; c < Channels; ++c) total[c][v] = weight * neighbour[c] + total[c][v];
    };
    for (int64_t dy = -radius; dy <= radius; ++dy) {
        const int64_t row = (dy + radius) * b.pitch;
        vf down[Vectors];
        for (int v = 0; v < Vectors; ++v) {
            down[v] = of_y[v] * static_cast<float>(dy * dy);
            tap(row, v, down[v]);
        }
        for (int64_t dx = 1; dx <= radius; ++dx)
            for (int v = 0; v < Vectors; ++v) {
                const vf exponent = of_x[v] * static_cast<float>(dx * dx) + down[v];
                tap(row - dx, v, exponent);
                tap(row + dx, v, exponent);
            }
    }
    for (int v = 0; v < Vectors; ++v) {
        norm[v] += kEpsilon;
        store(b.norm + at + v * kWidth, norm[v]);
        for (int c = 0; c < Channels; ++c) store(b.result + c * b.line + at + v * kWidth, total[c][v] / norm[v]);
    }
}

// Sums over `Together` channels of one row of the window: `weights` are those of one vector of pixels.
template <int Together>
PDN_INLINE void add_channels(const ForwardBlock& b, const float* x, int64_t at, int64_t row, int64_t channel) {
    const float* neighbours = x + channel * b.plane + row * b.pitch + at;
    vf total[Together];
    for (int c = 0; c < Together; ++c) total[c] = load(b.result + (channel + c) * b.line + at);
    for (int64_t i = 0; i <= 2 * b.radius; ++i) {
        const vf weight = load(b.weights + i * kWidth);
        for (int c = 0; c < Together; ++c) total[c] = weight * load(neighbours + c * b.plane + i) + total[c];
    }
    for (int c = 0; c < Together; ++c) store(b.result + (channel + c) * b.line + at, total[c]);
}

// Adds the squared differences of `Together` channels in one row of the window to `weights`.
template <int Together>
PDN_INLINE void add_distances(const ForwardBlock& b, const float* x, int64_t at, int64_t row, int64_t channel) {
    const float* neighbours = x + channel * b.plane + row * b.pitch + at;
    vf own[Together];
    for (int c = 0; c < Together; ++c) own[c] = load(x + (channel + c) * b.plane + b.radius * (b.pitch + 1) + at);
    for (int64_t i = 0; i <= 2 * b.radius; ++i) {
        vf distance = load(b.weights + i * kWidth);
        for (int c = 0; c < Together; ++c) {
            const vf difference = load(neighbours + c * b.plane + i) - own[c];
            distance = difference * difference + distance;
        }
        store(b.weights + i * kWidth, distance);
    }
}

// Any number of channels, one vector of pixels.
inline void filter_channels(const ForwardBlock& b, int64_t channels, const float* x, int64_t at) {
    const vf of_x = load(b.of_x + at), of_y = load(b.of_y + at), of_range = load(b.of_range + at);
    vf norm{};
    for (int64_t c = 0; c < channels; ++c) store(b.result + c * b.line + at, vf{});
    for (int64_t row = 0; row <= 2 * b.radius; ++row) {
        clear(b.weights, (2 * b.radius + 1) * kWidth);
        int64_t c = 0;
        for (; c + 4 <= channels; c += 4) add_distances<4>(b, x, at, row, c);
        for (; c < channels; ++c) add_distances<1>(b, x, at, row, c);
        const int64_t dy = row - b.radius;
        const vf down = of_y * static_cast<float>(dy * dy);
        for (int64_t i = 0; i <= 2 * b.radius; ++i) {
            const int64_t dx = i - b.radius;
            const vf exponent = of_x * static_cast<float>(dx * dx) + down;
            const vf weight = exp2_negative(of_range * load(b.weights + i * kWidth) + exponent);
            store(b.weights + i * kWidth, weight);
            norm += weight;
        }
        for (c = 0; c + 4 <= channels; c += 4) add_channels<4>(b, x, at, row, c);
        for (; c < channels; ++c) add_channels<1>(b, x, at, row, c);
    }
    norm += kEpsilon;
    store(b.norm + at, norm);
    for (int64_t c = 0; c < channels; ++c) store(b.result + c * b.line + at, load(b.result + c * b.line + at) / norm);
}

template <int Channels>
PDN_INLINE void filter_row(const ForwardBlock& b, const float* x) {
    int64_t at = 0;
    if constexpr (Channels <= 2)
        for (; at + 2 * kWidth <= b.line; at += 2 * kWidth) filter<Channels, 2>(b, x, at);
    for (; at < b.line; at += kWidth) filter<Channels, 1>(b, x, at);
}

inline void forward(const Params& p, const Block& block, float* scratch) {
    ForwardBlock b;
    b.rows = block.bottom - block.top, b.columns = block.right - block.left, b.radius = block.radius;
    b.line = line_of(b.columns), b.pitch = round_up(b.line + 2 * b.radius, kWidth);
    b.plane = (b.rows + 2 * b.radius) * b.pitch;
    b.x = scratch;
    b.of_x = b.x + p.channels * b.plane;
    b.of_y = b.of_x + b.line, b.of_range = b.of_y + b.line, b.norm = b.of_range + b.line;
    b.result = b.norm + b.line, b.weights = b.result + p.channels * b.line;
    for (int64_t c = 0; c < p.channels; ++c)
        read_rows(p, p.input, block.image, c, block.top - b.radius, block.bottom + b.radius, block.left - b.radius,
                  block.right + b.radius, b.x + c * b.plane, b.pitch);
    clear(b.of_x, 3 * b.line);
    for (int64_t y = block.top; y < block.bottom; ++y) {
        if (y == block.top || y % p.tile_height == 0)
            read_factors(p, block.image, y, block.left, block.right, b.of_x, b.of_y, b.of_range);
        const float* x = b.x + (y - block.top) * b.pitch;
        switch (p.channels) {
            case 1:
                filter_row<1>(b, x);
                break;
            case 2:
                filter_row<2>(b, x);
                break;
            case 3:
                filter_row<3>(b, x);
                break;
            case 4:
                filter_row<4>(b, x);
                break;
            default:
                for (int64_t at = 0; at < b.line; at += kWidth) filter_channels(b, p.channels, x, at);
        }
        for (int64_t c = 0; c < p.channels; ++c)
            write_row(p, p.output, block.image, c, y, block.left, b.columns, b.result + c * b.line);
        if (p.norm != nullptr) {
            float* row = p.norm + (block.image * p.height + y) * p.width + block.left;
            for (int64_t i = 0; i < b.columns; ++i) row[i] = b.norm[i];
        }
    }
}

// Over whole groups of vectors each lane belongs to one of the three sigmas, always the same.
inline float largest(const float* sigma, int64_t count) {
    vf top[3] = {vf{}, vf{}, vf{}};
    int64_t i = 0;
    for (; i + 3 * kWidth <= 3 * count; i += 3 * kWidth)
        for (int v = 0; v < 3; ++v) top[v] = attention::larger(load(sigma + i + v * kWidth), top[v]);
    float best = 0.f;
    for (int v = 0; v < 3; ++v)
        for (int lane = 0; lane < kWidth; ++lane)
            if ((v * kWidth + lane) % 3 != 2 && top[v][lane] > best) best = top[v][lane];
    for (; i < 3 * count; ++i)
        if (i % 3 != 2 && sigma[i] > best) best = sigma[i];
    return best;
}

}  // namespace
}  // namespace adaptive_bilateral_filter
}  // namespace pdn
