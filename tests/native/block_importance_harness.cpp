// Stand-alone check and timing of csrc/block_importance, without torch:
//   g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno [ISA flags] tests/native/block_importance_harness.cpp -o
//   harness
//   ./harness                                              all cases against double precision; exit 1 on a failure
//   ./harness time TOKENS HEADS SIZE BLOCK [DTYPE REPEATS]  best microseconds of packing and of the rows, one thread
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "../../csrc/block_importance/kernel.inl"
#include "aligned.h"
#include "clock.h"

using namespace pdn;
using namespace pdn::block_importance;

namespace {

struct Case {
    const char* why;
    DType dtype;
    int64_t batch, heads, kv_heads, queries, keys, size, block, first_generated;
    bool lse = false;
    float spread = 1, scale = 0;  // of queries and keys; 0: 1 / sqrt(size)
    int64_t gap = 0;              // elements between tokens that belong to nobody
    int32_t lengths[2] = {-1, -1};
    float growth = 0;  // added to the scores from key to key
};

constexpr DType kF32 = DType::float32, kB16 = DType::bfloat16, kF16 = DType::float16;

const Case kCases[] = {
    {"all whole, nothing but generated", kF32, 1, 2, 2, 128, 256, 64, 128, 0},
    {"last block generated", kF32, 1, 1, 1, 128, 512, 64, 128, 3},
    {"sides meet inside a tile, 16", kF32, 1, 2, 1, 40, 200, 24, 16, 5},
    {"sides meet inside a tile, 32", kF32, 1, 2, 1, 40, 200, 24, 32, 1},
    {"sides meet inside a tile, last", kF32, 1, 1, 1, 16, 65, 8, 16, 4},
    {"blocks of 64, odd ends", kF32, 2, 4, 2, 77, 203, 40, 64, 2, false, 1, 0, 3},
    {"short last blocks of 128", kF32, 1, 1, 1, 131, 131, 32, 128, 1},
    {"one token", kF32, 2, 1, 1, 1, 1, 5, 32, 0},
    {"one element", kF32, 1, 1, 1, 33, 47, 1, 16, 1},
    {"several chunks", kF32, 1, 1, 1, 20, 2200, 16, 64, 9},
    {"long heads", kF32, 1, 1, 1, 20, 300, 256, 32, 4},
    {"lengths inside a block and none", kF32, 2, 2, 2, 40, 150, 32, 32, 2, false, 1, 0, 0, {45, 0}},
    {"lengths at the edge and beyond", kF32, 2, 1, 1, 40, 150, 32, 64, 1, false, 1, 0, 0, {64, 1000}},
    {"all generated keys beyond the length", kF32, 2, 1, 1, 40, 150, 32, 64, 1, true, 1, 0, 0, {1, 63}},
    {"lse given", kF32, 1, 2, 1, 70, 333, 32, 16, 7, true},
    {"lse given, lengths", kF32, 2, 2, 1, 70, 333, 32, 128, 1, true, 1, 0, 0, {300, 129}},
    {"sharp", kF32, 1, 2, 2, 64, 400, 64, 64, 3, false, 6},
    {"scores that grow by much", kF32, 1, 1, 1, 64, 400, 8, 16, 3, false, 1, 0, 0, {-1, -1}, 2.f},
    {"scores that fall by much", kF32, 1, 1, 1, 64, 400, 8, 16, 3, true, 1, 0, 0, {-1, -1}, -2.f},
    {"scores that grow over the range of floats", kF32, 1, 1, 1, 16, 200, 8, 64, 1, false, 1, 0, 0, {-1, -1}, 40.f},
    {"negative scale", kF32, 1, 1, 1, 64, 100, 24, 32, 1, false, 1, -0.3f, 0, {90, 0}},
    {"scale 0", kF32, 1, 1, 1, 16, 50, 24, 32, 1, false, 1, 1e-30f},
    {"bfloat16, 128", kB16, 1, 2, 1, 140, 300, 64, 128, 1},
    {"bfloat16, odd", kB16, 2, 2, 2, 33, 95, 13, 16, 3, false, 1, 0, 3, {94, 50}},
    {"bfloat16, negative scale, lse", kB16, 1, 2, 2, 33, 95, 40, 32, 1, true, 1, -0.4f},
    {"bfloat16, growing", kB16, 1, 1, 1, 33, 300, 8, 64, 1, false, 1, 0, 0, {-1, -1}, 2.f},
    {"float16", kF16, 1, 2, 2, 50, 170, 40, 32, 2, false, 1, 0, 1, {100, 0}},
};

uint16_t narrowed(float x, DType dtype) { return dtype == kB16 ? to_bf16(x) : to_fp16(x).bits; }
float widened(uint16_t x, DType dtype) { return dtype == kB16 ? from_bf16(x) : from_fp16({x}); }

// Tokens as the kernel reads them, and the same as floats.
struct Input {
    Values<float> floats;
    Values<uint16_t> halves;
    Tokens tokens{};

