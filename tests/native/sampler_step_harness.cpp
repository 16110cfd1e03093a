// Stand-alone check and timing of csrc/sampler_step, without torch:
//   g++ -std=c++20 -O3 -pthread -ffp-contract=fast -fno-math-errno [ISA flags] tests/native/sampler_step_harness.cpp
//   ./a.out                                     all cases against double precision; exit 1 on a failure
//   ./a.out time ELEMENTS ROW PLACE [THREADS [SETS]]  microseconds of a step and GB/s of what the row counts, the sets
//                                               of buffers taken in turn; ROW ddim, 2m or noise; PLACE out, in (place),
//                                               past (in place, past the caches)
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/sampler_step/kernel.inl"
#include "aligned.h"
#include "clock.h"

using namespace pdn;
using namespace pdn::sampler_step;

namespace {

struct Case {
    const char* why;
    DType state = DType::float32, model = DType::float32, input = DType::float32;
    int64_t batch = 2, size = 300, per_sample = 1;  // units of a sample; 0: one row for everything
    int slots = 0, copies = 0;
    bool guided = false, base = false, given = false, keyed = false, threshold = false, learned = false;
    bool in_place = false, kept = false, preview = false, past_caches = false;
    Statistics statistics = Statistics::none;
};

const DType kF = DType::float32, kB = DType::bfloat16, kH = DType::float16;
const Case kCases[] = {
    {.why = "one element", .batch = 1, .size = 1, .per_sample = 0},
    {.why = "less than a vector", .size = 3},
    {.why = "a tile and one", .size = 65, .in_place = true},
    {.why = "two chunks", .size = kChunk + 77, .slots = 2, .statistics = Statistics::dots},
    {.why = "a unit amid a chunk", .size = 3 * 1500, .per_sample = 3, .keyed = true},
    {.why = "units of five", .size = 35, .per_sample = 7, .keyed = true, .statistics = Statistics::moments},
    {.why = "noise, whole blocks", .size = 1024, .keyed = true, .in_place = true},
    {.why = "noise, last block cut", .size = 1000, .keyed = true, .learned = true},
    {.why = "noise from outside", .size = 200, .given = true},
    {.why = "guided, threshold", .guided = true, .threshold = true, .preview = true},
    {.why = "bfloat16 beside float32", .state = kF, .model = kB, .input = kB, .copies = 2, .guided = true},
    {.why = "float16 beside bfloat16", .state = kH, .model = kB, .input = kF, .copies = 3, .in_place = true},
    {.why = "bfloat16", .state = kB, .model = kB, .input = kB, .slots = 3, .copies = 1, .keyed = true, .learned = true},
    {.why = "past the caches",
     .size = 2048,
     .slots = 1,
     .copies = 1,
     .kept = true,
     .preview = true,
     .past_caches = true},
    {.why = "everything",
     .batch = 3,
     .size = 4 * 1111,
     .per_sample = 4,
     .slots = 6,
     .copies = 2,
     .guided = true,
     .base = true,
     .keyed = true,
     .threshold = true,
     .learned = true,
     .in_place = true,
     .kept = true,
     .preview = true,
     .statistics = Statistics::dots},
    {.why = "everything, 16 bits",
     .state = kH,
     .model = kF,
     .input = kB,
     .batch = 2,
     .size = 777,
     .slots = 6,
     .copies = 2,
     .guided = true,
     .base = true,
     .given = true,
     .in_place = true,
     .kept = true,
     .preview = true,
     .statistics = Statistics::moments},
};

int64_t bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// A tensor in memory of exactly its size.
struct Data {
    DType dtype = DType::float32;
    Values<unsigned char> bytes;

