// Stand-alone check and timing of csrc/wavelet_gate, without torch:
//   g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno [ISA flags] tests/native/wavelet_gate_harness.cpp -o harness
//   ./harness                                            all cases against double precision; exit 1 on a failure
//   ./harness time BATCH CHANNELS HEIGHT WIDTH [REPEATS]  best microseconds of each kernel, one thread
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/wavelet_gate/pixels.inl"
#include "../../csrc/wavelet_gate/planes.inl"
#include "aligned.h"

using namespace pdn;
using namespace pdn::wavelet_gate;

namespace {

struct Case {
    const char* why;
    DType dtype;
    bool channels_last, per_channel, past_caches;
    int64_t batch, channels, height, width, item_rows;
};

const Case kCases[] = {
    {"whole vectors", DType::float32, false, false, false, 2, 3, 8, 64, 2},
    {"past the caches", DType::float32, false, true, true, 1, 3, 6, 128, 3},
    {"a vector and a bit", DType::float32, false, true, false, 2, 3, 6, 38, 2},
    {"odd rows and columns", DType::float32, false, true, false, 2, 3, 7, 39, 2},
    {"narrower than a vector", DType::float32, false, false, false, 3, 5, 5, 6, 1},
    {"half a vector", DType::float32, false, false, false, 1, 2, 4, kWidth, 1},
    {"one pixel", DType::float32, false, true, false, 2, 3, 1, 1, 1},
    {"one column", DType::float32, false, true, false, 2, 3, 5, 1, 4},
    {"long sums", DType::float32, false, false, false, 1, 1, 64, 1030, 8},
    {"bfloat16", DType::bfloat16, false, true, false, 2, 3, 7, 43, 2},
    {"float16", DType::float16, false, false, false, 2, 3, 6, 70, 2},
    {"adjacent channels", DType::float32, true, false, false, 2, 32, 6, 8, 2},
    {"adjacent channels past the caches", DType::float32, true, true, true, 1, 48, 5, 6, 2},
    {"adjacent channels, odd", DType::float32, true, true, false, 2, 19, 7, 5, 2},
    {"adjacent channels, few", DType::float32, true, true, false, 2, 3, 5, 9, 1},
    {"adjacent channels, one pixel", DType::float32, true, true, false, 2, 3, 1, 1, 1},
    {"adjacent channels, long sums", DType::float32, true, false, false, 1, 2, 40, 61, 10},
    {"adjacent channels, bfloat16", DType::bfloat16, true, true, false, 2, 21, 5, 6, 2},
    {"adjacent channels, float16", DType::float16, true, false, false, 2, 40, 4, 7, 2},
};

// Images as a kernel reads or writes them.
struct Image {
    Values<float> wide;
    Values<uint16_t> narrow;
    int64_t channels, height, width;
    bool channels_last;
    DType dtype;

    Image(const Case& c, int64_t batch_channels, int64_t rows, int64_t columns)
        : channels(batch_channels), height(rows), width(columns), channels_last(c.channels_last), dtype(c.dtype) {
        const auto count = static_cast<size_t>(c.batch * channels * height * width);
        if (dtype == DType::float32)
            wide.assign(count, NAN);
        else
            narrow.assign(count, 0x7fff);
    }
    View view() {
        void* data = dtype == DType::float32 ? static_cast<void*>(wide.data()) : narrow.data();
        const int64_t n = channels * height * width;
        if (channels_last) return {data, n, 1, width * channels, channels};
        return {data, n, height * width, width, 1};
    }
    size_t place(int64_t n, int64_t c, int64_t h, int64_t w) const {
        const int64_t image = n * channels * height * width;
        return static_cast<size_t>(image +
                                   (channels_last ? (h * width + w) * channels + c : (c * height + h) * width + w));
    }
    double at(int64_t n, int64_t c, int64_t h, int64_t w) const {
        const size_t i = place(n, c, h, w);
        if (dtype == DType::float32) return wide[i];
        return dtype == DType::bfloat16 ? from_bf16(narrow[i]) : from_fp16({narrow[i]});
    }
    void fill(std::mt19937& generator) {
        std::normal_distribution<float> normal;
        for (float& x : wide) x = normal(generator);
        for (uint16_t& x : narrow) {
            const float value = normal(generator);
            x = dtype == DType::bfloat16 ? to_bf16(value) : to_fp16(value).bits;
        }
    }
};

constexpr int kSigns[kBands][kBands] = {{1, 1, 1, 1}, {1, -1, 1, -1}, {1, 1, -1, -1}, {1, -1, -1, 1}};

// One direction of one case: images, gates, and what the dispatcher would make of them.
struct Problem {
    const Case& c;
    bool up;
    int64_t rows, columns, gates, items;
    Image fine, coarse;
    Values<float> gate, offset, factors, partials;

