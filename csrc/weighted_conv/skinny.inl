// The first and last layers of image networks: one to four channels on one side.
#pragma once

#include "depthwise.inl"
#include "kernel.inl"

namespace pdn {
namespace weighted_conv {
namespace {

constexpr int64_t kSkinnyChannels = 4;

template <class T>
PDN_INLINE vf load_lanes(const T* p, int64_t lanes) {
    return lanes >= kWidth ? load(p) : load_partial(p, static_cast<int>(lanes));
}

// ------------------------------------------------------------------------------------------------ few channels in
// The input rows that an output row needs are laid out with their padding, so that tap t of a pixel lies at a fixed
// offset whatever the border; then one flat loop runs over all taps and channels.

// Output vectors of a full block, and pixels of a tile by the vectors of its block: as many accumulators as leave room
// for the operands.
constexpr int kSkinnyVectors = kWidth == 16 ? 4 : 2;
constexpr int64_t kSkinnyLanes = kSkinnyVectors * kWidth;
constexpr int skinny_tile(int vectors) { return kWidth < 16 ? 6 : vectors == 4 ? 6 : vectors == 3 ? 8 : 14; }
constexpr int kSkinnyTile = kWidth < 16 ? 6 : 14;  // the largest

PDN_INLINE int skinny_block_width(const ConvParams& p, int64_t block) {
    return static_cast<int>(min64(kSkinnyLanes, ceil_div(p.out_channels - block * kSkinnyLanes, kWidth) * kWidth));
}

PDN_INLINE int64_t skinny_steps(const ConvParams& p) {
    return p.in_channels * p.axis[0].taps * p.axis[1].taps * p.axis[2].taps;
}

// Packed: [group][block][tap of the whole kernel][channel][block width], float32 whatever the storage type.
struct SkinnyPacking {
    int64_t blocks, taps, group_floats;

    explicit SkinnyPacking(const ConvParams& p) {
        blocks = ceil_div(p.out_channels, kSkinnyLanes);
        taps = p.axis[0].kernel * p.axis[1].kernel * p.axis[2].kernel;
        group_floats = ((blocks - 1) * kSkinnyLanes + skinny_block_width(p, blocks - 1)) * taps * p.in_channels;
    }

