// The weight gradient in float32: outer products of input and output-gradient pixels. A tile of kTile input channels
// times kBlock vectors of output channels stays in registers while the pixels of a few rows stream through it.
#pragma once

#include "kernel.inl"

namespace pdn {
namespace weighted_conv {
namespace {

constexpr int kRowsAtOnce = 32;         // rows a tile may stream before its accumulators go back to memory
constexpr int64_t kPixelsAtOnce = 128;  // pixels that pay for that

// Work of one register tile: `pixels` steps of acc[m][j] += x[m] * dy[j] in each of the rows.
struct OuterTask {
    const float* const* x_rows;
    const float* const* dy_rows;
    int rows;
    int64_t x_offset, dy_offset;
    int64_t x_step, dy_step;
    int64_t pixels;
    float* acc;  // rows of `width` floats
    int width, lanes;
};

template <int M, int N, bool Partial>
void outer_tile(const OuterTask& t) {
    vf acc[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < N; ++j) acc[m][j] = load(t.acc + m * t.width + j * kWidth);
    const int tail = t.lanes - (N - 1) * kWidth;
    for (int row = 0; row < t.rows; ++row) {
        const float *x = t.x_rows[row] + t.x_offset, *dy = t.dy_rows[row] + t.dy_offset;
        for (int64_t k = 0; k < t.pixels; ++k) {
            vf b[N];
            for (int j = 0; j < N; ++j)
                b[j] = Partial && j == N - 1 ? load_partial(dy + j * kWidth, tail) : load(dy + j * kWidth);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                const vf a = splat(x[m]);
                for (int j = 0; j < N; ++j) acc[m][j] += a * b[j];
            }
            x += t.x_step;
            dy += t.dy_step;
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < N; ++j) store(t.acc + m * t.width + j * kWidth, acc[m][j]);
}

template <int M>
PDN_INLINE void outer_tile_of(const OuterTask& t) {
    const bool partial = t.lanes % kWidth != 0;
    if (t.width > kWidth)
        partial ? outer_tile<M, 2, true>(t) : outer_tile<M, 2, false>(t);
    else
        partial ? outer_tile<M, 1, true>(t) : outer_tile<M, 1, false>(t);
}

void run_outer_tile(const OuterTask& t, int channels) {
    switch (channels) {
        case 1:
            return outer_tile_of<1>(t);
        case 2:
            return outer_tile_of<2>(t);
        case 3:
            return outer_tile_of<3>(t);
        case 4:
            return outer_tile_of<4>(t);
        case 5:
            return outer_tile_of<5>(t);
        case 6:
            return outer_tile_of<6>(t);
#if defined(__AVX512F__)
        case 7:
            return outer_tile_of<7>(t);
        case 8:
            return outer_tile_of<8>(t);
        case 9:
            return outer_tile_of<9>(t);
        case 10:
            return outer_tile_of<10>(t);
        case 11:
            return outer_tile_of<11>(t);
        case 12:
            return outer_tile_of<12>(t);
        case 13:
            return outer_tile_of<13>(t);
        case 14:
            return outer_tile_of<14>(t);
#endif
    }
}

// Partials: [chunk][group][block of output channels][tap][input channel][block width].
struct GradLayout {
    int64_t blocks, outer_taps, taps, group_floats, chunk_floats, chunks, rows, rows_per_chunk;

    explicit GradLayout(const GradWeightParams& p) {
        blocks = ceil_div(p.out_channels, kLanes);
        outer_taps = p.axis[0].kernel * p.axis[1].kernel;
        taps = outer_taps * p.axis[2].kernel;
        const int64_t last = p.out_channels - (blocks - 1) * kLanes;
        group_floats = ((blocks - 1) * kLanes + (last > kWidth ? kLanes : kWidth)) * taps * p.in_channels;
        chunk_floats = p.groups * group_floats;
        rows = p.batch * p.axis[0].out_size * p.axis[1].out_size;
        const int64_t tasks = p.groups * blocks * outer_taps;
        const int64_t wanted = max64(1, ceil_div(48, tasks));
        const int64_t pixels_each = 256;  // a chunk with less work than this costs more to add up than to compute
        const int64_t affordable = max64(1, rows * p.axis[2].out_size / pixels_each);
        chunks = max64(1, min64(min64(wanted, affordable), rows));
        rows_per_chunk = max64(1, ceil_div(rows, chunks));
        chunks = max64(1, ceil_div(rows, rows_per_chunk));
    }