    Problem(const Case& c, bool up)
        : c(c),
          up(up),
          rows((c.height + 1) / 2),
          columns((c.width + 1) / 2),
          gates(c.per_channel ? c.channels : 1),
          fine(c, c.channels, c.height, c.width),
          coarse(c, (up ? 4 : 1) * c.channels, rows, columns) {
        std::mt19937 generator(5);
        std::uniform_real_distribution<float> uniform(0.f, 1.f);
        fine.fill(generator), coarse.fill(generator);
        for (int64_t i = 0; i < c.batch * kBands * gates; ++i) gate.push_back(uniform(generator));
        for (int64_t i = 0; i < c.batch * kBands * c.channels; ++i) offset.push_back(uniform(generator));
        const int64_t own = c.channels_last ? c.channels : gates;
        factors.assign(static_cast<size_t>(c.batch * kBands * own), 0.f);
        for (int64_t n = 0; n < c.batch; ++n)
            for (int k = 0; k < kBands; ++k)
                for (int64_t i = 0; i < own; ++i)
                    for (int band = 0; band < kBands; ++band) {
                        const double sign = up ? (band == k ? .5 : 0) : .5 * kSigns[band][k];
                        factors[static_cast<size_t>((n * kBands + k) * own + i)] +=
                            static_cast<float>(sign * gate_at(n, band, i));
                    }
        items = c.batch * ((rows + c.item_rows - 1) / c.item_rows) * (c.channels_last ? 1 : c.channels);
    }
    double gate_at(int64_t n, int band, int64_t channel) const {
        return gate[static_cast<size_t>((n * kBands + band) * gates + (gates > 1 ? channel : 0))];
    }
    Params params(Image& out) {
        Params p{};
        p.dtype = c.dtype, p.up = up, p.channels_last = c.channels_last, p.past_caches = c.past_caches;
        p.batch = c.batch, p.channels = c.channels, p.height = c.height, p.width = c.width;
        p.fine = fine.view(), p.coarse = coarse.view(), p.out = out.view();
        p.gate = gate.data(), p.gates = gates;
        p.factors = factors.data(), p.factor_channels = c.channels_last ? c.channels : gates;
        p.item_rows = c.item_rows;
        return p;
    }
    // Row and column of pixel k of a block, or those of the last pixel if it lies beyond.
    int64_t row(int64_t i, int k) const { return std::min(2 * i + k / 2, c.height - 1); }
    int64_t column(int64_t j, int k) const { return std::min(2 * j + k % 2, c.width - 1); }
    bool inside(int64_t i, int64_t j, int k) const { return 2 * i + k / 2 < c.height && 2 * j + k % 2 < c.width; }
};

template <class Body>
void with_elements(DType dtype, const Body& body) {
    if (dtype == DType::float32)
        body(static_cast<float*>(nullptr));
    else if (dtype == DType::bfloat16)
        body(static_cast<bf16*>(nullptr));
    else
        body(static_cast<fp16*>(nullptr));
}

void forward(const Params& p, int64_t item) {
    with_elements(p.dtype, [&](auto* t) {
        if (p.channels_last)
            p.up ? up_pixels(p, item, t) : down_pixels(p, item, t);
        else
            p.up ? up_planes(p, item, t) : down_planes(p, item, t);
    });
}

template <bool Sums, bool Out>
void backward(const Params& p, int64_t item) {
    with_elements(p.dtype, [&](auto* t) {
        if (p.channels_last)
            p.up ? up_pixels_backward<Sums, Out>(p, item, t) : down_pixels_backward<Sums, Out>(p, item, t);
        else
            p.up ? up_planes_backward<Sums, Out>(p, item, t) : down_planes_backward<Sums, Out>(p, item, t);
    });
}

template <class Body>
void each_block(const Problem& q, const Body& body) {
    for (int64_t n = 0; n < q.c.batch; ++n)
        for (int64_t ch = 0; ch < q.c.channels; ++ch)
            for (int64_t i = 0; i < q.rows; ++i)
                for (int64_t j = 0; j < q.columns; ++j) body(n, ch, i, j);
}

double unit(DType dtype) { return dtype == DType::float32 ? 6e-8 : dtype == DType::bfloat16 ? 4e-3 : 5e-4; }

double forward_error(const Case& c, bool up) {
    Problem q(c, up);
    Image out(c, c.channels, up ? c.height : q.rows, up ? c.width : q.columns);
    const Params p = q.params(out);
    for (int64_t item = 0; item < q.items; ++item) forward(p, item);
    double worst = 0;
    const auto compare = [&](double got, double exact) {
        worst = std::max(worst, std::fabs(got - exact)), worst += got != got ? 1e9 : 0;
    };
    each_block(q, [&](int64_t n, int64_t ch, int64_t i, int64_t j) {
        double value = 0;
        for (int band = 0; band < kBands; ++band)
            for (int k = 0; k < kBands; ++k)
                value += .5 * kSigns[band][k] * q.gate_at(n, band, ch) * q.fine.at(n, ch, q.row(i, k), q.column(j, k));
        if (!up) compare(out.at(n, ch, i, j), value);
        for (int k = 0; k < kBands && up; ++k) {
            if (!q.inside(i, j, k)) continue;
            double pixel = 0;
            for (int band = 0; band < kBands; ++band)
                pixel += .5 * kSigns[band][k] * q.gate_at(n, band, ch) * q.coarse.at(n, band * c.channels + ch, i, j);
            compare(out.at(n, ch, 2 * i + k / 2, 2 * j + k % 2), pixel);
        }
    });
    return worst / unit(c.dtype) / 16;
}

// The four sums of a channel, over all items, as the dispatcher reads them.
double sum_of(const Problem& q, const Params& p, int64_t n, int64_t ch, int kind) {
    const int64_t parts = ceil_div(q.rows, p.item_rows), size = partial_size(p);
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t item = (p.channels_last ? n : n * q.c.channels + ch) * parts + part;
        sum += q.partials[static_cast<size_t>(item * size + (p.channels_last ? kind * q.c.channels + ch : kind))];
    }
    return sum;
}

