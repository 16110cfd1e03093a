// Stand-alone check and timing of csrc/attention, without torch:
//   g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno [ISA flags] tests/native/attention_harness.cpp -o harness
//   ./harness                                              all cases against double precision; exit 1 on a failure
//   ./harness time QUERIES KEYS HEADS SIZE [DTYPE REPEATS]  best microseconds, one thread
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/attention/kernel.inl"
#include "aligned.h"
#include "clock.h"
#include "sparse_attention_check.h"

using namespace pdn;
using namespace pdn::attention;

namespace {

enum class Masks { none, boolean, additive };

struct Case {
    const char* why;
    DType dtype;
    int64_t batch, queries, keys, heads, size;
    Masks mask = Masks::none;
    bool per_head = false;  // a mask row per image, head and query; else one for all
    float spread = 1;       // of queries and keys: large ones make a softmax that picks one key
    int64_t gap = 0;        // elements between tokens that belong to nobody
};

const Case kCases[] = {
    {"whole tiles of short heads", DType::float32, 1, 12, 64, 2, 8},
    {"several blocks of short heads", DType::float32, 1, 7, 1100, 1, 8},
    {"a vector long", DType::float32, 2, 100, 77, 3, 16, Masks::none, false, 1, 5},
    {"one element", DType::float32, 1, 5, 9, 2, 1},
    {"odd", DType::float32, 2, 13, 31, 3, 11, Masks::none, false, 1, 3},
    {"several blocks", DType::float32, 1, 8, 600, 2, 40},
    {"cross-attention of 77 tokens", DType::float32, 2, 50, 77, 2, 40},
    {"long heads", DType::float32, 1, 9, 150, 1, 160},
    {"very long heads", DType::float32, 1, 7, 130, 1, 512},
    {"one token", DType::float32, 3, 1, 1, 2, 24},
    {"sharp, later keys larger", DType::float32, 1, 20, 900, 1, 32, Masks::none, false, 6},
    {"boolean mask, a row for all", DType::float32, 2, 9, 40, 2, 8, Masks::boolean},
    {"boolean mask, own rows", DType::float32, 2, 9, 530, 2, 8, Masks::boolean, true},
    {"added mask", DType::float32, 2, 9, 300, 2, 20, Masks::additive, true},
    {"bfloat16, short heads", DType::bfloat16, 1, 20, 100, 2, 8},
    {"bfloat16, odd", DType::bfloat16, 2, 13, 31, 2, 13, Masks::none, false, 1, 3},
    {"bfloat16, blocks", DType::bfloat16, 1, 10, 600, 2, 40, Masks::boolean, true},
    {"bfloat16, long odd heads", DType::bfloat16, 1, 10, 70, 1, 161},
    {"float16", DType::float16, 1, 10, 70, 2, 40},
    {"float16, short heads", DType::float16, 1, 10, 33, 2, 5},
};

Values<char> scratch_of(const AttentionParams& p) {
    return Values<char>(static_cast<size_t>(scratch_bytes(p)), static_cast<char>(0xff));
}

uint16_t narrowed(float x, DType dtype) { return dtype == DType::bfloat16 ? to_bf16(x) : to_fp16(x).bits; }
float widened(uint16_t x, DType dtype) { return dtype == DType::bfloat16 ? from_bf16(x) : from_fp16({x}); }

// Tokens as the kernel reads them, and the same as floats.
struct Input {
    std::vector<float> floats;
    std::vector<uint16_t> halves;
    Tokens tokens{};

    void build(const Case& c, int64_t count, float deviation, std::mt19937& generator) {
        std::normal_distribution<float> normal(0, deviation);
        tokens.count = count;
        tokens.row_stride = c.heads * c.size + c.gap;
        tokens.head_stride = c.size;
        tokens.batch_stride = count * tokens.row_stride;
        floats.resize(static_cast<size_t>(c.batch * tokens.batch_stride - c.gap));
        for (float& x : floats) x = normal(generator);
        if (c.dtype != DType::float32)
            for (float& x : floats) {
                halves.push_back(narrowed(x, c.dtype));
                x = widened(halves.back(), c.dtype);
            }
        tokens.data = halves.empty() ? static_cast<const void*>(floats.data()) : halves.data();
    }
    double at(const Case& c, int64_t image, int64_t head, int64_t token, int64_t d) const {
        return floats[static_cast<size_t>(image * tokens.batch_stride + token * tokens.row_stride + head * c.size + d)];
    }
};

struct Problem {
    Case c;
    AttentionParams p{};
    Input query, key, value;
    std::vector<uint8_t> keep;
    std::vector<float> bias;
    std::vector<float> floats;  // the output
    std::vector<uint16_t> halves;