    void make(DType type, int64_t count, unsigned seed) {
        dtype = type, bytes.resize(static_cast<size_t>(count * bytes_of(type)));
        std::mt19937 generator(seed);
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < count; ++i) set(i, normal(generator));
    }
    void set(int64_t i, float x) {
        const bf16 b = to_bf16(x);
        const fp16 h = to_fp16(x);
        const void* from = dtype == DType::float32    ? static_cast<const void*>(&x)
                           : dtype == DType::bfloat16 ? static_cast<const void*>(&b)
                                                      : static_cast<const void*>(&h);
        std::memcpy(bytes.data() + i * bytes_of(dtype), from, static_cast<size_t>(bytes_of(dtype)));
    }
    double get(int64_t i) const {
        const unsigned char* at = bytes.data() + i * bytes_of(dtype);
        float x;
        uint16_t half;
        if (dtype == DType::float32) return std::memcpy(&x, at, 4), x;
        std::memcpy(&half, at, 2);
        return dtype == DType::bfloat16 ? from_bf16(half) : from_fp16({half});
    }
    void* data() { return bytes.empty() ? nullptr : bytes.data(); }
};

struct Problem {
    Case c;
    Params p{};
    Data sample, output, unconditional, base, noise, history, out, kept, preview, input;
    std::vector<float> threshold, table;
    std::vector<int64_t> rows, keys;
    std::vector<double> sums;

    explicit Problem(const Case& given) : c(given) {
        const int64_t count = c.batch * c.size, wide = c.learned ? 2 : 1;
        p.state = c.state, p.model = c.model, p.input_dtype = c.input, p.batch = c.batch, p.size = c.size;
        p.step = 0xfffffff0u, p.learned_variance = c.learned, p.statistics = c.statistics, p.slots = c.slots;
        p.past_caches = c.past_caches;
        const auto make = [&](Data& data, bool wanted, DType dtype, int64_t elements, unsigned seed) {
            if (wanted) data.make(dtype, elements, seed);
            return data.data();
        };
        p.sample = make(sample, true, c.state, count, 1);
        p.output = make(output, true, c.model, (count + 8) * wide, 2);  // samples lie apart
        p.unconditional = make(unconditional, c.guided, c.model, count * wide, 3);
        p.output_stride = (c.size + 8 / c.batch) * wide, p.unconditional_stride = c.size * wide;
        p.base = make(base, c.base, c.state, count, 4), p.noise = make(noise, c.given, c.state, count, 5);
        p.history = make(history, c.slots > 0, c.state, count * c.slots, 6);
        p.out = c.in_place ? sample.data() : make(out, true, c.state, count, 7);
        p.kept = !c.kept ? nullptr : c.in_place && c.base ? base.data() : make(kept, true, c.state, count, 8);
        p.preview = make(preview, c.preview, c.state, count, 9);
        p.model_input = make(input, c.copies > 0, c.input, count * c.copies, 10), p.copies = c.copies;
        for (int64_t b = 0; b < c.batch; ++b) {
            threshold.push_back(0.5f + static_cast<float>(b));
            keys.push_back(-5 * b), keys.push_back((b << 33) + 1);
        }
        p.threshold = c.threshold ? threshold.data() : nullptr, p.keys = c.keyed ? keys.data() : nullptr;
        p.groups = c.per_sample == 0 ? 1 : c.batch * c.per_sample;
        std::mt19937 generator(11);
        std::uniform_real_distribution<float> uniform(-0.9f, 0.9f);
        p.table_rows = p.groups;
        for (int64_t g = 0; g < p.groups; ++g) {
            rows.push_back(p.groups - 1 - g);
            for (int k = 0; k < kRowWidth; ++k) table.push_back((k + g) % 5 == 0 ? 0.f : uniform(generator));
            float* row = table.data() + g * kRowWidth;
            row[kClip] = g % 2 ? 0.7f : INFINITY;
            row[kSlot] = static_cast<float>(g % (c.slots + 1) - 1);
            if (!c.guided) row[kGuidance] = NAN;  // nothing to guide
        }
        p.rows = rows.data(), p.table = table.data();
        sums.assign(static_cast<size_t>(units(p) * std::max(sum_count(p), 1)), 0);
    }