double backward_error(const Case& c, bool up, bool with_offset) {
    Problem q(c, up);
    Image out(c, up ? 4 * c.channels : c.channels, up ? q.rows : c.height, up ? q.columns : c.width), apart = out;
    Params p = q.params(out);
    p.offset = with_offset ? q.offset.data() : nullptr;
    q.partials.assign(static_cast<size_t>(q.items * partial_size(p)), NAN);
    p.partials = q.partials.data();
    for (int64_t item = 0; item < q.items; ++item) backward<true, true>(p, item);
    const Values<float> together = q.partials;
    std::fill(q.partials.begin(), q.partials.end(), NAN);
    for (int64_t item = 0; item < q.items; ++item) backward<true, false>(p, item);
    Params other = p;
    other.out = apart.view(), other.partials = nullptr;
    for (int64_t item = 0; item < q.items; ++item) backward<false, true>(other, item);
    if (out.narrow != apart.narrow || out.wide != apart.wide) return 1e9;  // NaN does not equal itself either
    std::vector<double> grad(static_cast<size_t>(c.batch * out.channels * out.height * out.width), 0.0);
    std::vector<double> sums(static_cast<size_t>(c.batch * c.channels * kBands), 0.0), sizes = sums;
    each_block(q, [&](int64_t n, int64_t ch, int64_t i, int64_t j) {
        for (int k = 0; k < kBands; ++k) {
            double own = 0, term = 0;
            if (up) {
                for (int pixel = 0; pixel < kBands; ++pixel)
                    if (q.inside(i, j, pixel))
                        own += kSigns[k][pixel] * q.fine.at(n, ch, 2 * i + pixel / 2, 2 * j + pixel % 2);
                term = own * q.coarse.at(n, k * c.channels + ch, i, j);
                grad[out.place(n, k * c.channels + ch, i, j)] += .5 * q.gate_at(n, k, ch) * own;
            } else {
                for (int band = 0; band < kBands; ++band) own += .5 * kSigns[band][k] * q.gate_at(n, band, ch);
                const double g = q.coarse.at(n, ch, i, j);
                term = g * q.fine.at(n, ch, q.row(i, k), q.column(j, k));
                grad[out.place(n, ch, q.row(i, k), q.column(j, k))] += own * g;
            }
            sums[static_cast<size_t>((n * c.channels + ch) * kBands + k)] += term;
            sizes[static_cast<size_t>((n * c.channels + ch) * kBands + k)] += std::fabs(term);
        }
    });
    double worst = 0;
    const auto note = [&](double error) { worst = error <= worst ? worst : error == error ? error : 1e9; };
    for (int64_t n = 0; n < c.batch; ++n) {
        for (int64_t ch = 0; ch < out.channels; ++ch)
            for (int64_t h = 0; h < out.height; ++h)
                for (int64_t w = 0; w < out.width; ++w) {
                    const double add = with_offset ? q.offset[static_cast<size_t>(n * out.channels + ch)] : 0;
                    note(std::fabs(out.at(n, ch, h, w) - add - grad[out.place(n, ch, h, w)]) / unit(c.dtype) / 16);
                }
        for (int64_t ch = 0; ch < c.channels; ++ch)
            for (int k = 0; k < kBands; ++k) {
                const auto at = static_cast<size_t>((n * c.channels + ch) * kBands + k);
                note(std::fabs(sum_of(q, p, n, ch, k) - sums[at]) / (sizes[at] + 1e-3) / 2e-6);
            }
    }
    return worst;
}