    explicit Problem(const Case& given) : c(given) {
        std::mt19937 generator(7);
        query.build(c, c.queries, c.spread, generator);
        key.build(c, c.keys, c.spread, generator);
        value.build(c, c.keys, 1, generator);
        p.dtype = c.dtype;
        p.batch = c.batch, p.heads = c.heads, p.group = 1, p.size = c.size;
        p.query = query.tokens, p.key = key.tokens, p.value = value.tokens;
        p.scale = 1.f / std::sqrt(static_cast<float>(c.size));
        const auto count = static_cast<size_t>(c.batch * c.queries * c.heads * c.size);
        floats.resize(c.dtype == DType::float32 ? count : 0, NAN);
        halves.resize(c.dtype == DType::float32 ? 0 : count, 0x7fff);
        p.output = halves.empty() ? static_cast<void*>(floats.data()) : halves.data();
        p.output_row_stride = c.heads * c.size;
        p.output_head_stride = c.size;
        p.output_batch_stride = c.queries * p.output_row_stride;
        if (c.mask == Masks::none) return;
        const int64_t rows = c.per_head ? c.batch * c.heads * c.queries : 1;
        for (int64_t i = 0; i < rows * c.keys; ++i) {
            keep.push_back(generator() % 3 != 0);
            bias.push_back(keep.back() ? std::normal_distribution<float>()(generator) : -3.4e38f);
        }
        for (int64_t i = 0; i < c.keys; ++i) {  // the last row drops every key, the first one all of its first 512
            if (c.per_head) keep[static_cast<size_t>((rows - 1) * c.keys + i)] = 0;
            if (i < 512 && c.keys > 512) keep[static_cast<size_t>(i)] = 0;
        }
        p.mask = {keep.data(), true, 0, 0, 0};
        if (c.mask == Masks::additive) p.mask = {bias.data(), false, 0, 0, 0};
        if (c.per_head) {
            p.mask.query_stride = c.keys;
            p.mask.head_stride = c.queries * c.keys;
            p.mask.batch_stride = c.heads * p.mask.head_stride;
        }
    }
    double result(size_t i) const { return halves.empty() ? floats[i] : widened(halves[i], c.dtype); }

