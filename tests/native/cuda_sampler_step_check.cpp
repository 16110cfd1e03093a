// Runs the CUDA kernels of sampler_step on the host, lane by lane (cuda_emulator.h), against plain loops in double:
// rows, units that begin and end anywhere, dtypes, what may be missing, what must not be read, noise, sums, faults.
// Memory accesses under sanitizers, barriers by the emulator. Prints one line per case; exits 1 if any is wrong.
// clang-format off
#include "cuda_emulator.h"  // first: it stands in for CUDA
// clang-format on
#include <algorithm>

#include "../../csrc/sampler_step/cuda_kernels.cuh"

namespace {

using namespace pdn;
using namespace pdn::sampler_step;
using sampler_step::cuda::Element;
using sampler_step::cuda::Problem;

constexpr Element kF32 = Element::float32, kBF16 = Element::bfloat16, kF16 = Element::float16;

uint32_t state = 12345;
double uniform() {  // in [-1, 1)
    state = state * 1664525u + 1013904223u;
    return static_cast<int32_t>(state) / 2147483648.0;
}

// Numbers as `type` in memory that ends where the tensor does.
struct Tensor {
    Element type;
    size_t count;
    std::vector<char> memory;

    Tensor(Element t, size_t n, bool poison = false) : type(t), count(n), memory(n * pdn::cuda::bytes_of(t), '\xff') {
        for (size_t i = 0; i < n && !poison; ++i) put(i, static_cast<float>(2 * uniform()));
    }
    void* data() { return memory.data(); }
    void put(size_t i, float x) {
        if (type == kF32) {
            from_float(x, reinterpret_cast<float*>(memory.data())[i]);
        } else if (type == kBF16) {
            from_float(x, reinterpret_cast<BFloat16*>(memory.data())[i]);
        } else {
            from_float(x, reinterpret_cast<Float16*>(memory.data())[i]);
        }
    }
    double get(size_t i) const {
        if (type == kF32) return to_float(reinterpret_cast<const float*>(memory.data())[i]);
        if (type == kBF16) return to_float(reinterpret_cast<const BFloat16*>(memory.data())[i]);
        return to_float(reinterpret_cast<const Float16*>(memory.data())[i]);
    }
};

enum Noise { kNothing, kGiven, kDrawn };

struct Case {
    const char* name;
    Element state, model, input;
    int batch, units_per_sample, unit_size;  // units_per_sample 0: one row for everything
    int slots = 0, copies = 0;
    Noise noise = kNothing;
    Statistics statistics = Statistics::none;
    bool guided = false, learned = false, threshold = false, base = false, kept = false, preview = false;
    bool in_place = false;                  // out is sample, kept is base
    int gap = 4;                            // between samples of the output
    std::vector<int> zeros = {};            // columns that are 0 in every row
    bool poisoned = false, beyond = false;  // what is not to be read is NaN; a row that is not there
};

const std::vector<int> kAllKept = {22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
const std::vector<int> kOnlyOutput = {0,  1,  2,  4,  6,  8,  9,  11, 12, 16, 17, 18, 19,
                                      20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

const Case kCases[] = {
    {.name = "ddim", .state = kF32, .model = kF32, .input = kF32, .batch = 2, .units_per_sample = 0, .unit_size = 1000},
    {.name = "apart",
     .state = kF16,
     .model = kF16,
     .input = kF32,
     .batch = 2,
     .units_per_sample = 0,
     .unit_size = 1000,
     .noise = kDrawn,
     .gap = 5},
    {.name = "learned, aligned",
     .state = kBF16,
     .model = kF32,
     .input = kBF16,
     .batch = 2,
     .units_per_sample = 3,
     .unit_size = 132,
     .copies = 2,
     .noise = kDrawn,
     .statistics = Statistics::moments,
     .guided = true,
     .learned = true,
     .preview = true},
    {.name = "everything, aligned",
     .state = kF32,
     .model = kBF16,
     .input = kF16,
     .batch = 2,
     .units_per_sample = 2,
     .unit_size = 1204,
     .slots = 6,
     .copies = 3,
     .noise = kDrawn,
     .statistics = Statistics::dots,
     .guided = true,
     .learned = true,
     .threshold = true,
     .base = true,
     .kept = true,
     .preview = true,
     .in_place = true},
    {.name = "one element",
     .state = kF32,
     .model = kF32,
     .input = kF32,
     .batch = 3,
     .units_per_sample = 1,
     .unit_size = 1,
     .noise = kDrawn,
     .statistics = Statistics::moments},
    {.name = "history, in place",
     .state = kBF16,
     .model = kF32,
     .input = kBF16,
     .batch = 2,
     .units_per_sample = 0,
     .unit_size = 517,
     .slots = 6,
     .copies = 2,
     .base = true,
     .kept = true,
     .in_place = true},
    {.name = "noise, many pieces",
     .state = kF32,
     .model = kF32,
     .input = kF16,
     .batch = 2,
     .units_per_sample = 1,
     .unit_size = 2100,
     .copies = 3,
     .noise = kDrawn,
     .statistics = Statistics::moments,
     .guided = true},
    {.name = "frames",
     .state = kF16,
     .model = kBF16,
     .input = kF32,
     .batch = 2,
     .units_per_sample = 5,
     .unit_size = 300,
     .slots = 2,
     .copies = 1,
     .noise = kDrawn,
     .statistics = Statistics::dots,
     .kept = true,
     .preview = true},
    {.name = "tiny units",
     .state = kF32,
     .model = kF32,
     .input = kF32,
     .batch = 2,
     .units_per_sample = 30,
     .unit_size = 9,
     .slots = 3,
     .noise = kDrawn,
     .statistics = Statistics::dots,
     .threshold = true},
    {.name = "learned",
     .state = kF32,
     .model = kF16,
     .input = kF32,
     .batch = 2,
     .units_per_sample = 3,
     .unit_size = 130,
     .noise = kDrawn,
     .guided = true,
     .learned = true,
     .preview = true},
    {.name = "noise from outside",
     .state = kBF16,
     .model = kBF16,
     .input = kBF16,
     .batch = 1,
     .units_per_sample = 0,
     .unit_size = 700,
     .copies = 1,
     .noise = kGiven,
     .learned = true,
     .base = true},
    {.name = "not read",
     .state = kF32,
     .model = kF32,
     .input = kF32,
     .batch = 2,
     .units_per_sample = 1,
     .unit_size = 400,
     .slots = 2,
     .noise = kGiven,
     .base = true,
     .kept = true,
     .zeros = kOnlyOutput,
     .poisoned = true},
    {.name = "by x0 alone",
     .state = kF32,
     .model = kF32,
     .input = kF32,
     .batch = 3,
     .units_per_sample = 1,
     .unit_size = 200,
     .slots = 1,
     .kept = true,
     .zeros = {4, 5, 8, 10, 22}},
    {.name = "kept unwritten",
     .state = kF32,
     .model = kF32,
     .input = kF32,
     .batch = 1,
     .units_per_sample = 2,
     .unit_size = 64,
     .slots = 1,
     .kept = true,
     .zeros = kAllKept},
    {.name = "no such row",
     .state = kF32,
     .model = kF32,
     .input = kF32,
     .batch = 2,
     .units_per_sample = 1,
     .unit_size = 40,
     .slots = 1,
     .kept = true,
     .beyond = true},
};

struct HostLauncher {
    const char* operator()(void (*kernel)(Problem), int64_t x, int64_t y, int threads, int shared,
                           const Problem& p) const {
        emulator::launch(kernel, {static_cast<unsigned>(x), static_cast<unsigned>(y)}, threads, shared, p);
        return nullptr;
    }
};

double drawn(int64_t column, const int64_t* key, uint32_t step) {
    const auto counter = static_cast<uint32_t>(column / 128 * 32 + column % 32);
    const PhiloxWords words = philox(counter, noise_row(key[0], key[1], step));
    const int even = static_cast<int>(column / 64 % 2) * 2;
    const double u = (words.v[even] + 0.5) / 4294967296.,
                 angle = static_cast<int32_t>(words.v[even + 1]) * M_PI / 0x1p31;
    return std::sqrt(-2 * std::log(u)) * (column / 32 % 2 ? std::sin(angle) : std::cos(angle));
}

struct Judge {
    const char* what = nullptr;
    double worst = 0;

    void near(const char* name, double actual, double expected, double scale, Element type) {
        const double unit = type == kF32 ? 2e-6 : type == kF16 ? 1.0 / 1024 : 1.0 / 128;
        const double error = std::fabs(actual - expected) / std::fmax(1., std::fmax(scale, std::fabs(expected)));
        if (std::isnan(expected) ? std::isnan(actual) : error <= unit) return;
        if (!what) what = name, worst = error;
    }
};

bool run_case(const Case& c) {
    const int units_per_sample = std::max(c.units_per_sample, 1), size = units_per_sample * c.unit_size;
    const auto numel = static_cast<size_t>(c.batch) * size;
    const int wide = c.learned ? 2 * size : size, gap = c.gap;
    const bool p0 = c.poisoned;
    Tensor sample(c.state, numel, p0), output(c.model, static_cast<size_t>(c.batch) * (wide + gap));
    Tensor other(kF32, static_cast<size_t>(c.batch) * wide), base(c.state, numel, p0), noise(c.state, numel, p0);
    Tensor history(c.state, c.slots * numel, p0), out(c.state, numel, true), kept(c.state, numel, true);
    Tensor preview(c.state, numel, true), input(c.input, c.copies * numel, true);
    const Tensor old_sample = sample, old_base = base, old_history = history;
    std::vector<float> threshold(c.batch), table(3 * kRowWidth);
    std::vector<int64_t> keys, rows;
    for (int b = 0; b < c.batch; ++b) {
        threshold[b] = 1.f + static_cast<float>(b);
        keys.push_back(int64_t{7} << 40), keys.push_back(-b);
    }
    for (int r = 0; r < 3; ++r) {
        float* row = &table[r * kRowWidth];
        for (int i = 0; i < kRowWidth; ++i) row[i] = static_cast<float>(uniform());
        row[kGuidance] = 3.5f, row[kClip] = r ? 0.7f : INFINITY;
        row[kSlot] = c.slots ? static_cast<float>(r % (c.slots + 1) - 1) : -1.f;
        row[1 + 4 * r] = row[16 + r] = row[22 + 2 * r] = 0;
        for (int i : c.zeros) row[i] = 0;
    }
    const int units = c.units_per_sample ? c.batch * units_per_sample : 1;
    for (int u = 0; u < units; ++u) rows.push_back(u % 3);
    if (c.beyond) rows = {-1, 3};
    const int64_t step = (int64_t{5} << 32) + 77;
    int32_t faults = 1000;
    Problem p{};
    p.state = c.state, p.output_type = c.model, p.unconditional_type = kF32, p.input_type = c.input;
    p.statistics = c.statistics, p.batch = c.batch, p.size = size, p.units = c.batch * units_per_sample;
    p.sample = sample.data(), p.output = output.data(), p.output_stride = wide + gap;
    if (c.guided) p.unconditional = other.data(), p.unconditional_stride = wide;
    if (c.base) p.base = base.data();
    if (c.noise == kGiven) p.noise = noise.data();
    if (c.noise == kDrawn) p.keys = keys.data();
    if (c.slots) p.history = history.data(), p.slots = c.slots;
    if (c.threshold) p.threshold = threshold.data();
    p.table = table.data(), p.table_rows = 3, p.rows = rows.data(), p.one_row = !c.units_per_sample;
    p.step = &step, p.learned_variance = c.learned, p.faults = &faults;
    p.out = c.in_place ? sample.data() : out.data();
    if (c.kept) p.kept = c.in_place ? base.data() : kept.data();
    if (c.preview) p.preview = preview.data();
    if (c.copies) p.model_input = input.data(), p.copies = c.copies;
    divide(p);
    const int sums = sum_count(p);
    std::vector<double> statistic(p.units * sums, NAN), partials(workspace_doubles(p), NAN);
    p.statistic = statistic.data(), p.partials = partials.empty() ? nullptr : partials.data();
    sampler_step::cuda::launch_step(p, HostLauncher{});

    Judge judge;
    const Tensor& made = c.in_place ? sample : out;
    const Tensor& made_kept = c.in_place ? base : kept;
    bool fault = false;
    for (int64_t u = 0; u < p.units; ++u) {
        const int64_t number = rows[p.one_row ? 0 : u];
        double row[kRowWidth];
        for (int i = 0; i < kRowWidth; ++i) row[i] = c.beyond ? NAN : table[number * kRowWidth + i];
        double expected[kMostSums] = {}, scales[kMostSums] = {};
        for (int i = 0; i < c.unit_size; ++i) {
            const int64_t at = u * c.unit_size + i, b = at / size, v = at % size;
            const auto term = [&](int column, double x) { return row[column] == 0 ? 0 : row[column] * x; };
            const double x = old_sample.get(at);
            double y = output.get(b * (wide + gap) + v);
            if (c.guided) y = other.get(b * wide + v) + row[kGuidance] * (y - other.get(b * wide + v));
            double x0 = 0;
            if (c.preview || row[kMX0] != 0) {
                x0 = term(kX0Sample, x) + term(kX0Output, y);
                const double bound = c.threshold ? threshold[b] : row[kClip];
                x0 = x0 > bound ? bound : x0 < -bound ? -bound : x0;
                if (c.threshold) x0 /= bound;
            }
            const double m = term(kMSample, x) + term(kMOutput, y) + term(kMX0, x0);
            double fresh = term(kSample, x) + term(kOutput, y) + term(kM, m);
            double keep = term(kKeptSample, x) + term(kKeptM, m);
            if (c.base) fresh += term(kBase, old_base.get(at)), keep += term(kKeptBase, old_base.get(at));
            for (int j = 0; j < c.slots; ++j) {
                const double h = old_history.get(j * numel + at);
                fresh += term(kHistory + j, h), keep += term(kKeptHistory + j, h);
                if (c.statistics == Statistics::dots) expected[1 + j] += m * h, scales[1 + j] += std::fabs(m * h);
            }
            if (c.noise != kNothing && row[kNoise] != 0) {
                double z = c.noise == kGiven ? noise.get(at) : drawn(v, &keys[2 * b], 77);
                if (c.learned) {
                    const double between = (output.get(b * (wide + gap) + size + v) + 1) / 2;
                    z *= std::exp(row[kLogSmall] + between * (row[kLogLarge] - row[kLogSmall]));
                }
                fresh += row[kNoise] * z;
            }
            keep += term(kKeptOut, fresh);
            bool keeps = false;
            for (int column : kAllKept) keeps = keeps || row[column] != 0;
            const double scale = 8;  // of the terms
            judge.near("out", made.get(at), fresh, scale, c.state);
            if (c.kept && (keeps || !c.in_place))
                judge.near("kept", made_kept.get(at), keeps ? keep : NAN, scale, c.state);
            if (c.preview) judge.near("preview", preview.get(at), x0, scale, c.state);
            for (int j = 0; j < c.slots; ++j)
                judge.near("history", history.get(j * numel + at),
                           row[kSlot] == j ? m : old_history.get(j * numel + at), scale, c.state);
            for (int copy = 0; copy < c.copies; ++copy)
                judge.near("model input", input.get(copy * numel + at), row[kInputScale] * fresh, scale, c.input);
            fault = fault || !std::isfinite(fresh) || !std::isfinite(m);
            const double pair[2] = {c.statistics == Statistics::dots ? m * m : fresh, fresh * fresh};
            for (int s = 0; s < (c.statistics == Statistics::dots ? 1 : 2); ++s)
                expected[s] += pair[s], scales[s] += std::fabs(pair[s]);
        }
        for (int s = 0; s < sums; ++s) judge.near("sums", statistic[u * sums + s], expected[s], scales[s], kF32);
    }
    if (faults != (fault ? 77 : 1000)) judge.what = judge.what ? judge.what : "faults";
    std::printf("%-20s %s %s\n", c.name, judge.what ? "WRONG:" : "", judge.what ? judge.what : "");
    if (judge.what) std::printf("    error %g\n", judge.worst);
    return !judge.what;
}

// Normal numbers against the formula, at the words where it is steepest and at many others.
bool run_normals() {
    const uint32_t corners[] = {0u,          1u,          2u,          0x1fffffffu, 0x20000000u,
                                0x3fffffffu, 0x40000000u, 0x5fffffffu, 0x60000000u, 0x7fffffffu,
                                0x80000000u, 0x80000001u, 0x9fffffffu, 0xa0000000u, 0xbfffffffu,
                                0xc0000000u, 0xfffffffeu, 0xffffffffu, 0xb504f333u, 0x4afb0ccdu};
    double worst = 0;
    const auto check = [&worst](uint32_t a, uint32_t b) {
        float z[4];
        normal_columns({{a, b, b, a}}, z);
        for (int pair = 0; pair < 2; ++pair) {
            const uint32_t radius_word = pair ? b : a, angle_word = pair ? a : b;
            const double radius = std::sqrt(-2 * std::log((radius_word + 0.5) / 4294967296.));
            const double angle = static_cast<int32_t>(angle_word) * M_PI / 0x1p31;
            const double exact[2] = {radius * std::cos(angle), radius * std::sin(angle)};
            for (int i = 0; i < 2; ++i) {
                const double error = std::fabs(z[2 * pair + i] - exact[i]) / std::fmax(1., std::fabs(exact[i]));
                worst = error <= worst ? worst : error;
            }
        }
    };
    for (uint32_t a : corners)
        for (uint32_t b : corners) check(a, b);
    for (int i = 0; i < 200000; ++i) check(state = state * 1664525u + 1013904223u, state ^ (state << 13));
    const bool good = worst < 1e-6;
    std::printf("%-20s %.1e %s\n", "normals", worst, good ? "" : "WRONG");
    return good;
}

}  // namespace

int main() {
    bool good = run_normals();
    for (const bool order : {false, true}) {
        emulator::backward = order;
        for (const Case& c : kCases) good = run_case(c) && good;
    }
    return good ? 0 : 1;
}