double pool_error(const Case& c) {
    Problem q(c, false);
    PoolParams p{};
    p.dtype = c.dtype, p.channels_last = c.channels_last;
    p.batch = c.batch, p.channels = c.channels, p.height = c.height, p.width = c.width;
    p.input = q.fine.view(), p.item_rows = c.item_rows;
    const int64_t parts = ceil_div(c.height, c.item_rows), size = partial_size(p);
    const int64_t items = c.batch * parts * (c.channels_last ? 1 : c.channels);
    Values<float> partials(static_cast<size_t>(items * size), NAN);
    p.partials = partials.data();
    for (int64_t item = 0; item < items; ++item)
        with_elements(c.dtype, [&](auto* t) { c.channels_last ? pool_pixels(p, item, t) : pool_planes(p, item, t); });
    double worst = 0;
    for (int64_t n = 0; n < c.batch; ++n)
        for (int64_t ch = 0; ch < c.channels; ++ch) {
            double got = 0, exact = 0;
            for (int64_t part = 0; part < parts; ++part)
                got += partials[static_cast<size_t>(
                    ((c.channels_last ? n : n * c.channels + ch) * parts + part) * size + (c.channels_last ? ch : 0))];
            for (int64_t h = 0; h < c.height; ++h)
                for (int64_t w = 0; w < c.width; ++w) exact += q.fine.at(n, ch, h, w);
            const double error = std::fabs(got - exact) / (2e-6 * static_cast<double>(c.height * c.width));
            worst = error <= worst ? worst : error == error ? error : 1e9;
        }
    return worst;
}

