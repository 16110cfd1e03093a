// Stand-alone check and timing of csrc/block_sparse_attention, without torch:
//   g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno [ISA flags] THIS -o harness
//   ./harness                                                    all cases against double precision; exit 1 on a
//   failure
//   ./harness time TOKENS HEADS SIZE BLOCK [DTYPE REPEATS DENSITY]  best microseconds of all steps, one thread
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "../../csrc/block_sparse_attention/kernel.inl"
#include "aligned.h"
#include "clock.h"

using namespace pdn;
using namespace pdn::block_sparse_attention;

namespace {

struct Case {
    const char* why;
    DType dtype;
    int64_t batch, heads, kv_heads, queries, keys, size, block;
    float density = 0.6f;
    bool shared = false, narrow = false;  // one list for all heads; int16 lists
    float spread = 1, scale = 0;          // of queries and keys; 0: 1 / sqrt(size)
    int64_t gap = 0;                      // elements between tokens that belong to nobody
    int32_t lengths[2] = {-1, -1};
};

constexpr DType kF32 = DType::float32, kB16 = DType::bfloat16, kF16 = DType::float16;

const Case kCases[] = {
    {"dense", kF32, 1, 2, 2, 256, 256, 64, 64, 1},
    {"dense, spans inside blocks", kF32, 1, 1, 1, 256, 256, 32, 128, 1},
    {"odd ends", kF32, 2, 2, 2, 77, 203, 40, 32, 0.5f, false, true, 1, 0, 3},
    {"shared heads", kF32, 1, 6, 2, 100, 140, 24, 16, 0.4f},
    {"one list for all", kF32, 2, 4, 2, 100, 100, 24, 32, 0.5f, true, true},
    {"several tiles of elements", kF32, 1, 2, 1, 150, 140, 144, 64, 0.5f},
    {"short heads", kF32, 1, 2, 2, 90, 90, 8, 16, 0.5f},
    {"odd heads", kF32, 1, 2, 2, 33, 47, 11, 16, 0.5f},
    {"one element", kF32, 1, 1, 1, 33, 47, 1, 16, 0.7f},
    {"one token", kF32, 2, 1, 1, 1, 1, 5, 32, 1},
    {"nothing kept", kF32, 1, 2, 2, 50, 50, 16, 16, 0},
    {"lengths inside a block and none", kF32, 2, 2, 1, 60, 150, 32, 32, 0.8f, false, false, 1, 0, 0, {45, 0}},
    {"lengths at the edge and beyond", kF32, 2, 1, 1, 60, 150, 32, 64, 1, false, false, 1, 0, 0, {64, 1000}},
    {"sharp", kF32, 1, 2, 2, 130, 260, 64, 64, 0.7f, false, false, 4},
    {"negative scale", kF32, 1, 1, 1, 64, 100, 24, 32, 0.7f, false, false, 1, -0.3f},
    {"bfloat16, dense", kB16, 1, 2, 2, 256, 256, 64, 128, 1},
    {"bfloat16, odd", kB16, 2, 2, 1, 33, 95, 13, 16, 0.6f, false, true, 1, 0, 3, {93, 50}},
    {"bfloat16, several tiles", kB16, 1, 2, 2, 131, 77, 161, 32, 0.6f},
    {"bfloat16, one token", kB16, 1, 1, 1, 1, 1, 2, 64, 1},
    {"bfloat16, sharp", kB16, 1, 2, 2, 130, 260, 64, 64, 0.7f, false, false, 4},
    {"float16", kF16, 1, 2, 2, 50, 170, 40, 32, 0.6f, false, false, 1, 0, 1, {100, 0}},
};

uint16_t narrowed(float x, DType dtype) { return dtype == kB16 ? to_bf16(x) : to_fp16(x).bits; }
float widened(uint16_t x, DType dtype) { return dtype == kB16 ? from_bf16(x) : from_fp16({x}); }

// Tokens as the kernel reads them, and the same as floats.
struct Input {
    Values<float> floats;
    Values<uint16_t> halves;
    Tokens tokens{};

