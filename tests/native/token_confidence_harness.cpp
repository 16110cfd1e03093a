// Stand-alone check and timing of csrc/token_confidence, without torch:
//   g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno [ISA flags] tests/native/token_confidence_harness.cpp
//   ./a.out                                             all cases against double precision; exit 1 on a failure
//   ./a.out time VOCABULARY ROWS [DTYPE TEMPERATURE]    best microseconds of a row, one thread
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/token_confidence/kernel.inl"
#include "clock.h"

using namespace pdn;
using namespace pdn::token_confidence;

namespace {

struct Case {
    const char* why;
    DType dtype;
    int64_t rows, vocabulary;
    float temperature = 0;
    bool guided = false, picked = false, specials = false;
    float spread = 3;
};

const Case kCases[] = {
    {"one token", DType::float32, 2, 1},
    {"shorter than a vector", DType::float32, 3, 3},
    {"characters", DType::bfloat16, 3, 65},
    {"odd", DType::float16, 3, 131},
    {"a chunk and one", DType::float32, 2, kChunk + 1},
    {"pieces", DType::float32, 2, 2 * kPiece + 77},
    {"words", DType::bfloat16, 1, 50257},
    {"guided", DType::float32, 2, 5000, 0, true},
    {"guided, 16 bits", DType::bfloat16, 2, 301, 0, true, true},
    {"tokens left out", DType::float32, 4, 20000, 0, false, false, true},
    {"noise, short", DType::float32, 4, 27, 1.f},
    {"noise, long", DType::float32, 2, 2 * kPiece + 1, 0.7f},
    {"everything", DType::float16, 3, 18000, 0.9f, true, true, true},
    {"flat", DType::float32, 2, 40000, 0, false, false, false, 1e-3f},
    {"sharp", DType::float32, 2, 3000, 0, false, false, false, 60},
};

uint16_t narrowed(float x, DType dtype) { return dtype == DType::bfloat16 ? to_bf16(x) : to_fp16(x).bits; }
float widened(uint16_t x, DType dtype) { return dtype == DType::bfloat16 ? from_bf16(x) : from_fp16({x}); }

// Logits in memory that is exactly as long as it must be, so that sanitizers see what lies beyond.
struct Matrix {
    std::vector<float> floats;
    std::vector<uint16_t> halves;
    void fill(const Case& c, int64_t rows, unsigned seed) {
        std::mt19937 generator(seed);
        std::normal_distribution<float> normal(0, c.spread);
        floats.resize(static_cast<size_t>(rows * c.vocabulary));
        for (float& x : floats) {
            x = normal(generator);
            if (c.dtype == DType::float32) continue;
            halves.push_back(narrowed(x, c.dtype));
            x = widened(halves.back(), c.dtype);
        }
    }
    const void* data() const { return halves.empty() ? static_cast<const void*>(floats.data()) : halves.data(); }
};

struct Problem {
    Case c;
    Params p{};
    Matrix logits, unconditional;
    std::vector<int64_t> index, keys, token;
    std::vector<float> confidence, eos;

    explicit Problem(const Case& given) : c(given) {
        const int64_t source = c.picked ? c.rows + 2 : c.rows;
        logits.fill(c, source, 1);
        p.dtype = c.dtype, p.rows = c.rows, p.vocabulary = c.vocabulary, p.source_rows = source;
        p.logits = logits.data(), p.stride = p.unconditional_stride = c.vocabulary;
        if (c.guided) unconditional.fill(c, source, 2), p.unconditional = unconditional.data(), p.guidance = 0.75f;
        p.temperature = c.temperature, p.seed = -3, p.step = 0xfffffff0u, p.eos = c.vocabulary / 2;
        if (c.specials) {
            p.forbidden = {2, {0, c.vocabulary - 1, 0, 0}};
            p.uncounted = {3, {1, c.vocabulary / 2, kPiece + 1, 0}};
            if (c.vocabulary <= kPiece + 1) p.uncounted.count = 2;
        }
        for (int64_t r = 0; c.picked && r < c.rows; ++r) {
            index.push_back(source - 1 - r);
            keys.push_back(r << 33);
            keys.push_back(-r);
        }
        p.index = c.picked ? index.data() : nullptr, p.keys = c.picked ? keys.data() : nullptr;
        token.assign(static_cast<size_t>(c.rows), -9);
        confidence.assign(static_cast<size_t>(c.rows), NAN), eos = confidence;
        p.token = token.data(), p.confidence = confidence.data(), p.eos_probability = eos.data();
    }

    double score(int64_t row, int64_t column) const {
        const auto at = static_cast<size_t>((c.picked ? index[static_cast<size_t>(row)] : row) * c.vocabulary + column);
        if (is_among(p.forbidden, column)) return -INFINITY;
        const double x = logits.floats[at];
        if (!c.guided) return x;
        return unconditional.floats[at] + (p.guidance + 1.) * (x - unconditional.floats[at]);
    }