    int64_t block_offset(const ConvParams& p, int64_t group, int64_t block) const {
        return group * group_floats + block * kSkinnyLanes * taps * p.in_channels;
    }
};

int64_t skinny_in_packed_bytes(const ConvParams& p) { return p.groups * SkinnyPacking(p).group_floats * 4; }
int64_t skinny_in_pack_items(const ConvParams& p) { return p.groups * SkinnyPacking(p).blocks; }

template <class T>
void skinny_in_pack_as(const ConvParams& p, const WeightView& view, float* packed, int64_t begin, int64_t end) {
    const SkinnyPacking layout(p);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item / layout.blocks, block = item % layout.blocks;
        const int width = skinny_block_width(p, block);
        float* out = packed + layout.block_offset(p, group, block);
        for (int64_t tap = 0; tap < layout.taps; ++tap) {
            const float factor = view.density ? widen(static_cast<const T*>(view.density)[tap * view.tap_stride]) : 1.f;
            for (int64_t c = 0; c < p.in_channels; ++c)
                for (int64_t o = 0; o < width; ++o) {
                    const int64_t channel = block * kSkinnyLanes + o;
                    const int64_t at = group * view.group_stride + channel * view.out_stride + c * view.in_stride +
                                       tap * view.tap_stride;
                    *out++ = channel < p.out_channels ? widen(static_cast<const T*>(view.weight)[at]) * factor : 0.f;
                }
        }
    }
}

void skinny_in_pack(const ConvParams& p, const WeightView& view, void* packed, int64_t begin, int64_t end) {
    float* out = static_cast<float*>(packed);
    p.dtype == DType::float32 ? skinny_in_pack_as<float>(p, view, out, begin, end)
                              : skinny_in_pack_as<bf16>(p, view, out, begin, end);
}

// A row is worked on in segments: long ones (sound) are shared by the threads and need no scratch of their length.
constexpr int64_t kSkinnySegment = 1024;
PDN_INLINE int64_t skinny_segments(const ConvParams& p) { return ceil_div(p.axis[2].out_size, kSkinnySegment); }

int64_t skinny_in_items(const ConvParams& p) {
    return p.batch * p.groups * p.axis[0].out_size * p.axis[1].out_size * skinny_segments(p);
}

// One step of the flat loop: where its input lies from the pixel, and its weights from the block.
struct SkinnyStep {
    int32_t input, weight;
};

// Pixels of a padded row: every position that a tap of one segment's output pixels can have.
PDN_INLINE int64_t padded_span(const Axis& c) {
    const int64_t reach = (c.taps - 1) * c.offset_step;
    return (min64(c.out_size, kSkinnySegment) - 1) * c.step + (reach < 0 ? -reach : reach) + 1;
}

int64_t skinny_in_scratch(const ConvParams& p) {
    const int64_t rows = p.axis[0].taps * p.axis[1].taps;
    return (rows * padded_span(p.axis[2]) * p.in_channels + kWidth) * 4 + (skinny_steps(p) + 1) * sizeof(SkinnyStep) +
           64;
}

const char* skinny_in_unsupported(const ConvParams& p) {
    if (p.in_channels > kSkinnyChannels) return "skinny_in: more than 4 input channels per group";
    if (p.out_channels < kWidth) return "skinny_in: fewer output channels than a vector holds";
    if (skinny_steps(p) > (1 << 20) || skinny_in_scratch(p) > (64 << 20))
        return "skinny_in: too many taps, or too far apart";
    return nullptr;
}

// What the tiles of one row and one block share.
template <class T>
struct SkinnyInRow {
    const float* rows;
    const float* weights;
    const SkinnyStep* steps;
    int64_t count, stride;  // steps, floats between pixels
    float bias[kSkinnyLanes];
    Finish<T> finish;
};

template <int M, int N, int Stride, TileEnd E, class T>
PDN_INLINE void skinny_in_tile(const SkinnyInRow<T>& r, int64_t column, int pixels) {
    const int64_t stride = Stride ? Stride : r.stride;
    const float* x = r.rows + column * stride;
    vf acc[M][N];
    for (int j = 0; j < N; ++j) {
        const vf first = load(r.bias + j * kWidth);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) acc[m][j] = first;
    }
    for (int64_t k = 0; k < r.count; ++k) {
        const float* at = x + r.steps[k].input;
        const float* w = r.weights + r.steps[k].weight * (N * kWidth);
        vf b[N];
        for (int j = 0; j < N; ++j) b[j] = load(w + j * kWidth);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const vf a = splat(at[m * stride]);
            for (int j = 0; j < N; ++j) acc[m][j] += a * b[j];
        }
    }
    if (E == TileEnd::any) {
        float values[M * N * kWidth];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < N; ++j) store(values + (m * N + j) * kWidth, acc[m][j]);
        return finish_values(values, pixels, N, moved(r.finish, column, 0, r.finish.lanes));
    }
    T* output = r.finish.output + column * r.finish.out_stride;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m, output += r.finish.out_stride)
        for (int j = 0; j < N; ++j) store(output + j * kWidth, E == TileEnd::relu ? relu(acc[m][j]) : acc[m][j]);
}

// A row whose blocks have N output vectors.
template <int N, int Stride, TileEnd E, class T>
void skinny_in_row(const SkinnyInRow<T>& r, int64_t width) {
    constexpr int kPixels = skinny_tile(N);
    int64_t column = 0;
    if (E != TileEnd::any)
        for (; column + kPixels <= width; column += kPixels)
            skinny_in_tile<kPixels, N, Stride, E, T>(r, column, kPixels);
    for (; column < width; column += kPixels)
        skinny_in_tile<kPixels, N, Stride, TileEnd::any, T>(r, column,
                                                            static_cast<int>(min64(kPixels, width - column)));
}