    void build(const Case& c, int64_t heads, int64_t count, float spread, std::mt19937& generator) {
        std::normal_distribution<float> normal(0, spread);
        tokens = {nullptr, count, heads * count * (c.size + c.gap), count * (c.size + c.gap), c.size + c.gap};
        floats.resize(static_cast<size_t>(c.batch * tokens.batch_stride - c.gap));
        for (float& x : floats) x = normal(generator);
        if (c.dtype != kF32)
            for (float& x : floats) {
                halves.push_back(narrowed(x, c.dtype));
                x = widened(halves.back(), c.dtype);
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

// A dense result in the case's dtype.
struct Output {
    DType dtype = kF32;
    Values<float> floats;
    Values<uint16_t> halves;

    void* take(const Case& c, int64_t heads, int64_t count) {
        dtype = c.dtype;
        const auto n = static_cast<size_t>(c.batch * heads * count * c.size);
        floats.assign(dtype == kF32 ? n : 0, NAN);
        halves.assign(dtype == kF32 ? 0 : n, 0x7fff);
        return dtype == kF32 ? static_cast<void*>(floats.data()) : halves.data();
    }
    size_t size() const { return floats.size() + halves.size(); }
    double at(size_t i) const { return dtype == kF32 ? floats[i] : widened(halves[i], dtype); }
    bool operator==(const Output& other) const {
        return halves == other.halves &&
               (floats.empty() || std::memcmp(floats.data(), other.floats.data(), floats.size() * 4) == 0);
    }
};

struct Problem {
    Case c;
    BackwardParams p{};
    Input grad, query, key, value;
    Values<float> lse, delta;
    std::vector<char> kept;  // [lists][query blocks][key blocks]
    Values<int32_t> counts, wide;
    Values<int16_t> narrow;
    Output results[3];
    int64_t rows, columns;

    explicit Problem(const Case& given) : c(given) {
        std::mt19937 generator(7);
        rows = (c.queries + c.block - 1) / c.block, columns = (c.keys + c.block - 1) / c.block;
        grad.build(c, c.heads, c.queries, 1, generator);
        query.build(c, c.heads, c.queries, c.spread, generator);
        key.build(c, c.kv_heads, c.keys, c.spread, generator);
        value.build(c, c.kv_heads, c.keys, 1, generator);
        p = {c.dtype,      c.batch, c.heads, c.kv_heads, c.size, c.block, grad.tokens, query.tokens, key.tokens,
             value.tokens, nullptr, nullptr, {},         0,      nullptr, nullptr,     nullptr,      nullptr};
        p.scale = c.scale != 0 ? c.scale : 1.f / std::sqrt(static_cast<float>(c.size));
        if (c.lengths[0] >= 0) p.key_lengths = c.lengths;
        make_lists(generator);
        p.grad_query = results[0].take(c, c.heads, c.queries);
        p.grad_key = results[1].take(c, c.kv_heads, c.keys);
        p.grad_value = results[2].take(c, c.kv_heads, c.keys);
    }
    Problem(const Problem&) = delete;

    void make_lists(std::mt19937& generator) {
        const int64_t lists = c.shared ? 1 : c.batch * c.heads;
        for (int64_t i = 0; i < lists * rows * columns; ++i)
            kept.push_back(static_cast<float>(generator() % 1000) < 1000 * c.density);
        for (int64_t i = 0; i < lists * columns; ++i) {
            int32_t count = 0;
            for (int64_t row = 0; row < rows; ++row)
                if (kept[static_cast<size_t>((i / columns * rows + row) * columns + i % columns)]) {
                    wide.push_back(static_cast<int32_t>(row));
                    ++count;
                }
            counts.push_back(count);
            wide.resize(static_cast<size_t>((i + 1) * rows), -7);  // never read
        }
        narrow.assign(wide.begin(), wide.end());
        p.readers = {counts.data(), wide.data(), false, rows, c.shared ? 0 : c.heads * columns, c.shared ? 0 : columns};
        if (c.narrow) p.readers.indices = narrow.data(), p.readers.narrow = true;
    }
    bool keeps(int64_t image, int64_t head, int64_t q, int64_t k) const {
        const int64_t list = c.shared ? 0 : image * c.heads + head;
        return kept[static_cast<size_t>((list * rows + q / c.block) * columns + k / c.block)] &&
               (p.key_lengths == nullptr || k < p.key_lengths[image]);
    }
    double dot(const Input& a, const Input& b, int64_t image, int64_t head, int64_t q, int64_t k) const {
        double sum = 0;
        for (int64_t d = 0; d < c.size; ++d)
            sum += a.at(image, head, q, d) * b.at(image, head / (c.heads / c.kv_heads), k, d);
        return sum;
    }

    // Fills lse and delta, and returns the gradients of query, key and value.
    void expect(std::vector<double> (&grads)[3]) {
        for (int i = 0; i < 3; ++i) grads[i].assign(results[i].size(), 0);
        const auto keys = static_cast<size_t>(c.keys);
        for (int64_t i = 0; i < c.batch * c.heads * c.queries; ++i) {
            const int64_t image = i / (c.heads * c.queries), head = i / c.queries % c.heads, q = i % c.queries;
            std::vector<double> weights(keys), inner(keys);
            double top = -INFINITY, total = 0, difference = 0;
            for (int64_t k = 0; k < c.keys; ++k) {
                const bool counts_too = keeps(image, head, q, k);
                weights[static_cast<size_t>(k)] = counts_too ? dot(query, key, image, head, q, k) * p.scale : -INFINITY;
                top = std::max(top, weights[static_cast<size_t>(k)]);
            }
            for (double& w : weights) total += w = top == -INFINITY ? 0 : std::exp(w - top);
            for (int64_t k = 0; k < c.keys; ++k) {
                const auto at = static_cast<size_t>(k);
                weights[at] = total > 0 ? weights[at] / total : 0;
                inner[at] = weights[at] > 0 ? dot(grad, value, image, head, q, k) : 0;
                difference += weights[at] * inner[at];
            }
            lse.push_back(static_cast<float>(top + std::log(total)));
            delta.push_back(static_cast<float>(difference));
            for (int64_t k = 0; k < c.keys; ++k) {
                const auto at = static_cast<size_t>(k);
                if (weights[at] == 0) continue;
                const double score = weights[at] * (inner[at] - difference) * p.scale;
                const int64_t kv = head / (c.heads / c.kv_heads);
                for (int64_t d = 0; d < c.size; ++d) {
                    const auto to = static_cast<size_t>(((image * c.kv_heads + kv) * c.keys + k) * c.size + d);
                    grads[0][static_cast<size_t>(i * c.size + d)] += score * key.at(image, kv, k, d);
                    grads[1][to] += score * query.at(image, head, q, d);
                    grads[2][to] += weights[at] * grad.at(image, head, q, d);
                }
            }
        }
        p.lse = lse.data(), p.delta = delta.data();
    }
};

// As dispatch.cpp does; `backwards`: items and pieces in descending order.
void run(const BackwardParams& p, int64_t rounds, bool backwards = false) {
    const int64_t group = p.heads / p.kv_heads, query_blocks = (p.query.count + p.block - 1) / p.block;
    const int64_t key_blocks = (p.key.count + p.block - 1) / p.block;
    const auto each = [&](int64_t count, const auto& body) {
        for (int64_t i = 0; i < count; ++i) body(backwards ? count - 1 - i : i);
    };
    const auto pieces = [](int64_t tokens) { return (tokens + kPiece - 1) / kPiece; };
    Values<char> workspace(static_cast<size_t>(workspace_bytes(p))), scratch(static_cast<size_t>(scratch_bytes(p)));
    for (int64_t i = 0; i < p.batch * p.kv_heads; ++i) {
        const int64_t image = i / p.kv_heads, kv = i % p.kv_heads;
        std::fill(workspace.begin(), workspace.end(), static_cast<char>(0xff));
        std::fill(scratch.begin(), scratch.end(), static_cast<char>(0xff));
        each(pieces(p.key.count), [&](int64_t at) { begin_keys(p, image, kv, at, workspace.data()); });
        for (int64_t head = kv * group; head < (kv + 1) * group; ++head)
            each(pieces(p.query.count), [&](int64_t at) { begin_queries(p, image, head, at, workspace.data()); });
        for (int64_t round = 0; round < rounds; ++round)
            each(rounds, [&](int64_t keys) {
                const int64_t queries = (keys + round) % rounds;
                accumulate(p, image, kv, keys * key_blocks / rounds, (keys + 1) * key_blocks / rounds,
                           queries * query_blocks / rounds, (queries + 1) * query_blocks / rounds, workspace.data(),
                           scratch.data());
            });
        each(pieces(p.key.count), [&](int64_t at) { end_keys(p, image, kv, at, workspace.data()); });
        for (int64_t head = kv * group; head < (kv + 1) * group; ++head)
            each(pieces(p.query.count), [&](int64_t at) { end_queries(p, image, head, at, workspace.data()); });
    }
}

bool check(const Case& c) {
    Problem problem(c);
    std::vector<double> expected[3];
    problem.expect(expected);
    const int64_t rounds = std::min<int64_t>(3, std::min(problem.rows, problem.columns));
    run(problem.p, rounds);
    const Output first[3] = {problem.results[0], problem.results[1], problem.results[2]};
    run(problem.p, rounds, true);
    const double unit = c.dtype == kF32 ? 1e-6 : c.dtype == kF16 ? 6e-4 : 8e-3;
    double worst[3] = {};  // over the bound; an error of a score is a relative error of its weight
    bool same = true;
    for (int i = 0; i < 3; ++i) {
        same = same && first[i] == problem.results[i];
        double largest = 0.3;  // gradients that cancel keep the rounding of what they cancel
        for (const double x : expected[i]) largest = std::max(largest, std::abs(x));
        for (size_t j = 0; j < expected[i].size(); ++j) {
            const double error =
                std::abs(problem.results[i].at(j) - expected[i][j]) / (unit * c.spread * c.spread * largest + 1e-30);
            worst[i] = std::isnan(error) ? INFINITY : std::max(worst[i], error);
        }
    }
    const bool right = same && worst[0] <= 2 && worst[1] <= 2 && worst[2] <= 2;
    std::printf("%-36s %s  of the bound: query %.2f, key %.2f, value %.2f%s\n", c.why, right ? "ok " : "BAD",
                worst[0] / 2, worst[1] / 2, worst[2] / 2, same ? "" : ", depends on the order");
    return right;
}

// A NaN in a query stays in its row of the gradient, and in the keys that it reads; what lies beyond a length, and
// between tokens, is not read.
bool check_nan(DType dtype) {
    const Case c = {"", dtype, 1, 2, 2, 70, 200, 24, 32, 0.4f, false, false, 1, 0, 2, {150, 0}};
    Problem whole(c), poisoned(c);
    std::vector<double> expected[3];
    whole.expect(expected), poisoned.expect(expected);
    poisoned.query.set(dtype, 0, 1, 40, NAN);
    poisoned.lse[70 + 40] = NAN;
    for (int64_t k = 150; k < 200; ++k) {
        poisoned.key.set(dtype, 0, 0, k, NAN);
        poisoned.value.set(dtype, 0, 1, k, INFINITY);
    }
    run(whole.p, 2), run(poisoned.p, 2);
    bool right = true;
    for (int i = 0; i < 3; ++i)
        for (size_t j = 0; j < whole.results[i].size(); ++j) {
            const int64_t token = static_cast<int64_t>(j) / c.size;
            const bool struck = i == 0 ? token == 70 + 40 : token >= 200 && whole.keeps(0, 1, 40, token - 200);
            const double a = whole.results[i].at(j), b = poisoned.results[i].at(j);
            right = right && (struck ? std::isnan(b) : a == b);
        }
    std::printf("%-36s %s\n", "NaN stays where it is read", right ? "ok " : "BAD");
    return right;
}

// The best time of every part by itself, added up: on a busy machine long runs are always disturbed.
void measure_time(const Case& c, int repeats) {
    Problem problem(c);
    problem.lse.assign(static_cast<size_t>(c.heads * c.queries), std::log(static_cast<float>(c.keys)) + 0.5f);
    problem.delta.assign(problem.lse.size(), 0.f);
    BackwardParams& p = problem.p;
    p.lse = problem.lse.data(), p.delta = problem.delta.data();
    Values<char> workspace(static_cast<size_t>(workspace_bytes(p))), scratch(static_cast<size_t>(scratch_bytes(p)));
    double around = 0, accumulating = 0;
    const auto best_of = [&](const auto& part) {
        double best = 1e30;
        for (int i = 0; i < repeats; ++i) {
            const double begin = now();
            part();
            best = std::min(best, now() - begin);
        }
        return best;
    };
    const int64_t step = std::max<int64_t>(1, 512 / c.block);
    for (int64_t head = 0; head < p.heads; ++head) {
        for (int64_t i = 0; i * kPiece < c.keys; ++i)
            around += best_of([&] { begin_keys(p, 0, head, i, workspace.data()); }) +
                      best_of([&] { begin_queries(p, 0, head, i, workspace.data()); });
        for (int64_t k = 0; k < problem.columns; k += step)
            for (int64_t q = 0; q < problem.rows; q += step)
                accumulating += best_of([&] {
                    accumulate(p, 0, head, k, std::min(problem.columns, k + step), q, std::min(problem.rows, q + step),
                               workspace.data(), scratch.data());
                });
        for (int64_t i = 0; i * kPiece < c.keys; ++i)
            around += best_of([&] { end_keys(p, 0, head, i, workspace.data()); }) +
                      best_of([&] { end_queries(p, 0, head, i, workspace.data()); });
    }
    std::printf("begin and end %.1f us, accumulate %.1f us: %.2f ns a vector of %d scores\n", around, accumulating,
                1e3 * accumulating / (static_cast<double>(c.queries * c.keys * c.heads) / kWidth * c.density), kWidth);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 5 && std::string(argv[1]) == "time") {
        const int64_t tokens = std::atoll(argv[2]), heads = std::atoll(argv[3]);
        Case c = {"time", kF32, 1, heads, heads, tokens, tokens, std::atoll(argv[4]), std::atoll(argv[5]), 1};
        if (argc > 6) c.dtype = static_cast<DType>(std::atoi(argv[6]));
        if (argc > 8) c.density = static_cast<float>(std::atof(argv[8]));
        measure_time(c, argc > 7 ? std::atoi(argv[7]) : 5);
        return 0;
    }
    bool right = true;
    for (const Case& c : kCases) right = check(c) && right;
    for (const DType dtype : {kF32, kB16, kF16}) right = check_nan(dtype) && right;
    return right ? 0 : 1;
}