    int64_t block_offset(const GradWeightParams& p, int64_t chunk, int64_t group, int64_t block) const {
        return chunk * chunk_floats + group * group_floats + block * kLanes * taps * p.in_channels;
    }
};

PDN_INLINE int grad_block_width(const GradWeightParams& p, int64_t block) {
    return p.out_channels - block * kLanes > kWidth ? kLanes : kWidth;
}

int64_t grad_partial_floats(const GradWeightParams& p) {
    const GradLayout layout(p);
    return layout.chunks * layout.chunk_floats;
}

int64_t grad_items(const GradWeightParams& p) {
    const GradLayout layout(p);
    return layout.chunks * p.groups * layout.blocks * layout.outer_taps;
}

// All taps along the innermost axis, for a few rows of input and output gradient.
void grad_rows(const GradWeightParams& p, OuterTask task, float* acc) {
    const Axis& c = p.axis[2];
    task.x_step = c.step * c.in_stride;
    task.dy_step = c.out_stride;
    for (int64_t kw = 0; kw < c.kernel; ++kw) {
        int64_t low, high;
        valid_range(c, kw, &low, &high);
        if (low >= high) continue;
        task.pixels = high - low;
        task.dy_offset = low * c.out_stride;
        const int64_t x_offset = (low * c.step + c.offset + kw * c.offset_step) * c.in_stride;
        for (int64_t ch = 0; ch < p.in_channels;) {
            const int64_t left = p.in_channels - ch;
            const int count = static_cast<int>(ceil_div(left, ceil_div(left, kTile)));
            task.x_offset = x_offset + ch;
            task.acc = acc + (kw * p.in_channels + ch) * task.width;
            run_outer_tile(task, count);
            ch += count;
        }
    }
}

void grad_run(const GradWeightParams& p, float* partials, int64_t begin, int64_t end, void*) {
    const GradLayout layout(p);
    const Axis &a = p.axis[0], &b = p.axis[1], &c = p.axis[2];
    for (int64_t item = begin; item < end; ++item) {
        const int64_t outer = item % layout.outer_taps, block = item / layout.outer_taps % layout.blocks;
        const int64_t group = item / (layout.outer_taps * layout.blocks) % p.groups;
        const int64_t chunk = item / (layout.outer_taps * layout.blocks * p.groups);
        const int64_t kd = outer / b.kernel, kh = outer % b.kernel;
        const int width = grad_block_width(p, block);
        const int lanes = static_cast<int>(min64(width, p.out_channels - block * kLanes));
        const int64_t slab = c.kernel * p.in_channels * width;
        float* acc = partials + layout.block_offset(p, chunk, group, block) + outer * slab;
        std::memset(acc, 0, static_cast<size_t>(slab) * sizeof(float));
        const int64_t last = min64(layout.rows, (chunk + 1) * layout.rows_per_chunk);
        const int64_t batch = min64(kRowsAtOnce, ceil_div(kPixelsAtOnce, max64(1, c.out_size)));
        const float *x_rows[kRowsAtOnce], *dy_rows[kRowsAtOnce];
        OuterTask task{};
        task.x_rows = x_rows;
        task.dy_rows = dy_rows;
        task.width = width;
        task.lanes = lanes;
        for (int64_t row = chunk * layout.rows_per_chunk; row < last; ++row) {
            const int64_t oh = row % b.out_size, od = row / b.out_size % a.out_size,
                          n = row / (b.out_size * a.out_size);
            const int64_t id = in_position(a, od, kd), ih = in_position(b, oh, kh);
            if (inside(id, a.in_size) && inside(ih, b.in_size)) {
                x_rows[task.rows] = static_cast<const float*>(p.input) + n * p.in_batch_stride + id * a.in_stride +
                                    ih * b.in_stride + group * p.in_channels;
                dy_rows[task.rows] = static_cast<const float*>(p.grad) + n * p.out_batch_stride + od * a.out_stride +
                                     oh * b.out_stride + group * p.out_channels + block * kLanes;
                ++task.rows;
            }
            if (task.rows == batch || row + 1 == last) {
                grad_rows(p, task, acc);
                task.rows = 0;
            }
        }
    }
}

int64_t grad_finish_items(const GradWeightParams& p) { return p.groups * GradLayout(p).blocks; }

// Add the chunks of one block in order, then write its gradients. The sums stay in the first chunk's place.
void grad_finish(const GradWeightParams& p, const float* partials, double* density_rows, int64_t begin, int64_t end) {
    const GradLayout layout(p);
    const float* density = static_cast<const float*>(p.density);
    const int64_t per_output = p.in_channels * layout.taps;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item / layout.blocks, block = item % layout.blocks;
        const int width = grad_block_width(p, block);
        const int64_t lanes = min64(width, p.out_channels - block * kLanes);
        float* first = const_cast<float*>(partials) + layout.block_offset(p, 0, group, block);
        const int64_t floats = per_output * width;
        for (int64_t chunk = 1; chunk < layout.chunks; ++chunk) {
            const float* more = partials + layout.block_offset(p, chunk, group, block);
            for (int64_t i = 0; i < floats; i += kWidth) store(first + i, load(first + i) + load(more + i));
        }
        double* sums = density_rows ? density_rows + item * layout.taps : nullptr;
        if (sums) std::memset(sums, 0, static_cast<size_t>(layout.taps) * sizeof(double));
        const int64_t output0 = group * p.out_channels + block * kLanes;
        const float* weight = static_cast<const float*>(p.weight) + output0 * per_output;
        float* grad = p.weight_grad ? static_cast<float*>(p.weight_grad) + output0 * per_output : nullptr;
        for (int64_t c = 0; c < p.in_channels; ++c) {
            for (int64_t from = 0; from < layout.taps; from += kTapsAtOnce) {
                const int64_t taps = min64(layout.taps - from, kTapsAtOnce);
                float turned[kLanes *
                             kTapsAtOnce];  // [output channel][tap]: the sums of one tap lie far from the next tap's
                for (int64_t k = 0; k < taps; ++k)
                    for (int64_t o = 0; o < lanes; ++o)
                        turned[o * taps + k] = first[((from + k) * p.in_channels + c) * width + o];
                for (int64_t o = 0; o < lanes; ++o) {
                    const int64_t at = o * per_output + c * layout.taps + from;
                    for (int64_t k = 0; k < taps; ++k) {
                        const float g = turned[o * taps + k];
                        if (sums) sums[from + k] += static_cast<double>(g) * weight[at + k];
                        if (grad) grad[at + k] = density ? g * density[from + k] : g;
                    }
                }
            }
        }
    }
}

const char* grad_unsupported(const GradWeightParams& p) {
    return p.dtype == DType::float32 ? nullptr : "the weight gradient is computed in float32";
}

constexpr GradAlgorithm kGradDirect = {"grad_direct", grad_unsupported,  grad_partial_floats, grad_items,
                                       grad_run,      grad_finish_items, grad_finish};

}  // namespace
}  // namespace weighted_conv
}  // namespace pdn