    double score(int64_t image, int64_t head, int64_t q, int64_t k) const {
        double sum = 0;
        for (int64_t d = 0; d < c.size; ++d) sum += query.at(c, image, head, q, d) * key.at(c, image, head, k, d);
        sum *= p.scale;
        const int64_t at = image * p.mask.batch_stride + head * p.mask.head_stride + q * p.mask.query_stride + k;
        if (c.mask == Masks::boolean && !keep[static_cast<size_t>(at)]) return -INFINITY;
        return c.mask == Masks::additive ? sum + bias[static_cast<size_t>(at)] : sum;
    }
};

void run(const AttentionParams& p) {
    Values<char> scratch = scratch_of(p);
    for (int64_t head = 0; head < p.batch * p.heads; ++head)
        for (int64_t q = 0; q < p.query.count; q += kQueryBlock)
            attend(p, head / p.heads, head % p.heads, q, std::min(p.query.count, q + kQueryBlock), nullptr,
                   scratch.data());
}

bool check(const Case& c) {
    Problem problem(c);
    run(problem.p);
    double worst = 0;
    bool right = true;
    std::vector<double> scores(static_cast<size_t>(c.keys));
    for (int64_t image = 0; image < c.batch; ++image)
        for (int64_t head = 0; head < c.heads; ++head)
            for (int64_t q = 0; q < c.queries; ++q) {
                double top = -INFINITY, total = 0;
                for (int64_t k = 0; k < c.keys; ++k)
                    top = std::max(top, scores[static_cast<size_t>(k)] = problem.score(image, head, q, k));
                for (double& s : scores) total += s = top == -INFINITY ? 0 : std::exp(s - top);
                for (int64_t d = 0; d < c.size; ++d) {
                    double sum = 0;
                    for (int64_t k = 0; k < c.keys; ++k)
                        sum += scores[static_cast<size_t>(k)] * problem.value.at(c, image, head, k, d);
                    const double expected = total > 0 ? sum / total : 0;
                    const double got =
                        problem.result(static_cast<size_t>(((image * c.queries + q) * c.heads + head) * c.size + d));
                    right = right && std::abs(got - expected) < 1e9;
                    worst = std::max(worst, std::abs(got - expected));
                }
            }
    const double bound = c.dtype == DType::float32 ? 4e-6 * c.spread : c.dtype == DType::float16 ? 2e-3 : 2e-2;
    right = right && worst <= bound;
    std::printf("%-32s %s  error %.2e\n", c.why, right ? "ok " : "BAD", worst);
    return right;
}

// A NaN in a query stays in its row; one row computed alone has the same bits.
bool check_rows() {
    bool right = true;
    for (const DType dtype : {DType::float32, DType::bfloat16})
        for (const int64_t size : {8, 40}) {
            const Case c = {"rows", dtype, 1, 23, 600, 2, size};
            Problem whole(c), poisoned(c);
            run(whole.p);
            Input& query = poisoned.query;
            const auto at = static_cast<size_t>(9 * query.tokens.row_stride);  // head 0 of query 9
            query.floats[at] = NAN;
            if (!query.halves.empty()) query.halves[at] = 0x7fc0;
            Values<char> scratch = scratch_of(poisoned.p);
            for (int64_t head = 0; head < 2; ++head)
                for (int64_t q = c.queries - 1; q >= 0; q -= 2)  // pairs of queries, last first
                    attend(poisoned.p, 0, head, std::max<int64_t>(0, q - 1), q + 1, nullptr, scratch.data());
            for (int64_t i = 0; i < c.queries * 2 * size; ++i) {
                const double a = whole.result(static_cast<size_t>(i)), b = poisoned.result(static_cast<size_t>(i));
                const bool struck = i / (2 * size) == 9 && i % (2 * size) < size;
                right = right && (struck ? std::isnan(b) : a == b);
            }
        }
    std::printf("%-32s %s\n", "rows are independent", right ? "ok " : "BAD");
    return right;
}

// Vectors of multiply-adds that the processor does in a microsecond.
double multiply_adds() {
    vf a = splat(1.f), b = a, c = a, d = a, e = a, f = a, g = a, h = a;
    double best = 1e30;
    for (int i = 0; i < 50; ++i) {
        const double begin = now();
        for (int round = 0; round < 5000; ++round) {
            a = a * .5f + .5f, b = b * .5f + .5f, c = c * .5f + .5f, d = d * .5f + .5f;
            e = e * .5f + .5f, f = f * .5f + .5f, g = g * .5f + .5f, h = h * .5f + .5f;
#if defined(__SSE2__)
            asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h));
#endif
        }
        best = std::min(best, now() - begin);
    }
    return 40000 / best;
}

// The best time of every block of queries by itself, added up: on a busy machine long runs are always disturbed.
void measure(const Case& c, int repeats) {
    Problem problem(c);
    const AttentionParams& p = problem.p;
    Values<char> scratch = scratch_of(p);
    const double rate = multiply_adds();
    double attending = 0;
    for (int64_t head = 0; head < p.heads; ++head)
        for (int64_t q = 0; q < p.query.count; q += kQueryBlock) {
            double best = 1e30;
            for (int i = 0; i < repeats; ++i) {
                const double begin = now();
                attend(p, 0, head, q, std::min(p.query.count, q + kQueryBlock), nullptr, scratch.data());
                best = std::min(best, now() - begin);
            }
            attending += best;
        }
    const double vectors = static_cast<double>(c.queries * c.keys * c.heads) / kWidth;
    std::printf("%.1f us; at %.0f multiply-adds/us the products take %.1f us, with 5 for the exponential %.1f\n",
                attending, rate, vectors * 2 * static_cast<double>(c.size) / rate,
                vectors * (2 * static_cast<double>(c.size) + 5) / rate);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 5 && std::string(argv[1]) == "time") {
        Case c = {"time",
                  DType::float32,
                  1,
                  std::atoll(argv[2]),
                  std::atoll(argv[3]),
                  std::atoll(argv[4]),
                  std::atoll(argv[5])};
        if (argc > 6) c.dtype = static_cast<DType>(std::atoi(argv[6]));
        measure(c, argc > 7 ? std::atoi(argv[7]) : 20);
        return 0;
    }
    bool right = check_rows();
    right = check_all_sparse() && right;
    for (const Case& c : kCases) right = check(c) && right;
    return right ? 0 : 1;
}