    int64_t length() const { return c.size / std::max<int64_t>(c.per_sample, 1); }

    // In double, from the generator's words.
    double normal(int64_t b, int64_t column) const {
        const NoiseRow row = noise_row(keys[static_cast<size_t>(2 * b)], keys[static_cast<size_t>(2 * b + 1)], p.step);
        const int64_t counter = column / kNoiseBlock * kNoiseLanes + column % kNoiseLanes;
        const PhiloxWords words = philox(static_cast<uint32_t>(counter), row);
        const int64_t place = column / kNoiseLanes % 4;
        const double radius = std::sqrt(-2 * std::log((words.v[place / 2 * 2] + 0.5) / 4294967296.));
        const double angle = static_cast<int32_t>(words.v[place / 2 * 2 + 1]) * (M_PI / 2147483648.);
        return radius * (place % 2 ? std::sin(angle) : std::cos(angle));
    }
};

// What a step makes of one element, before anything is written.
struct Exact {
    double m, next, kept, clean, slots[kSlots];
    bool keeps;
};

Exact exact(const Problem& of, int64_t b, int64_t column) {
    const Params& p = of.p;
    const int64_t unit = p.groups == 1 ? 0 : b * of.c.per_sample + column / of.length();
    const float* c = of.table.data() + of.rows[static_cast<size_t>(unit)] * kRowWidth;
    const int64_t at = b * p.size + column;
    const double x = of.sample.get(at), base = p.base ? of.base.get(at) : 0;
    double y = of.output.get(b * p.output_stride + column), noise = 0;
    if (p.unconditional) {
        const double u = of.unconditional.get(b * p.unconditional_stride + column);
        y = u + c[kGuidance] * (y - u);
    }
    Exact e{};
    e.clean = c[kX0Sample] * x + c[kX0Output] * y;
    const double bound = p.threshold ? of.threshold[static_cast<size_t>(b)] : c[kClip];
    e.clean = std::clamp(e.clean, -bound, bound) / (p.threshold ? bound : 1);
    e.m = c[kMSample] * x + c[kMOutput] * y + c[kMX0] * e.clean;
    e.next = c[kSample] * x + c[kBase] * base + c[kOutput] * y + c[kM] * e.m;
    for (int j = 0; j < p.slots; ++j) {
        const double h = e.slots[j] = of.history.get(j * p.batch * p.size + at);
        e.next += c[kHistory + j] * h, e.kept += c[kKeptHistory + j] * h;
    }
    if (p.noise) noise = of.noise.get(at);
    if (!p.noise && p.keys) noise = of.normal(b, column);
    if (p.learned_variance) {
        const double v = of.output.get(b * p.output_stride + p.size + column);
        noise *= std::exp(c[kLogSmall] + (v + 1) / 2 * (c[kLogLarge] - c[kLogSmall]));
    }
    e.next += c[kNoise] * noise;
    e.kept += c[kKeptSample] * x + c[kKeptBase] * base + c[kKeptM] * e.m + c[kKeptOut] * e.next;
    e.keeps = any_column(c, kKeptSample, kRowWidth - kKeptSample);
    return e;
}

// In pieces and order unlike those of the dispatcher.
bool run(Problem& of) {
    const Params& p = of.p;
    bool finite = true;
    for (int64_t unit = units(p); unit-- > 0;) {
        const int64_t per_sample = units(p) / p.batch, begin = unit % per_sample * of.length();
        for (int64_t first = begin; first < begin + of.length();) {
            const int64_t end = std::min(begin + of.length(), (first / kChunk + 1) * kChunk);
            double sums[kMostSums] = {};
            finite &= chunk(p, unit / per_sample, p.rows[p.groups == 1 ? 0 : unit], first, end - first, sums);
            for (int k = 0; k < sum_count(p); ++k) of.sums[static_cast<size_t>(unit * sum_count(p) + k)] += sums[k];
            first = end;
        }
    }
    return finite;
}