    // In double, from the generator's words.
    double noise(int64_t row, int64_t column) const {
        const auto r = static_cast<size_t>(row);
        const NoiseRow of = c.picked ? noise_row(keys[2 * r], keys[2 * r + 1], p.step) : noise_row(p.seed, row, p.step);
        const int64_t counter = column / kNoiseBlock * kNoiseLanes + column % kNoiseLanes;
        const uint32_t word = philox(static_cast<uint32_t>(counter), of).v[column / kNoiseLanes % 4];
        const double q = (word + 0.5) / 4294967296.;
        return -std::log(-std::log1p(-q));
    }
};

void run(const Params& p) {
    const int64_t pieces = (p.vocabulary + kPiece - 1) / kPiece;
    std::vector<Partial> partials(static_cast<size_t>(pieces));
    for (int64_t row = 0; row < p.rows; ++row) {
        for (int64_t i = pieces; i-- > 0;) piece(p, row, i * kPiece, &partials[static_cast<size_t>(i)]);
        finish(p, row, partials.data(), pieces);
    }
}

bool check(const Case& c) {
    Problem problem(c);
    const Params& p = problem.p;
    run(p);
    bool right = true;
    double worst = 0;
    for (int64_t row = 0; row < c.rows; ++row) {
        double top = -INFINITY, total = 0, best = -INFINITY, got = -INFINITY;
        const int64_t token = problem.token[static_cast<size_t>(row)];
        for (int64_t v = 0; v < c.vocabulary; ++v) {
            const double l = problem.score(row, v);
            const double ranked = c.temperature > 0 ? l + c.temperature * problem.noise(row, v) : l;
            best = std::max(best, ranked);
            if (v == token) got = ranked;
            if (!is_among(p.uncounted, v)) top = std::max(top, l);
        }
        for (int64_t v = 0; v < c.vocabulary; ++v)
            if (!is_among(p.uncounted, v)) total += std::exp(problem.score(row, v) - top);
        const auto exact = [&](int64_t v) {
            return is_among(p.uncounted, v) || is_among(p.forbidden, v) ? 0.
                                                                        : std::exp(problem.score(row, v) - top) / total;
        };
        right = right && token >= 0 && best - got <= (c.temperature > 0 || c.guided ? 3e-5 : 0.);
        const double confidence = problem.confidence[static_cast<size_t>(row)],
                     eos = problem.eos[static_cast<size_t>(row)];
        const double scale = std::max(exact(token), 1e-30);
        worst = std::max({worst, std::fabs(confidence - exact(token)) / scale,
                          std::fabs(eos - exact(p.eos)) / (exact(p.eos) + 1e-30)});
    }
    right = right && worst < (c.guided || c.spread > 10 ? 6e-6 : 2e-6);
    std::printf("%-32s %s  relative error %.2e\n", c.why, right ? "ok " : "BAD", worst);
    return right;
}

// The vectors of noise are the scalars, and those are what the logarithms of the library give.
bool check_noise() {
    const NoiseRow row = noise_row(12345678901234567ll, -5, 77);
    std::vector<float> zeros(1024), vectors(1024);
    for (int64_t i = 0; i < 1024; i += kNoiseBlock) {
        NoiseWords words;
        noise_words(4096 + i, row, words);
        add_gumbel(zeros.data() + i, words, 1.f, vectors.data() + i);
    }
    double apart = 0, error = 0;
    for (int64_t i = 0; i < 1024; ++i) {
        const int64_t column = 4096 + i, counter = column / kNoiseBlock * kNoiseLanes + column % kNoiseLanes;
        const uint32_t word = philox(static_cast<uint32_t>(counter), row).v[column / kNoiseLanes % 4];
        apart = std::max(apart, std::fabs(static_cast<double>(vectors[static_cast<size_t>(i)]) - gumbel(word)));
        error = std::max(error, std::fabs(gumbel(word) + std::log(-std::log1p(-(word + 0.5) / 4294967296.))));
    }
    for (const uint32_t word :
         {0u, 1u, 2u, 1000u, 0x4afb0ccdu, 0x4afb0cceu, 0x7fffffffu, 0x80000000u, 0x80000001u, 0xfffffffeu, 0xffffffffu})
        error = std::max(error, std::fabs(gumbel(word) + std::log(-std::log1p(-(word + 0.5) / 4294967296.))));
    const bool right = apart < 2e-6 && error < 3e-6;
    std::printf("%-32s %s  %.2e apart, error %.2e\n", "noise", right ? "ok " : "BAD", apart, error);
    return right;
}

bool check_no_answer() {
    bool right = true;
    for (const int64_t vocabulary : {int64_t{5}, kPiece + 3})
        for (const float bad : {NAN, INFINITY}) {
            Problem problem({"no answer", DType::float32, 3, vocabulary, 0.5f});
            problem.logits.floats[static_cast<size_t>(2 * vocabulary - 1)] = bad;
            for (int64_t i = 2 * vocabulary; i < 3 * vocabulary; ++i)
                problem.logits.floats[static_cast<size_t>(i)] = -INFINITY;
            run(problem.p);
            right = right && problem.token[0] >= 0 && problem.token[1] == -1 && problem.token[2] == -1;
            right = right && problem.eos[0] >= 0 && std::isnan(problem.confidence[1]) && std::isnan(problem.eos[2]);
        }
    std::printf("%-32s %s\n", "rows without an answer", right ? "ok " : "BAD");
    return right;
}

void measure(const Case& c) {
    Problem problem(c);
    double best = 1e30;
    for (int i = 0; i < 30; ++i) {
        const double begin = now();
        run(problem.p);
        best = std::min(best, now() - begin);
    }
    const double row = best / static_cast<double>(c.rows);
    std::printf("%.1f us a row, %.2f ns a vector of %d\n", row, row * 1e3 * kWidth / static_cast<double>(c.vocabulary),
                kWidth);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 3 && std::string(argv[1]) == "time") {
        Case c = {"time", DType::float32, std::atoll(argv[3]), std::atoll(argv[2])};
        if (argc > 4) c.dtype = static_cast<DType>(std::atoi(argv[4]));
        if (argc > 5) c.temperature = static_cast<float>(std::atof(argv[5]));
        measure(c);
        return 0;
    }
    bool right = check_noise();
    right = check_no_answer() && right;
    for (const Case& c : kCases) right = check(c) && right;
    return right ? 0 : 1;
}