template <int N, int Stride, class T>
void skinny_in_end(const SkinnyInRow<T>& r, int64_t width) {
    const int activation = r.finish.activation;
    if (r.finish.residual || r.finish.lanes < N * kWidth) return skinny_in_row<N, Stride, TileEnd::any, T>(r, width);
    if (activation == static_cast<int>(Activation::none)) return skinny_in_row<N, Stride, TileEnd::plain, T>(r, width);
    if (activation == static_cast<int>(Activation::relu)) return skinny_in_row<N, Stride, TileEnd::relu, T>(r, width);
    skinny_in_row<N, Stride, TileEnd::any, T>(r, width);
}

template <int N, class T>
void skinny_in_stride(const SkinnyInRow<T>& r, int64_t width) {
    switch (r.stride) {  // a stride known when compiling makes every pixel an offset from one register
        case 1:
            return skinny_in_end<N, 1, T>(r, width);
        case 3:
            return skinny_in_end<N, 3, T>(r, width);
        default:
            return skinny_in_end<N, 0, T>(r, width);
    }
}

PDN_INLINE void copy_widened(const float* from, float* to, int64_t count) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}
PDN_INLINE void copy_widened(const bf16* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

// Copy the input rows of an output row, from output `column` on, into `rows`: zeros where they leave the image.
template <class T>
void skinny_in_fill(const ConvParams& p, int64_t n, int64_t group, int64_t row, int64_t column, float* rows) {
    const Axis &a = p.axis[0], &b = p.axis[1], &c = p.axis[2];
    const int64_t span = padded_span(c), reach = (c.taps - 1) * c.offset_step;
    const int64_t first = column * c.step + c.offset + (reach < 0 ? reach : 0);
    const T* image = static_cast<const T*>(p.input) + n * p.in_batch_stride + group * p.in_channels;
    for (int64_t i = 0; i < a.taps; ++i) {
        const int64_t d = in_position(a, row / b.out_size, i);
        for (int64_t j = 0; j < b.taps; ++j, rows += span * p.in_channels) {
            const int64_t h = in_position(b, row % b.out_size, j);
            std::memset(rows, 0, static_cast<size_t>(span * p.in_channels) * sizeof(float));
            if (!inside(d, a.in_size) || !inside(h, b.in_size)) continue;
            const T* from = image + d * a.in_stride + h * b.in_stride;
            const int64_t low = max64(0, -first), high = min64(span, c.in_size - first);
            if (low >= high) continue;
            if (c.in_stride == p.in_channels) {
                copy_widened(from + (first + low) * c.in_stride, rows + low * p.in_channels,
                             (high - low) * p.in_channels);
                continue;
            }
            for (int64_t w = low; w < high; ++w)
                for (int64_t ch = 0; ch < p.in_channels; ++ch)
                    rows[w * p.in_channels + ch] = widen(from[(first + w) * c.in_stride + ch]);
        }
    }
}

template <class T>
void skinny_in_run_as(const ConvParams& p, int64_t begin, int64_t end, void* scratch) {
    const Axis &a = p.axis[0], &b = p.axis[1], &c = p.axis[2];
    const SkinnyPacking layout(p);
    const int64_t span = padded_span(c), reach = (c.taps - 1) * c.offset_step, count = skinny_steps(p);
    SkinnyStep* steps = static_cast<SkinnyStep*>(scratch);
    float* rows = reinterpret_cast<float*>(steps + (count + 1));
    int64_t at = 0;
    for (int64_t i = 0; i < a.taps; ++i)
        for (int64_t j = 0; j < b.taps; ++j)
            for (int64_t k = 0; k < c.taps; ++k)
                for (int64_t ch = 0; ch < p.in_channels; ++ch, ++at) {
                    const int64_t tap = ((a.tap + i * a.tap_step) * b.kernel + b.tap + j * b.tap_step) * c.kernel +
                                        c.tap + k * c.tap_step;
                    const int64_t column = k * c.offset_step - (reach < 0 ? reach : 0);
                    steps[at].input = static_cast<int32_t>(((i * b.taps + j) * span + column) * p.in_channels + ch);
                    steps[at].weight = static_cast<int32_t>(tap * p.in_channels + ch);
                }
    const int64_t segments = skinny_segments(p), image_rows = a.out_size * b.out_size;
    SkinnyInRow<T> r;
    r.rows = rows, r.steps = steps, r.count = count, r.stride = c.step * p.in_channels;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t column = item % segments * kSkinnySegment, outer = item / segments;
        const int64_t columns = min64(kSkinnySegment, c.out_size - column);
        const int64_t row = outer % image_rows, group = outer / image_rows % p.groups,
                      n = outer / (image_rows * p.groups);
        skinny_in_fill<T>(p, n, group, row, column, rows);
        const Finish<T> start = finish_at<T>(p, n, row, column, group * p.out_channels, 0);
        for (int64_t block = 0; block < layout.blocks; ++block) {
            const int lanes = static_cast<int>(min64(kSkinnyLanes, p.out_channels - block * kSkinnyLanes));
            r.finish = moved(start, 0, block * kSkinnyLanes, lanes);
            r.weights = static_cast<const float*>(p.packed) + layout.block_offset(p, group, block);
            std::memset(r.bias, 0, sizeof r.bias);
            if (r.finish.bias)
                for (int i = 0; i < lanes; ++i) r.bias[i] = widen(r.finish.bias[i]);
            switch (ceil_div(lanes, kWidth)) {
                case 1:
                    skinny_in_stride<1, T>(r, columns);
                    break;
                case 2:
                    skinny_in_stride<2, T>(r, columns);
                    break;
#if defined(__AVX512F__)
                case 3:
                    skinny_in_stride<3, T>(r, columns);
                    break;
#endif
                default:
                    skinny_in_stride<kSkinnyVectors, T>(r, columns);
            }
        }
    }
}