bool check(const Case& c) {
    Problem problem(c);
    const Params& p = problem.p;
    std::vector<Exact> wanted;
    for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t v = 0; v < c.size; ++v) wanted.push_back(exact(problem, b, v));
    Problem before(c);
    bool right = run(problem);
    double worst = 0;
    const auto compare = [&](const Data& data, int64_t at, double value) {
        const double rounding = data.dtype == kF ? 1.2e-6 : data.dtype == kB ? 4e-3 : 5e-4;
        worst = std::max(worst, std::fabs(data.get(at) - value) / (rounding * std::max(1., std::fabs(value))));
    };
    for (int64_t at = 0; at < c.batch * c.size; ++at) {
        const Exact& e = wanted[static_cast<size_t>(at)];
        const int64_t unit = p.groups == 1 ? 0 : at / problem.length();
        const float* row = problem.table.data() + problem.rows[static_cast<size_t>(unit)] * kRowWidth;
        compare(c.in_place ? problem.sample : problem.out, at, e.next);
        if (c.preview) compare(problem.preview, at, e.clean);
        for (int j = 0; j < c.slots; ++j)
            compare(problem.history, j * c.batch * c.size + at, row[kSlot] == static_cast<float>(j) ? e.m : e.slots[j]);
        for (int r = 0; r < c.copies; ++r) compare(problem.input, r * c.batch * c.size + at, row[kInputScale] * e.next);
        if (!c.kept) continue;
        const bool onto_base = c.in_place && c.base;
        const Data& old = onto_base ? before.base : before.kept;
        compare(onto_base ? problem.base : problem.kept, at, e.keeps ? e.kept : old.get(at));
    }
    for (int64_t unit = 0; unit < units(p); ++unit)
        for (int k = 0; k < sum_count(p); ++k) {
            double sum = 0, magnitude = 0;
            const int64_t length = c.batch * c.size / units(p);
            for (int64_t at = unit * length; at < (unit + 1) * length; ++at) {
                const Exact& e = wanted[static_cast<size_t>(at)];
                const double term = c.statistics == Statistics::moments ? (k ? e.next * e.next : e.next)
                                                                        : e.m * (k ? e.slots[k - 1] : e.m);
                sum += term, magnitude += std::fabs(term);
            }
            const double error = problem.sums[static_cast<size_t>(unit * sum_count(p) + k)] - sum;
            worst = std::max(worst, std::fabs(error) / (2e-6 * magnitude + 1e-30));
        }
    right = right && worst < 1;
    std::printf("%-28s %s  %.2f of what is allowed\n", c.why, right ? "ok " : "BAD", worst);
    return right;
}

// Normal numbers of whole blocks and of the words where logarithms and angles are hardest.
bool check_normal() {
    double worst = 0;
    const uint32_t words[] = {0u,          1u,          2u,          1000u,       0x20000000u, 0x1fffffffu, 0x3fffffffu,
                              0x40000000u, 0x5fffffffu, 0x7fffffffu, 0x80000000u, 0x80000001u, 0xb504f332u, 0xb504f334u,
                              0xdfffffffu, 0xe0000000u, 0xfffffff0u, 0xfffffffeu, 0xffffffffu};
    for (const uint32_t even : words)
        for (const uint32_t odd : words) {
            vf cosine, sine;
            turn(normal_radius(vu{} + even), vu{} + odd, cosine, sine);
            const double r = std::sqrt(-2 * std::log1p((even + 0.5) / 4294967296. - 1));
            const double angle = static_cast<int32_t>(odd) * (M_PI / 2147483648.);
            for (const double error : {cosine[0] - r * std::cos(angle), sine[0] - r * std::sin(angle)})
                worst = std::max(worst, std::fabs(error) / std::max(1., r));
        }
    std::printf("%-28s %s  %.2e\n", "hard words", worst < 4e-7 ? "ok " : "BAD", worst);
    return worst < 4e-7;
}

