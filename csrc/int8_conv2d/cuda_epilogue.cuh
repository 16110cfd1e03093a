// From sums to outputs: scale, bias, FiLM, activation, residual, and the cast or requantization, four channels at once.
#pragma once

#include "cuda_gather.cuh"

namespace pdn {
namespace {

// y = sum * gain + shift, of four channels of one image. `scale` is the input's.
struct ChannelTerms {
    Float4 gain, shift;
};

PDN_HD float vector_or(const float* values, int64_t index, float otherwise) {
    return values ? values[index] : otherwise;
}

PDN_HD ChannelTerms channel_terms(const Problem& p, float scale, int n, int channel) {
    ChannelTerms t{};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int c = channel + j;
        if (c >= p.out_channels) break;
        const int64_t image = static_cast<int64_t>(n) * p.out_channels;
        const float bias = vector_or(p.bias, c, 0.f) + vector_or(p.channel_bias, image + c, 0.f);
        const float gain = 1.f + vector_or(p.film, 2 * image + c, 0.f);
        t.gain.v[j] = scale * p.weight_scale[c] * gain;
        t.shift.v[j] = fmaf(bias, gain, vector_or(p.film, 2 * image + p.out_channels + c, 0.f));
    }
    return t;
}

// Four sums of one output pixel: integers, or floats into which the pixels' scales have gone.
union Sums {
    int i[4];
    Float4 f;
};

// The scale by which a row's integers are still to be multiplied: of a per-pixel 1x1 convolution, that of its pixel.
PDN_HD float row_scale(const Problem& p, const Plan& plan, int64_t row) {
    if (!p.per_pixel || plan.per_tap) return 1.f;
    return pixel_grid(p, position_of(p, static_cast<uint32_t>(row)), 0, 0).scale;
}

// The zero point of a row's integers, with `common` that of the tensor.
PDN_HD int row_zero_point(const Problem& p, int common, int64_t row) {
    if (!p.per_pixel || !p.zero_point) return common;
    return pixel_grid(p, position_of(p, static_cast<uint32_t>(row)), 0, 0).zero_point;
}

// Writes `count` (up to four) outputs of row `row` from `channel` on. `vector`: all four, in one access.
PDN_HD void finish4(const Problem& p, const Plan& plan, int64_t row, int channel, const Sums& sums,
                    const ChannelTerms& terms, int count, bool vector) {
    const int64_t at = row * p.out_channels + channel;
    if (p.out_type == Element::int32) {
        int32_t* out = static_cast<int32_t*>(p.output) + at;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (j < count) out[j] = sums.i[j];
        return;
    }
    Float4 y[1];
    const float scale = row_scale(p, plan, row);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float sum = plan.per_tap ? sums.f.v[j] : static_cast<float>(sums.i[j]);
        y[0].v[j] = fmaf(sum * scale, terms.gain.v[j], terms.shift.v[j]);
    }
    activate(y, p.activation);
    if (p.residual) {
        const Float4 r = load4_any(p.residual, p.residual_type, at, count, vector);
#pragma unroll
        for (int j = 0; j < 4; ++j) y[0].v[j] += r.v[j];
    }
    if (p.out_type == Element::int8) {
        const Grid g = load_grid(p.out_scale, p.out_zero_point);
        int q[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) q[j] = code_of(divide(y[0].v[j], g.scale), g.zero_point, g.low);
        store4_codes(static_cast<int8_t*>(p.output) + at, q, count, vector);
    } else {
        store4_any(p.output, p.out_type, at, y[0], count, vector);
    }
}

// The terms change only from one image to the next: a thread that walks down the rows of one quad of channels keeps
// them.
struct TermsCache {
    int n = -1;
    ChannelTerms terms;

    PDN_HD const ChannelTerms& of(const Problem& p, int image, int channel) {
        if (image != n && p.out_type != Element::int32) {
            n = image;
            terms = channel_terms(p, p.per_pixel ? 1.f : *p.input_scale, n, channel);
        }
        return terms;
    }
};

// Outputs, or one split's sums, of a tile of BM x BN sums in shared memory, `pitch` words a row.
template <int BM, int BN, int THREADS>
PDN_HD void finish_tile(const Problem& p, const Plan& plan, const TilePlace& tile, int thread, const int* shared,
                        int pitch) {
    constexpr int kQuads = BN / 4, kRows = THREADS / kQuads;  // of them, threads beyond are left over
    if (thread >= kRows * kQuads) return;
    const int quad = thread % kQuads * 4, channel = tile.group * plan.group_out + tile.channel + quad;
    const int count = plan.group_out - tile.channel - quad < 4 ? plan.group_out - tile.channel - quad : 4;
    if (count <= 0) return;
    const bool vector = plan.vector_out && count == 4;
    TermsCache cache;
    for (int r = thread / kQuads; r < BM; r += kRows) {
        const int row = tile.row + r;
        if (row >= plan.rows) return;
        Sums sums;
        const Float4 raw = shared4(reinterpret_cast<const float*>(shared + r * pitch + quad));
        memcpy(&sums, &raw, sizeof raw);
        if (plan.splits > 1) {
            const int64_t at = (static_cast<int64_t>(tile.split) * plan.rows + row) * p.out_channels + channel;
            store4_of(static_cast<float*>(p.workspace) + at, sums.f, count, vector);
        } else {
            const int n = row / (p.out_h * p.out_w);
            finish4(p, plan, row, channel, sums, cache.of(p, n, channel), count, vector);
        }
    }
}

}  // namespace
}  // namespace pdn