void skinny_in_run(const ConvParams& p, int64_t begin, int64_t end, void* scratch) {
    p.dtype == DType::float32 ? skinny_in_run_as<float>(p, begin, end, scratch)
                              : skinny_in_run_as<bf16>(p, begin, end, scratch);
}

constexpr Algorithm kSkinnyIn = {"skinny_in",    skinny_in_unsupported, skinny_in_packed_bytes, skinny_in_pack_items,
                                 skinny_in_pack, skinny_in_items,       skinny_in_scratch,      skinny_in_run};

// ------------------------------------------------------------------------------------------------ few channels out
// Input channels fill the vectors; the sums of a few pixels times all output channels stay in registers, and the lanes
// are added up at the end.

// Pixels of a tile, by output channels: as many sums as leave room for the operands, and lanes to add up in whole
// vectors.
constexpr int skinny_pixels(int outputs) {
    if (kWidth == 16) return outputs == 1 ? 16 : outputs == 2 ? 12 : outputs == 3 ? 8 : 6;
    return outputs == 1 ? 8 : outputs == 2 ? 5 : outputs == 3 ? 4 : 3;
}

// Without this the compiler loads an operand anew for each of its uses, and loads are what there is too little of.
PDN_INLINE void in_register(vf& value) {
#if defined(__SSE2__)
    asm("" : "+v"(value));
#endif
}