// A coefficient of 0 leaves its tensor unread, and what is not finite is told.
bool check_unread() {
    Case c{.why = "unread", .size = 100, .per_sample = 0, .slots = 2, .base = true};
    Problem problem(c);
    for (float& x : problem.table) x = 0.f;
    problem.table[kSample] = 1.f, problem.table[kClip] = 1.f, problem.table[kSlot] = -1.f;
    for (Data* data : {&problem.output, &problem.base, &problem.history})
        for (size_t i = 0; i < data->bytes.size() / 4; ++i) data->set(static_cast<int64_t>(i), NAN);
    bool right = run(problem);
    for (int64_t i = 0; i < 200; ++i) right = right && problem.out.get(i) == problem.sample.get(i);
    problem.sample.set(199, INFINITY);
    right = right && !run(problem);
    problem.table[kSample] = 0.f;
    right = right && run(problem);
    problem.table[kX0Output] = problem.table[kMX0] = 1.f;  // m alone is not finite: clipping must not hide it
    right = right && !run(problem);
    std::printf("%-28s %s\n", c.why, right ? "ok " : "BAD");
    return right;
}

void measure(int64_t elements, const std::string& kind, const std::string& place, int threads, int sets) {
    Case c{.why = "time",
           .batch = 1,
           .size = elements,
           .per_sample = 0,
           .slots = kind == "2m" ? 2 : 0,
           .keyed = kind == "noise",
           .in_place = place != "out",
           .past_caches = place == "past"};
    std::vector<std::unique_ptr<Problem>> problems;
    for (int i = 0; i < sets; ++i) {
        problems.push_back(std::make_unique<Problem>(c));
        float* row = problems.back()->table.data();
        std::fill(row, row + kRowWidth, 0.f);
        row[kSample] = 0.99f, row[kOutput] = -0.1f, row[kClip] = INFINITY, row[kSlot] = -1;
        if (c.keyed) row[kNoise] = 0.01f;
        if (c.slots) row[kMSample] = 0.9f, row[kMOutput] = 0.1f, row[kM] = 0.2f, row[kHistory] = -0.1f, row[kSlot] = 1;
        if (c.slots) row[kOutput] = 0.f;
    }
    std::vector<double> times;
    for (int round = 0; round < 10; ++round)
        for (auto& problem : problems) {
            const double begin = now();
            const auto part = [&](int index) {
                for (int64_t first = index * kChunk; first < elements; first += threads * kChunk)
                    chunk(problem->p, 0, 0, first, std::min(kChunk, elements - first), nullptr);
            };
            std::vector<std::thread> others;
            for (int t = 1; t < threads; ++t) others.emplace_back(part, t);
            part(0);
            for (std::thread& other : others) other.join();
            times.push_back(now() - begin);
        }
    std::sort(times.begin(), times.end());
    const double best = times[0], median = times[times.size() / 2];
    const double bytes = static_cast<double>(elements) * 4 * (c.slots ? 5 : 3);
    std::printf("%s %s: best %.1f us %.1f GB/s, median %.1f us %.1f GB/s, %.2f ns an element\n", kind.c_str(),
                place.c_str(), best, bytes / best * 1e-3, median, bytes / median * 1e-3,
                best * 1e3 / static_cast<double>(elements));
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 4 && std::string(argv[1]) == "time") {
        measure(std::atoll(argv[2]), argv[3], argv[4], argc > 5 ? std::atoi(argv[5]) : 1,
                argc > 6 ? std::atoi(argv[6]) : 1);
        return 0;
    }
    bool right = check_normal();
    right = check_unread() && right;
    for (const Case& c : kCases) right = check(c) && right;
    return right ? 0 : 1;
}
