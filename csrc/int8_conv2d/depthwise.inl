// Depthwise convolution: every channel with a kernel of its own, vectors of channels, products in 32 bits. Reads pixels
// in place; positions outside the image are left out.
#pragma once

#include "finish.inl"
#include "plan.inl"

namespace pdn {
namespace int8_conv2d {
namespace {

typedef int8_t CodeVector __attribute__((vector_size(kWidth)));

const char* depthwise_unsupported(const ConvParams& p) {
    return p.in_channels == 1 && p.out_channels == 1 && p.groups > 1
               ? nullptr
               : "depthwise takes one channel in and out per group";
}

// [block of kLanes channels][tap][kLanes] int8, zero where no channel is.
int64_t depthwise_taps(const ConvParams& p) { return p.rows.kernel * p.columns.kernel; }
int64_t depthwise_blocks(const ConvParams& p) { return ceil_div(p.groups, kLanes); }
int64_t depthwise_packed_bytes(const ConvParams& p) { return depthwise_blocks(p) * depthwise_taps(p) * kLanes; }

void depthwise_pack(const ConvParams& p, const int8_t* weight, void* packed, int64_t begin, int64_t end) {
    const int64_t taps = depthwise_taps(p);
    for (int64_t block = begin; block < end; ++block) {
        int8_t* to = static_cast<int8_t*>(packed) + block * taps * kLanes;
        for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                const int64_t channel = block * kLanes + lane;
                to[tap * kLanes + lane] = channel < p.groups ? weight[channel * taps + tap] : 0;
            }
    }
}

// An item is one output row of one image.
Plan depthwise_plan(const ConvParams& p) {
    Plan plan{};
    plan.items = p.batch * p.rows.out_size;
    return plan;
}

PDN_INLINE vi widened_codes(const int8_t* x, int64_t lanes) {
    CodeVector narrow{};
    if (lanes >= kWidth)
        std::memcpy(&narrow, x, sizeof narrow);
    else
        std::memcpy(&narrow, x, static_cast<size_t>(lanes));
    return __builtin_convertvector(narrow, vi);
}

// One vector of channels of one output pixel: int32 sums, or float32 ones where pixels have scales.
PDN_INLINE vi depthwise_vector(const ConvParams& p, int64_t n, int64_t row, int64_t column, int64_t channel,
                               const int8_t* weights) {
    const Axis &a = p.rows, &b = p.columns;
    const int64_t height = a.in_size * p.upsample, width = b.in_size * p.upsample;
    const int shift = p.upsample == 2;
    const int32_t zero = !p.per_pixel && p.input_zero_point ? *p.input_zero_point : 0;
    vi sum{};
    vf total{};
    for (int64_t i = 0; i < a.kernel; ++i) {
        const int64_t y = row * a.step + a.offset + i * a.dilation;
        if (y < 0 || y >= height) continue;
        for (int64_t j = 0; j < b.kernel; ++j) {
            const int64_t x = column * b.step + b.offset + j * b.dilation;
            if (x < 0 || x >= width) continue;
            const int8_t* code =
                p.input + n * p.in_batch_stride + (y >> shift) * a.in_stride + (x >> shift) * b.in_stride + channel;
            const vi w = widened_codes(weights + (i * b.kernel + j) * kLanes, kWidth);
            const vi c = widened_codes(code, p.groups - channel);
            if (!p.per_pixel) {
                sum += (c - zero) * w;
                continue;
            }
            const int64_t pixel = (n * a.in_size + (y >> shift)) * b.in_size + (x >> shift);
            const int32_t own = p.input_zero_point ? p.input_zero_point[pixel] : 0;
            total += __builtin_convertvector((c - own) * w, vf) * p.input_scale[pixel];
        }
    }
    return p.per_pixel ? (vi)total : sum;
}

void depthwise_run(const ConvParams& p, int64_t begin, int64_t end, void*, uint64_t) {
    constexpr int64_t kPixels = 8;
    const int64_t taps = depthwise_taps(p);
    Finisher finisher(p, p.per_pixel ? Sums::rescaled : Sums::integer);
    alignas(64) int32_t sums[kPixels * kLanes];
    for (int64_t item = begin; item < end; ++item) {
        const int64_t n = item / p.rows.out_size, row = item % p.rows.out_size;
        for (int64_t block = 0; block < depthwise_blocks(p); ++block) {
            const int64_t channel = block * kLanes;
            const int lanes = static_cast<int>(min64(kLanes, p.groups - channel));
            const int8_t* weights = static_cast<const int8_t*>(p.packed) + block * taps * kLanes;
            finisher.prepare(n, channel, lanes, nullptr);
            for (int64_t first = 0; first < p.columns.out_size; first += kPixels) {
                const int count = static_cast<int>(min64(kPixels, p.columns.out_size - first));
                for (int m = 0; m < count; ++m)
                    for (int from = 0; from < lanes; from += kWidth)
                        store_lanes(sums + m * kLanes + from,
                                    depthwise_vector(p, n, row, first + m, channel + from, weights + from));
                finisher.move_to(n, row, first);
                finisher.pixels(sums, count, kLanes);
            }
        }
    }
}

constexpr Algorithm kDepthwise = {"depthwise",    depthwise_unsupported, depthwise_packed_bytes, depthwise_blocks,
                                  depthwise_pack, depthwise_plan,        depthwise_run};

}  // namespace
}  // namespace int8_conv2d
}  // namespace pdn