    void build(const Case& c, int64_t heads, int64_t count, std::mt19937& generator) {
        std::normal_distribution<float> normal(0, c.spread);
        tokens = {nullptr, count, heads * count * (c.size + c.gap), count * (c.size + c.gap), c.size + c.gap};
        floats.resize(static_cast<size_t>(c.batch * tokens.batch_stride - c.gap));
        for (float& x : floats) x = normal(generator);
    }
    void narrow(DType dtype) {
        if (dtype != kF32)
            for (float& x : floats) {
                halves.push_back(narrowed(x, dtype));
                x = widened(halves.back(), dtype);
            }
        tokens.data = halves.empty() ? static_cast<const void*>(floats.data()) : halves.data();
    }
    size_t place(int64_t image, int64_t head, int64_t token, int64_t d) const {
        return static_cast<size_t>(image * tokens.batch_stride + head * tokens.head_stride + token * tokens.row_stride +
                                   d);
    }
    double at(int64_t image, int64_t head, int64_t token, int64_t d) const {
        return floats[place(image, head, token, d)];
    }
    void set(DType dtype, int64_t image, int64_t head, int64_t token, float x) {
        floats[place(image, head, token, 0)] = x;
        if (!halves.empty()) halves[place(image, head, token, 0)] = narrowed(x, dtype);
    }
};

struct Problem {
    Case c;
    ImportanceParams p{};
    Input query, key;
    Values<float> lse, over_all, over_generated;
    int64_t rows, columns;

    explicit Problem(const Case& given) : c(given) {
        std::mt19937 generator(7);
        rows = (c.queries + c.block - 1) / c.block, columns = (c.keys + c.block - 1) / c.block;
        const float scale = c.scale != 0 ? c.scale : 1.f / std::sqrt(static_cast<float>(c.size));
        query.build(c, c.heads, c.queries, generator);
        key.build(c, c.kv_heads, c.keys, generator);
        if (c.growth != 0) {  // element 0 gives the growth
            for (int64_t i = 0; i < c.batch * c.heads * c.queries; ++i)
                query.floats[static_cast<size_t>(i * query.tokens.row_stride)] = 1 / scale;
            for (int64_t i = 0; i < c.batch * c.kv_heads * c.keys; ++i)
                key.floats[static_cast<size_t>(i * key.tokens.row_stride)] = c.growth * static_cast<float>(i % c.keys);
        }
        query.narrow(c.dtype), key.narrow(c.dtype);
        over_all.assign(static_cast<size_t>(c.batch * c.heads * rows * columns), NAN);
        over_generated.assign(static_cast<size_t>(c.batch * c.heads * rows * (columns - c.first_generated)), NAN);
        p = {c.dtype,      c.batch,    c.heads, c.kv_heads, c.size,  c.block,         c.first_generated,
             query.tokens, key.tokens, scale,   nullptr,    nullptr, over_all.data(), over_generated.data()};
        if (c.lengths[0] >= 0) p.key_lengths = c.lengths;
        for (int64_t i = 0; c.lse && i < c.batch * c.heads * c.queries; ++i) {
            const int64_t image = i / (c.heads * c.queries), head = i / c.queries % c.heads;
            lse.push_back(static_cast<float>(total(scores(image, head, i % c.queries), 0)));
        }
        if (c.lse) p.lse = lse.data();
    }
    Problem(const Problem&) = delete;