int check() {
    int failures = 0;
    const auto report = [&](const char* op, const char* why, double error) {  // in units of what is allowed
        const bool fine = error <= 1;
        failures += !fine;
        std::printf("%s %-14s %-36s %.2g\n", fine ? "ok  " : "FAIL", op, why, error);
    };
    for (const Case& c : kCases) {
        report("down", c.why, forward_error(c, false));
        report("up", c.why, forward_error(c, true));
        for (const bool with_offset : {false, true}) {
            report("down backward", c.why, backward_error(c, false, with_offset));
            report("up backward", c.why, backward_error(c, true, with_offset));
        }
        report("pool", c.why, pool_error(c));
    }
    std::printf("width %d: %d failed\n", kWidth, failures);
    return failures != 0;
}

double thread_microseconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return 1e6 * static_cast<double>(now.tv_sec) + 1e-3 * static_cast<double>(now.tv_nsec);
}

template <class Body>
void measure(const char* what, int repeats, double bytes, const Body& body) {
    double best = 1e30;
    for (int i = 0; i < repeats; ++i) {
        const double start = thread_microseconds();
        body();
        best = std::min(best, thread_microseconds() - start);
    }
    std::printf("  %-22s best %9.1f us, %6.1f GB/s\n", what, best, bytes / best * 1e-3);
}

void time_case(Case c, int repeats) {
    const int64_t row = 2 * c.width * (c.channels_last ? c.channels : 1);
    c.item_rows = std::max<int64_t>(1, (c.channels_last ? std::max<int64_t>(16384, 512 * c.channels) : 16384) / row);
    c.item_rows = std::min(c.item_rows, (c.height + 1) / 2);
    std::printf("%s, %s, %s\n", c.channels_last ? "adjacent channels" : "adjacent columns",
                c.dtype == DType::float32 ? "float32" : "bfloat16", c.past_caches ? "past the caches" : "plain stores");
    const double image =
        static_cast<double>(c.batch * c.channels * c.height * c.width) * (c.dtype == DType::float32 ? 4 : 2);
    for (const bool up : {false, true}) {
        Problem q(c, up);
        Image out(c, c.channels, up ? c.height : q.rows, up ? c.width : q.columns);
        Image gradient(c, up ? 4 * c.channels : c.channels, up ? q.rows : c.height, up ? q.columns : c.width);
        Params p = q.params(out);
        const double read = up ? image : image / 4;
        measure(up ? "up" : "down", repeats, up ? 2 * image : 1.25 * image, [&] {
            for (int64_t item = 0; item < q.items; ++item) forward(p, item);
        });
        p.out = gradient.view();
        measure("  input's gradient", repeats, read + image, [&] {
            for (int64_t item = 0; item < q.items; ++item) backward<false, true>(p, item);
        });
        q.partials.assign(static_cast<size_t>(q.items * partial_size(p)), 0.f);
        p.partials = q.partials.data();
        measure("  gates' gradient", repeats, read + image, [&] {
            for (int64_t item = 0; item < q.items; ++item) backward<true, false>(p, item);
        });
        measure("  both", repeats, read + 2 * image, [&] {
            for (int64_t item = 0; item < q.items; ++item) backward<true, true>(p, item);
        });
    }
}

int time_all(int64_t batch, int64_t channels, int64_t height, int64_t width, int repeats) {
    for (const bool channels_last : {false, true})
        for (const DType dtype : {DType::float32, DType::bfloat16})
            for (const bool past_caches : {false, true})
                if (dtype == DType::float32 || !past_caches)
                    time_case({"timing", dtype, channels_last, false, past_caches, batch, channels, height, width, 1},
                              repeats);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string mode = argc > 1 ? argv[1] : "";
    const auto number = [&](int i, int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
    if (mode == "time")
        return time_all(number(2, 8), number(3, 256), number(4, 64), number(5, 64), static_cast<int>(number(6, 30)));
    return check();
}