// One step of adding up lanes: below, lane l of the result is a[l] + a[l + Distance] where bit Distance of l is clear,
// and b[l - Distance] + b[l] where it is set.
template <int Distance>
PDN_INLINE vf fold(vf a, vf b) {
    vi low, high;
    for (int l = 0; l < kWidth; ++l) {
        low[l] = l & Distance ? kWidth + l - Distance : l;
        high[l] = l & Distance ? kWidth + l : l + Distance;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// Lane l of the result is the sum over the lanes of v[l]; Count vectors, the others count as zero.
template <int Count, int Distance = kWidth / 2>
PDN_INLINE vf lane_sums(const vf* v) {
    if constexpr (Count <= 0) {
        return vf{};
    } else if constexpr (Distance == 0) {
        return v[0];
    } else {
        constexpr int kFirst = Count < Distance ? Count : Distance;
        return fold<Distance>(lane_sums<kFirst, Distance / 2>(v), lane_sums<Count - kFirst, Distance / 2>(v + kFirst));
    }
}

const char* skinny_out_unsupported(const ConvParams& p) {
    if (p.out_channels > kSkinnyChannels) return "skinny_out: more than 4 output channels per group";
    return p.in_channels >= kWidth ? nullptr : "skinny_out: fewer input channels than a vector holds";
}

// Packed: [group][outer taps][output channel][tap of a row][input channels up to a whole vector], float32.
PDN_INLINE int64_t skinny_row(const ConvParams& p) { return ceil_div(p.in_channels, kWidth) * kWidth; }
int64_t skinny_out_packed_bytes(const ConvParams& p) {
    return p.groups * all_taps(p) * p.out_channels * skinny_row(p) * 4;
}
int64_t skinny_out_pack_items(const ConvParams& p) { return p.groups; }

template <class T>
void skinny_out_pack_as(const ConvParams& p, const WeightView& view, float* packed, int64_t begin, int64_t end) {
    const int64_t taps = all_taps(p), row = skinny_row(p);
    for (int64_t group = begin; group < end; ++group)
        for (int64_t tap = 0; tap < taps; ++tap) {
            const float factor = view.density ? widen(static_cast<const T*>(view.density)[tap * view.tap_stride]) : 1.f;
            const int64_t kernel = p.axis[2].kernel, outer = tap / kernel;
            for (int64_t o = 0; o < p.out_channels; ++o) {
                float* out =
                    packed +
                    ((group * taps / kernel + outer) * p.out_channels * kernel + o * kernel + tap % kernel) * row;
                for (int64_t c = 0; c < row; ++c) {
                    const int64_t at =
                        group * view.group_stride + o * view.out_stride + c * view.in_stride + tap * view.tap_stride;
                    out[c] = c < p.in_channels ? widen(static_cast<const T*>(view.weight)[at]) * factor : 0.f;
                }
            }
        }
}

void skinny_out_pack(const ConvParams& p, const WeightView& view, void* packed, int64_t begin, int64_t end) {
    float* out = static_cast<float*>(packed);
    p.dtype == DType::float32 ? skinny_out_pack_as<float>(p, view, out, begin, end)
                              : skinny_out_pack_as<bf16>(p, view, out, begin, end);
}

int64_t skinny_out_items(const ConvParams& p) { return p.batch * p.groups * p.axis[0].out_size * p.axis[1].out_size; }
int64_t skinny_out_scratch(const ConvParams& p) { return skinny_row(p) * 4 + 64; }

// Out of line, so that not every tile carries the code of every activation.
__attribute__((noinline)) void activate_all(float* values, int vectors, int activation) {
    for (int i = 0; i < vectors; ++i) store(values + i * kWidth, activate(load(values + i * kWidth), activation));
}

template <class T>
struct SkinnyOutRow {
    const ConvParams& p;
    int64_t n, group, row, lanes_row, taps;
    const T* zeros;
    Finish<T> start;
    bool rows_adjoin, dense;
    float bias[kSkinnyChannels * 16];  // of the outputs of a tile, in their order

    SkinnyOutRow(const ConvParams& params, int64_t item, const void* zero_row) : p(params) {
        const int64_t rows = p.axis[0].out_size * p.axis[1].out_size;
        row = item % rows;
        group = item / rows % p.groups;
        n = item / (rows * p.groups);
        lanes_row = skinny_row(p);
        taps = all_taps(p);
        zeros = static_cast<const T*>(zero_row);
        start = finish_at<T>(p, n, row, 0, group * p.out_channels, 0);
        const Axis& c = p.axis[2];
        rows_adjoin = c.offset_step * c.in_stride == p.in_channels && c.tap_step == 1 && p.in_channels % kWidth == 0;
        dense = start.out_stride == p.out_channels && (!start.residual || start.residual_stride == p.out_channels);
        for (int64_t i = 0; i < kSkinnyChannels * 16; ++i)
            bias[i] = start.bias ? widen(start.bias[i % p.out_channels]) : 0.f;
    }

    // acc += the products of `channels` adjoining input channels of every pixel.
    template <int M, int O>
    PDN_INLINE void stretch(vf (&acc)[M][O], const T* const (&x)[M], const float* w, int64_t channels) const {
        const int64_t whole = channels / kWidth * kWidth, next = p.axis[2].kernel * lanes_row;
        for (int64_t c = 0; c < whole; c += kWidth) {
            vf weight[O];
            for (int o = 0; o < O; ++o) weight[o] = load(w + o * next + c);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                vf value = load(x[m] + c);
                if (O > 1) in_register(value);
                for (int o = 0; o < O; ++o) acc[m][o] += value * weight[o];
            }
        }
        if (whole == channels) return;
        const int tail = static_cast<int>(channels - whole);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const vf value = load_partial(x[m] + whole, tail);
            for (int o = 0; o < O; ++o) acc[m][o] += value * load(w + o * next + whole);
        }
    }

    // The same for pixels that lie `pixel` elements apart, all inside the image.
    template <int M, int O>
    PDN_INLINE void even_stretch(vf (&acc)[M][O], const T* x, int64_t pixel, const float* w, int64_t channels) const {
        const int64_t whole = channels / kWidth * kWidth, next = p.axis[2].kernel * lanes_row;
        for (int64_t c = 0; c < whole; c += kWidth) {
            vf weight[O];
            for (int o = 0; o < O; ++o) weight[o] = load(w + o * next + c);
            const T* at = x + c;
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m, at += pixel) {
                vf value = load(at);
                if (O > 1) in_register(value);
                for (int o = 0; o < O; ++o) acc[m][o] += value * weight[o];
            }
        }
        if (whole == channels) return;
        const int tail = static_cast<int>(channels - whole);
        const T* at = x + whole;
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m, at += pixel) {
            const vf value = load_partial(at, tail);
            for (int o = 0; o < O; ++o) acc[m][o] += value * load(w + o * next + whole);
        }
    }

    template <int M, int O>
    void tile(int64_t column) const {
        const Axis &a = p.axis[0], &b = p.axis[1], &c = p.axis[2];
        const T* image = static_cast<const T*>(p.input) + n * p.in_batch_stride + group * p.in_channels;
        const float* packed = static_cast<const float*>(p.packed) + group * taps * O * lanes_row;
        vf acc[M][O];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
            for (int o = 0; o < O; ++o) acc[m][o] = vf{};
        const int64_t first = in_position(c, column, 0), last = in_position(c, column + M - 1, 0);
        const int64_t reach = (c.taps - 1) * c.offset_step;
        const bool all_inside = inside(first, c.in_size) && inside(last, c.in_size) &&
                                inside(first + reach, c.in_size) && inside(last + reach, c.in_size);
        for (int64_t i = 0; i < a.taps; ++i) {
            const int64_t d = in_position(a, row / b.out_size, i);
            if (!inside(d, a.in_size)) continue;
            for (int64_t j = 0; j < b.taps; ++j) {
                const int64_t h = in_position(b, row % b.out_size, j);
                if (!inside(h, b.in_size)) continue;
                const T* from = image + d * a.in_stride + h * b.in_stride;
                const int64_t outer = (a.tap + i * a.tap_step) * b.kernel + b.tap + j * b.tap_step;
                const float* weights = packed + (outer * O * c.kernel + c.tap) * lanes_row;
                const int64_t pixel = c.step * c.in_stride;
                if (all_inside && rows_adjoin) {  // the taps of a row read adjoining memory: one stretch
                    if (j == b.taps - 1) {        // what the next tile is the first to read
                        const T* ahead = from + (first + (M - 1) * c.step + c.taps) * c.in_stride;
                        for (int64_t at = 0; at < M * pixel; at += 64 / static_cast<int64_t>(sizeof(T)))
                            __builtin_prefetch(ahead + at);
                    }
                    even_stretch<M, O>(acc, from + first * c.in_stride, pixel, weights, c.taps * p.in_channels);
                    continue;
                }
                for (int64_t k = 0; k < c.taps; ++k) {
                    const int64_t at = first + k * c.offset_step;
                    const float* w = weights + k * c.tap_step * lanes_row;
                    if (all_inside) {
                        even_stretch<M, O>(acc, from + at * c.in_stride, pixel, w, p.in_channels);
                        continue;
                    }
                    const T* x[M];
#pragma GCC unroll 16
                    for (int m = 0; m < M; ++m) {
                        const int64_t column_in = at + m * c.step;
                        x[m] = inside(column_in, c.in_size) ? from + column_in * c.in_stride : zeros;
                    }
                    stretch<M, O>(acc, x, w, p.in_channels);
                }
            }
        }
        finish<M, O>(acc, column);
    }

    // The sums of all pixels and output channels side by side: bias, activation, residual.
    template <int M, int O>
    PDN_INLINE void finish(const vf (&acc)[M][O], int64_t column) const {
        constexpr int kCount = M * O, kPadded = (kCount + kWidth - 1) / kWidth * kWidth;
        const Finish<T> f = moved(start, column, 0, O);
        float sums[kPadded];
        lane_chunks<kCount>(&acc[0][0], sums);
        for (int i = 0; i < kPadded; i += kWidth) store(sums + i, load(sums + i) + load(bias + i));
        if (f.activation != static_cast<int>(Activation::none)) activate_all(sums, kPadded / kWidth, f.activation);
        if (dense) {
#pragma GCC unroll 4
            for (int i = 0; i < kCount; i += kWidth) {
                const int lanes = kCount - i < kWidth ? kCount - i : kWidth;
                finish_vector(load(sums + i), f.residual ? f.residual + i : nullptr, f.output + i, lanes);
            }
            return;
        }
        for (int m = 0; m < M; ++m)
            for (int o = 0; o < O; ++o) {
                const float extra = f.residual ? widen(f.residual[m * f.residual_stride + o]) : 0.f;
                narrow(sums[m * O + o] + extra, f.output + m * f.out_stride + o);
            }
    }

    template <int Count>
    static PDN_INLINE void lane_chunks(const vf* v, float* sums) {
        store(sums, lane_sums<(Count < kWidth ? Count : kWidth)>(v));
        if constexpr (Count > kWidth) lane_chunks<Count - kWidth>(v + kWidth, sums + kWidth);
    }

    // The last tile reaches back over pixels that are done: computing them twice costs less than pixels one by one.
    template <int O>
    void columns() const {
        constexpr int kPixels = skinny_pixels(O);
        const int64_t width = p.axis[2].out_size;
        if (width < kPixels) {
            for (int64_t column = 0; column < width; ++column) tile<1, O>(column);
            return;
        }
        for (int64_t column = 0; column < width; column += kPixels) tile<kPixels, O>(min64(column, width - kPixels));
    }

    void run() const {
        switch (p.out_channels) {
            case 1:
                return columns<1>();
            case 2:
                return columns<2>();
            case 3:
                return columns<3>();
            default:
                return columns<4>();
        }
    }
};

void skinny_out_run(const ConvParams& p, int64_t begin, int64_t end, void* scratch) {
    std::memset(scratch, 0, static_cast<size_t>(skinny_out_scratch(p)));
    for (int64_t item = begin; item < end; ++item)
        p.dtype == DType::float32 ? SkinnyOutRow<float>(p, item, scratch).run()
                                  : SkinnyOutRow<bf16>(p, item, scratch).run();
}

constexpr Algorithm kSkinnyOut = {"skinny_out",          skinny_out_unsupported, skinny_out_packed_bytes,
                                  skinny_out_pack_items, skinny_out_pack,        skinny_out_items,
                                  skinny_out_scratch,    skinny_out_run};

}  // namespace
}  // namespace weighted_conv
}  // namespace pdn