    std::vector<double> scores(int64_t image, int64_t head, int64_t q) const {
        const int64_t length = p.key_lengths ? std::min<int64_t>(c.keys, p.key_lengths[image]) : c.keys;
        std::vector<double> result(static_cast<size_t>(c.keys), -INFINITY);
        for (int64_t k = 0; k < length; ++k) {
            double sum = 0;
            for (int64_t d = 0; d < c.size; ++d)
                sum += query.at(image, head, q, d) * key.at(image, head / (c.heads / c.kv_heads), k, d);
            result[static_cast<size_t>(k)] = sum * p.scale;
        }
        return result;
    }
    static double total(const std::vector<double>& scores, int64_t first) {
        double top = -INFINITY, sum = 0;
        for (size_t k = static_cast<size_t>(first); k < scores.size(); ++k) top = std::max(top, scores[k]);
        for (size_t k = static_cast<size_t>(first); k < scores.size(); ++k)
            sum += top == -INFINITY ? 0 : std::exp(scores[k] - top);
        return top + std::log(sum);
    }
    // Sums over the block of queries `row` of one head, both results behind each other.
    std::vector<double> expected(int64_t image, int64_t head, int64_t row) const {
        std::vector<double> result(static_cast<size_t>(2 * columns - c.first_generated));
        const double size = static_cast<double>(c.block * c.block);
        const int64_t begin = c.first_generated * c.block;
        for (int64_t q = row * c.block; q < std::min(c.queries, (row + 1) * c.block); ++q) {
            const std::vector<double> s = scores(image, head, q);
            const double all = total(s, 0), generated = total(s, begin);
            for (int64_t k = 0; k < c.keys; ++k) {
                const double score = s[static_cast<size_t>(k)];
                if (score == -INFINITY) continue;
                result[static_cast<size_t>(k / c.block)] += std::exp(score - all) / size;
                if (k >= begin)
                    result[static_cast<size_t>(columns + k / c.block - c.first_generated)] +=
                        std::exp(score - generated) / size;
            }
        }
        return result;
    }
    double result(int64_t image, int64_t head, int64_t row, int64_t i) const {
        const int64_t at = (image * c.heads + head) * rows + row;
        return i < columns ? over_all[static_cast<size_t>(at * columns + i)]
                           : over_generated[static_cast<size_t>((at - 1) * (columns - c.first_generated) + i -
                                                                c.first_generated)];
    }
};

// Rows in descending order, every one with fresh scratch memory, if `backwards`.
void run(const ImportanceParams& p, bool backwards = false) {
    Values<char> packed(static_cast<size_t>(packed_bytes(p)), 0x7f);
    const int64_t group = p.heads / p.kv_heads, rows = (p.query.count + p.block - 1) / p.block;
    for (int64_t kv = 0; kv < p.batch * p.kv_heads; ++kv) {
        for (int64_t i = 0; i * chunk(p) < p.key.count; ++i)
            pack(p, kv / p.kv_heads, kv % p.kv_heads, i, packed.data());
        Values<char> scratch(static_cast<size_t>(scratch_bytes(p)), 0x7f);
        for (int64_t item = 0; item < group * rows; ++item) {
            const int64_t i = backwards ? group * rows - 1 - item : item, head = kv * group + i / rows;
            if (backwards) std::fill(scratch.begin(), scratch.end(), static_cast<char>(0xff));
            measure(p, head / p.heads, head % p.heads, i % rows, packed.data(), scratch.data());
        }
    }
}

bool check(const Case& c) {
    Problem problem(c);
    run(problem.p);
    const Values<float> first = problem.over_all, second = problem.over_generated;
    run(problem.p, true);
    const bool same = first == problem.over_all && second == problem.over_generated;
    double worst = 0;  // relative, and absolute for what is nothing
    for (int64_t i = 0; i < c.batch * c.heads * problem.rows; ++i) {
        const int64_t image = i / (c.heads * problem.rows), head = i / problem.rows % c.heads, row = i % problem.rows;
        const std::vector<double> expected = problem.expected(image, head, row);
        for (size_t j = 0; j < expected.size(); ++j) {
            const double got = problem.result(image, head, row, static_cast<int64_t>(j));
            const double error = std::abs(got - expected[j]) / (expected[j] + 1e-12);
            worst = error <= worst ? worst : std::isnan(got) ? INFINITY : error;
        }
    }
    // an error of a score is a relative error of its exponential
    const double bound = 3e-6 * (c.spread * c.spread + std::abs(c.growth) * static_cast<double>(c.keys) / 4);
    const bool right = worst <= bound && same;
    std::printf("%-44s %s  error %.2e%s\n", c.why, right ? "ok " : "BAD", worst, same ? "" : ", depends on the order");
    return right;
}

// A NaN in a query stays in its row of blocks; one in a key that does not count is not read.
bool check_nan(DType dtype, bool lse) {
    const Case c = {"", dtype, 2, 2, 1, 70, 200, 24, 32, 3, lse, 1, 0, 0, {150, 170}};
    Problem whole(c), poisoned(c);
    poisoned.query.set(dtype, 0, 1, 40, NAN);
    for (int64_t k = 150; k < 200; ++k) poisoned.key.set(dtype, 0, 0, k, NAN);
    run(whole.p), run(poisoned.p);
    bool right = true;
    for (int64_t i = 0; i < c.batch * c.heads * whole.rows; ++i)
        for (int64_t j = 0; j < 2 * whole.columns - c.first_generated; ++j) {
            const int64_t image = i / (c.heads * whole.rows), head = i / whole.rows % c.heads, row = i % whole.rows;
            const double a = whole.result(image, head, row, j), b = poisoned.result(image, head, row, j);
            const bool struck = image == 0 && head == 1 && row == 1;
            const bool nothing = lse && j < whole.columns && j * c.block >= 150;  // no key counts, and no sum is needed
            right = right && (struck && !nothing ? std::isnan(b) : a == b);
        }
    std::printf("%-44s %s\n", "NaN stays in its block of queries", right ? "ok " : "BAD");
    return right;
}

// The best time of every part by itself, added up: on a busy machine long runs are always disturbed.
void measure_time(const Case& c, int repeats) {
    Problem problem(c);
    const ImportanceParams& p = problem.p;
    Values<char> packed(static_cast<size_t>(packed_bytes(p))), scratch(static_cast<size_t>(scratch_bytes(p)));
    double packing = 0, measuring = 0;
    const auto best_of = [&](const auto& part) {
        double best = 1e30;
        for (int i = 0; i < repeats; ++i) {
            const double begin = now();
            part();
            best = std::min(best, now() - begin);
        }
        return best;
    };
    for (int64_t head = 0; head < p.heads; ++head) {
        for (int64_t i = 0; i * chunk(p) < p.key.count; ++i)
            packing += best_of([&] { pack(p, 0, head, i, packed.data()); });
        for (int64_t row = 0; row < problem.rows; ++row)
            measuring += best_of([&] { measure(p, 0, head, row, packed.data(), scratch.data()); });
    }
    std::printf("pack %.1f us, measure %.1f us: %.2f ns a vector of %d scores\n", packing, measuring,
                1e3 * measuring / static_cast<double>(c.queries * c.keys * c.heads / kWidth), kWidth);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 5 && std::string(argv[1]) == "time") {
        const int64_t tokens = std::atoll(argv[2]), heads = std::atoll(argv[3]), block = std::atoll(argv[5]);
        Case c = {"time", kF32, 1, heads, heads, tokens, tokens, std::atoll(argv[4]), block, tokens / block / 2};
        if (argc > 6) c.dtype = static_cast<DType>(std::atoi(argv[6]));
        measure_time(c, argc > 7 ? std::atoi(argv[7]) : 10);
        return 0;
    }
    bool right = true;
    for (const Case& c : kCases) right = check(c) && right;
    for (const DType dtype : {kF32, kB16, kF16})
        for (const bool lse : {false, true}) right = check_nan(dtype, lse) && right;
    return right ? 0 : 1;
}
