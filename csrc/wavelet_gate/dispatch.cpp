#include "dispatch.h"

#include "../core/levels.h"
#include "../core/threads.h"

namespace pdn {
namespace wavelet_gate {

PDN_FLOAT_LEVELS(KernelSet, kernels, kSets)

namespace {

constexpr int64_t kItemElements = 16384;   // of an item, and of what a thread is woken for
constexpr int64_t kItemPixels = 512;       // of an item of adjacent channels: its sums are few beside what it reads
constexpr int64_t kLongStream = 16 << 20;  // bytes of a result that is out of the caches when it is read anyway
constexpr float kHalfSigns[kBands][kBands] = {
    {.5f, .5f, .5f, .5f}, {.5f, -.5f, .5f, -.5f}, {.5f, .5f, -.5f, -.5f}, {.5f, -.5f, -.5f, .5f}};  // [band][pixel]

// How the rows of `planes` planes, `row_elements` elements each, are split.
struct Split {
    int64_t item_rows, parts, items, grain;

    Split(int64_t planes, int64_t rows, int64_t row_elements, int64_t item_elements) {
        const int64_t fitting = item_elements / row_elements;
        item_rows = fitting < 1 ? 1 : fitting < rows ? fitting : rows;
        parts = ceil_div(rows, item_rows);
        items = planes * parts;
        const int64_t elements = item_rows * row_elements;
        grain = elements < kItemElements ? kItemElements / elements : 1;
    }
};

template <class P>
Split split_of(const P& p, int64_t rows, int64_t row_pixels) {
    if (!p.channels_last) return {p.batch * p.channels, rows, row_pixels, kItemElements};
    const int64_t least = kItemPixels * p.channels;
    return {p.batch, rows, row_pixels * p.channels, least > kItemElements ? least : kItemElements};
}

template <class Body>
void each_item(const Split& split, const Body& body) {
    parallel_ranges(split.items, split.grain, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) body(item);
    });
}

// Of one image: factors of the pixels of a block, half the signs times the gates; or half the gates.
void fill_factors(const Params& p, const float* gate, float* factors) {
    for (int64_t c = 0; c < p.factor_channels; ++c) {
        const int64_t own = p.gates > 1 ? c : 0;
        for (int pixel = 0; pixel < kBands; ++pixel) {
            float factor = .5f * gate[pixel * p.gates + own];
            for (int band = 0; band < kBands && !p.up; ++band) {
                const float term = kHalfSigns[band][pixel] * gate[band * p.gates + own];
                factor = band ? factor + term : term;
            }
            factors[pixel * p.factor_channels + c] = factor;
        }
    }
}

// Factors, and room for partial sums behind them, in the scratch memory of this thread: items need none of their own.
bool prepare(Params& p, const Split& split, bool sums) {
    p.item_rows = split.item_rows;
    p.factor_channels = p.channels_last ? p.channels : p.gates;
    const int64_t count = ceil_div(p.batch * kBands * p.factor_channels, 16) * 16;
    const int64_t floats = count + (sums ? split.items * partial_size(p) : 0);
    auto* memory = static_cast<float*>(thread_scratch(floats * static_cast<int64_t>(sizeof(float))));
    if (memory == nullptr) return false;
    for (int64_t n = 0; n < p.batch; ++n)
        fill_factors(p, p.gate + n * kBands * p.gates, memory + n * kBands * p.factor_channels);
    p.factors = memory;
    p.partials = sums ? memory + count : nullptr;
    return true;
}

// The sum of one kind for a channel of an image, over the items that hold a part of it.
template <class P>
double sum_of(const P& p, const Split& split, int64_t n, int64_t c, int kind) {
    const int64_t size = partial_size(p), plane = p.channels_last ? n : n * p.channels + c;
    const float* partial = p.partials + plane * split.parts * size + (p.channels_last ? kind * p.channels + c : kind);
    double sum = 0;
    for (int64_t part = 0; part < split.parts; ++part) sum += partial[part * size];
    return sum;
}

// Gradients of the gates of one image.
void finish_gates(const Params& p, const Split& split, int64_t n) {
    const auto write = [&](int64_t gate, const double* sums) {
        for (int band = 0; band < kBands; ++band) {
            double grad = .5 * sums[band];
            for (int pixel = 0; pixel < kBands && !p.up; ++pixel)
                grad = (pixel ? grad : 0) + kHalfSigns[band][pixel] * sums[pixel];
            p.gate_grad[(n * kBands + band) * p.gates + gate] = static_cast<float>(grad);
        }
    };
    double all[kBands] = {};
    for (int64_t c = 0; c < p.channels; ++c) {
        double own[kBands];
        for (int kind = 0; kind < kBands; ++kind) all[kind] += own[kind] = sum_of(p, split, n, c, kind);
        if (p.gates > 1) write(c, own);
    }
    if (p.gates == 1) write(0, all);
}

int64_t bytes_of(DType dtype, int64_t elements) { return elements * (dtype == DType::float32 ? 4 : 2); }

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

bool forward(Isa isa, Params p) {
    const int64_t written = p.batch * p.channels * (p.up ? p.height * p.width : block_rows(p) * block_columns(p));
    if (written == 0) return true;
    const Split split = split_of(p, block_rows(p), 4 * block_columns(p));
    if (!prepare(p, split, false)) return false;
    p.past_caches = bytes_of(p.dtype, written) >= kLongStream;
    const KernelSet& set = kernel_set(isa);
    each_item(split, [&](int64_t item) { set.forward(p, item); });
    return true;
}

bool backward(Isa isa, Params p) {
    if (p.batch * p.channels == 0) return true;
    const Split split = split_of(p, block_rows(p), 4 * block_columns(p));
    if (!prepare(p, split, p.gate_grad != nullptr)) return false;
    p.past_caches = bytes_of(p.dtype, p.batch * p.channels * p.height * p.width) >= kLongStream;
    const KernelSet& set = kernel_set(isa);
    each_item(split, [&](int64_t item) { set.backward(p, item); });
    for (int64_t n = 0; n < p.batch && p.gate_grad; ++n) finish_gates(p, split, n);
    return true;
}

bool pool(Isa isa, PoolParams p) {
    if (p.batch * p.channels == 0) return true;
    const Split split = split_of(p, p.height, p.width);
    p.item_rows = split.item_rows;
    p.partials =
        static_cast<float*>(thread_scratch(split.items * partial_size(p) * static_cast<int64_t>(sizeof(float))));
    if (p.partials == nullptr) return false;
    const KernelSet& set = kernel_set(isa);
    each_item(split, [&](int64_t item) { set.pool(p, item); });
    for (int64_t n = 0; n < p.batch; ++n)
        for (int64_t c = 0; c < p.channels; ++c)
            p.mean[n * p.channels + c] =
                static_cast<float>(sum_of(p, split, n, c, 0) / static_cast<double>(p.height * p.width));
    return true;
}

}  // namespace wavelet_gate
}  // namespace pdn
