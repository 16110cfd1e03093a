// Attention over listed blocks against double precision: lists, key lengths, shared heads of keys, log-sum-exps, int8
// scores. Part of attention_harness.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/attention/kernel.inl"
#include "aligned.h"

namespace pdn {
namespace attention {
namespace {

struct SparseCase {
    const char* why;
    DType dtype;
    int64_t batch, heads, group, queries, keys, size, block;
    double density = 0.5;  // of the blocks
    bool int8 = false;
    bool narrow = true;                 // lists of 16 bits
    bool shared = false;                // one mask for all batches and heads
    bool projected = false;             // the heads of a token beside each other
    std::vector<int32_t> lengths = {};  // of the keys; empty: all
    float spread = 1;                   // of queries and keys
};

const SparseCase kSparseCases[] = {
    {"whole blocks", DType::float32, 1, 2, 1, 256, 256, 64, 128},
    {"runs of short blocks", DType::float32, 1, 2, 1, 130, 700, 24, 16, 0.7},
    {"few short blocks", DType::float32, 1, 2, 2, 100, 600, 32, 16, 0.1, false, false},
    {"short tails", DType::float32, 2, 2, 1, 75, 203, 40, 64},
    {"three heads read one", DType::float32, 2, 6, 3, 70, 70, 16, 32, 0.5, false, true, false, true},
    {"one mask for all", DType::float32, 2, 2, 1, 100, 100, 8, 32, 0.5, false, false, true},
    {"key lengths", DType::float32, 4, 2, 1, 100, 100, 20, 32, 0.5, false, true, false, false, {45, 64, 0, 100}},
    {"nothing listed", DType::float32, 1, 1, 1, 40, 40, 8, 16, 0.},
    {"sharp, later keys larger", DType::float32, 1, 2, 1, 60, 900, 32, 64, 0.8, false, true, false, false, {}, 6},
    {"odd heads", DType::float32, 1, 2, 1, 33, 90, 11, 16},
    {"long heads", DType::float32, 1, 1, 1, 70, 300, 200, 64},
    {"bfloat16", DType::bfloat16, 1, 2, 1, 130, 300, 64, 64},
    {"bfloat16, odd heads, projected", DType::bfloat16, 2, 4, 2, 70, 77, 13, 16, 0.6, false, true, false, true},
    {"bfloat16, key lengths", DType::bfloat16, 2, 2, 1, 50, 90, 32, 32, 0.8, false, true, false, true, {33, 90}},
    {"float16", DType::float16, 1, 2, 1, 70, 150, 40, 32},
    {"int8", DType::float32, 1, 2, 1, 256, 512, 64, 128, 0.6, true},
    {"int8, short blocks", DType::float32, 1, 4, 2, 100, 500, 24, 16, 0.4, true, true, false, true},
    {"int8, odd heads, lengths", DType::float32, 3, 2, 1, 70, 90, 11, 32, 0.7, true, true, false, false, {90, 0, 37}},
    {"int8, bfloat16", DType::bfloat16, 1, 2, 1, 130, 300, 40, 64, 0.6, true},
    {"int8, float16, long heads", DType::float16, 1, 1, 1, 40, 100, 130, 32, 0.8, true},
};

// [batch, heads, count, size] of a dtype, with the values as floats.
class SparseTensor {
  public:
    int64_t batch_stride = 0, head_stride = 0, row_stride = 0;

    SparseTensor(const SparseCase& c, int64_t heads, int64_t count) : dtype_(c.dtype) {
        row_stride = c.projected ? heads * c.size : c.size + 3;
        head_stride = c.projected ? c.size : count * row_stride;
        batch_stride = heads * count * c.size + (c.projected ? 0 : heads * count * 3);
        floats.resize(static_cast<size_t>(c.batch * batch_stride), NAN);
        halves.resize(c.dtype == DType::float32 ? 0 : floats.size(), 0x7fff);
    }
    int64_t at(int64_t image, int64_t head, int64_t row, int64_t d) const {
        return image * batch_stride + head * head_stride + row * row_stride + d;
    }
    void set(int64_t i, float x) {
        const auto at = static_cast<size_t>(i);
        floats[at] = x;
        if (dtype_ == DType::bfloat16) floats[at] = from_bf16(halves[at] = to_bf16(x));
        if (dtype_ == DType::float16) floats[at] = from_fp16({halves[at] = to_fp16(x).bits});
    }
    float get(int64_t i) const {
        const auto at = static_cast<size_t>(i);
        if (dtype_ == DType::float32) return floats[at];
        return dtype_ == DType::bfloat16 ? from_bf16(halves[at]) : from_fp16({halves[at]});
    }
    void* data() { return halves.empty() ? static_cast<void*>(floats.data()) : halves.data(); }

    std::vector<float> floats;
    std::vector<uint16_t> halves;

  private:
    DType dtype_;
};

struct SparseProblem {
    SparseCase c;
    AttentionParams p{};
    SparseTensor query, key, value, output;
    std::vector<int32_t> counts, wide;
    std::vector<int16_t> narrow;
    std::vector<float> lse;
    int64_t rows, columns;

    explicit SparseProblem(const SparseCase& given)
        : c(given),
          query(c, c.heads, c.queries),
          key(c, c.heads / c.group, c.keys),
          value(c, c.heads / c.group, c.keys),
          output(c, c.heads, c.queries),
          rows((c.queries + c.block - 1) / c.block),
          columns((c.keys + c.block - 1) / c.block) {
        std::mt19937 generator(11);
        fill(query, c.heads, c.queries, c.spread, generator);
        fill(key, c.heads / c.group, c.keys, c.spread, generator);
        fill(value, c.heads / c.group, c.keys, 1, generator);
        const int64_t lists = (c.shared ? 1 : c.batch * c.heads) * rows;
        for (int64_t list = 0; list < lists; ++list) {
            std::vector<int32_t> kept;
            for (int32_t j = 0; j < columns; ++j)
                if (std::uniform_real_distribution<>()(generator) < c.density) kept.push_back(j);
            counts.push_back(static_cast<int32_t>(kept.size()));
            kept.resize(static_cast<size_t>(columns), -7);  // never to be looked at
            wide.insert(wide.end(), kept.begin(), kept.end());
        }
        for (const int32_t j : wide) narrow.push_back(static_cast<int16_t>(j));
        lse.resize(static_cast<size_t>(c.batch * c.heads * c.queries), NAN);
        const auto tokens = [](SparseTensor& t, int64_t count) {
            return Tokens{t.data(), count, t.batch_stride, t.head_stride, t.row_stride};
        };
        p.dtype = c.dtype;
        p.batch = c.batch, p.heads = c.heads, p.group = c.group, p.size = c.size;
        p.query = tokens(query, c.queries), p.key = tokens(key, c.keys), p.value = tokens(value, c.keys);
        p.lists = {counts.data(), nullptr, c.narrow, columns, c.shared ? 0 : c.heads, c.shared ? 0 : 1};
        p.lists.indices = c.narrow ? static_cast<const void*>(narrow.data()) : wide.data();
        p.block_size = c.block;
        p.key_lengths = c.lengths.empty() ? nullptr : c.lengths.data();
        p.scale = 1.f / std::sqrt(static_cast<float>(c.size));
        p.int8 = c.int8;
        p.output = output.data();
        p.output_batch_stride = output.batch_stride, p.output_head_stride = output.head_stride;
        p.output_row_stride = output.row_stride;
        p.lse = lse.data();
    }
    void fill(SparseTensor& t, int64_t heads, int64_t count, float deviation, std::mt19937& generator) {
        std::normal_distribution<float> normal(0, deviation);
        for (int64_t i = 0; i < c.batch * heads * count; ++i)
            for (int64_t d = 0; d < c.size; ++d)
                t.set(t.at(i / (heads * count), i / count % heads, i % count, d), normal(generator) + 0.3f);
    }
    int64_t valid(int64_t image) const { return c.lengths.empty() ? c.keys : c.lengths[static_cast<size_t>(image)]; }
    // The blocks that a query of a head reads.
    std::vector<int32_t> listed(int64_t image, int64_t head, int64_t q) const {
        const int64_t list = (c.shared ? 0 : image * c.heads + head) * rows + q / c.block;
        const auto begin = wide.begin() + list * columns;
        return {begin, begin + counts[static_cast<size_t>(list)]};
    }
};

// Everything, on scratch memory of which every byte is `poison`; returns the codes of the keys.
Values<char> run_sparse(const AttentionParams& p, int poison) {
    const int64_t kv_heads = p.heads / p.group;
    Values<char> codes(p.int8 ? static_cast<size_t>(p.batch * kv_heads * code_bytes(p)) : 0, static_cast<char>(poison));
    for (int64_t i = 0; p.int8 && i < p.batch * kv_heads; ++i) {
        average_keys(p, i / kv_heads, i % kv_heads, codes.data());
        for (int64_t block = 0; block * p.block_size < p.key.count; ++block)
            encode_keys(p, i / kv_heads, i % kv_heads, block, codes.data());
    }
    Values<char> scratch(static_cast<size_t>(scratch_bytes(p)), static_cast<char>(poison));
    for (int64_t head = p.batch * p.heads - 1; head >= 0; --head)
        for (int64_t q = 0; q < p.query.count; q += p.block_size)
            attend(p, head / p.heads, head % p.heads, q, std::min(p.query.count, q + p.block_size), codes.data(),
                   scratch.data());
    return codes;
}

// Codes of a head of keys near what they stand for; as numbers.
bool check_codes(const SparseProblem& s, Values<char>& memory, int64_t image, int64_t kv_head,
                 std::vector<double>& means, std::vector<double>& keys) {
    const SparseCase& c = s.c;
    const KeyCodes codes(s.p, image, kv_head, memory.data());
    bool right = true;
    for (int64_t d = 0; d < c.size; ++d) {
        double sum = 0;
        for (int64_t k = 0; k < s.valid(image); ++k) sum += s.key.get(s.key.at(image, kv_head, k, d));
        const double mean = s.valid(image) > 0 ? sum / static_cast<double>(s.valid(image)) : 0;
        right = right && std::abs(mean - codes.mean[d]) < 1e-5;
        means.push_back(codes.mean[d]);
    }
    for (int64_t k = 0; k < s.valid(image); ++k)
        for (int64_t d = 0; d < c.size; ++d) {
            const double scale = codes.scales[k / c.block];
            const auto* row = reinterpret_cast<const Code*>(codes.codes + k * code_cells(s.p) * 4);
            const double decoded = scale * (row[d] - kOffset);
            right = right && std::abs(row[d] - kOffset) <= 127 &&
                    std::abs(decoded - (s.key.get(s.key.at(image, kv_head, k, d)) - codes.mean[d])) <= 0.501 * scale;
            keys.push_back(decoded);
        }
    return right;
}

bool check_head(SparseProblem& s, Values<char>& codes, int64_t image, int64_t head, double& worst, double& worst_lse) {
    const SparseCase& c = s.c;
    const int64_t kv_head = head / c.group;
    std::vector<double> means, keys;
    bool right = !c.int8 || check_codes(s, codes, image, kv_head, means, keys);
    for (int64_t q = 0; q < c.queries; ++q) {
        const int64_t block = q / c.block * c.block;
        float largest = 0;
        for (int64_t i = block; i < std::min(block + c.block, c.queries); ++i)
            for (int64_t d = 0; d < c.size; ++d)
                largest = std::max(largest, std::abs(s.query.get(s.query.at(image, head, i, d))));
        const float scale = largest / 127.f;
        std::vector<double> weights, sums(static_cast<size_t>(c.size));
        std::vector<int64_t> read;
        double top = -INFINITY, total = 0, shift = 0;
        for (int64_t d = 0; c.int8 && d < c.size; ++d)
            shift += s.p.scale * s.query.get(s.query.at(image, head, q, d)) * means[static_cast<size_t>(d)];
        for (const int32_t j : s.listed(image, head, q))
            for (int64_t k = j * c.block; k < std::min((j + 1) * c.block, s.valid(image)); ++k) {
                double score = 0;
                for (int64_t d = 0; d < c.size; ++d) {
                    const float x = s.query.get(s.query.at(image, head, q, d));
                    score += c.int8 ? static_cast<double>(std::nearbyint(x / scale)) * scale *
                                          keys[static_cast<size_t>(k * c.size + d)]
                                    : static_cast<double>(x) * s.key.get(s.key.at(image, kv_head, k, d));
                }
                weights.push_back(score * s.p.scale);
                top = std::max(top, weights.back());
                read.push_back(k);
            }
        for (size_t i = 0; i < read.size(); ++i) {
            total += weights[i] = std::exp(weights[i] - top);
            for (int64_t d = 0; d < c.size; ++d)
                sums[static_cast<size_t>(d)] += weights[i] * s.value.get(s.value.at(image, kv_head, read[i], d));
        }
        const float lse = s.lse[static_cast<size_t>((image * c.heads + head) * c.queries + q)];
        if (read.empty())
            right = right && lse == -INFINITY;
        else
            worst_lse = std::max(worst_lse, std::abs(lse - (top + std::log(total) + shift)));
        right = right && lse == lse;
        for (int64_t d = 0; d < c.size; ++d) {
            const double expected = read.empty() ? 0 : sums[static_cast<size_t>(d)] / total;
            const double error = std::abs(s.output.get(s.output.at(image, head, q, d)) - expected);
            right = right && error < 1e9 && (!read.empty() || error == 0);
            worst = std::max(worst, error);
        }
    }
    return right;
}

bool check_sparse(const SparseCase& c) {
    SparseProblem s(c), again(c);
    Values<char> codes = run_sparse(s.p, 0xff);
    run_sparse(again.p, 0);
    bool right = std::memcmp(s.output.data(), again.output.data(),
                             s.output.floats.size() * (c.dtype == DType::float32 ? 4 : 2)) == 0 &&
                 std::memcmp(s.lse.data(), again.lse.data(), s.lse.size() * 4) == 0;
    double worst = 0, worst_lse = 0;
    for (int64_t head = 0; head < c.batch * c.heads; ++head)
        right = check_head(s, codes, head / c.heads, head % c.heads, worst, worst_lse) && right;
    const bool floats = c.dtype == DType::float32;
    const double bound = floats ? 5e-6 * c.spread : c.dtype == DType::float16 ? 2e-3 : 2e-2;
    right = right && worst <= bound && worst_lse <= (c.dtype == DType::bfloat16 ? 3e-4 : 4e-6 * c.spread * c.spread);
    std::printf("%-32s %s  error %.2e, of log-sum-exps %.2e\n", c.why, right ? "ok " : "BAD", worst, worst_lse);
    return right;
}

// A NaN or infinity in a key or value reaches the queries that read its block, and no others.
bool check_sparse_poison() {
    bool right = true;
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
        const SparseCase c = {"poison", dtype, 1, 2, 1, 130, 300, 24, 32, 0.4};
        SparseProblem clean(c), struck(c);
        struck.key.set(struck.key.at(0, 0, 70, 3), INFINITY);  // block 2
        struck.value.set(struck.value.at(0, 1, 130, 5), NAN);  // block 4
        struck.query.set(struck.query.at(0, 0, 33, 1), NAN);
        run_sparse(clean.p, 0xff);
        run_sparse(struck.p, 0xff);
        for (int64_t i = 0; i < 2 * c.queries; ++i) {
            const int64_t head = i / c.queries, q = i % c.queries;
            const auto reads = [&](int32_t block) {
                const std::vector<int32_t> list = clean.listed(0, head, q);
                return std::find(list.begin(), list.end(), block) != list.end();
            };
            for (int64_t d = 0; d < c.size; ++d) {
                const float a = clean.output.get(clean.output.at(0, head, q, d));
                const float b = struck.output.get(struck.output.at(0, head, q, d));
                if (head == 0 && q == 33)
                    right = right && std::isnan(b);
                else if (head == 1 ? !(d == 5 && reads(4)) : !reads(2))
                    right = right && std::memcmp(&a, &b, sizeof a) == 0;
                else if (head == 1)
                    right = right && std::isnan(b);
            }
        }
    }
    std::printf("%-32s %s\n", "only readers see poison", right ? "ok " : "BAD");
    return right;
}

bool check_all_sparse() {
    bool right = check_sparse_poison();
    for (const SparseCase& c : kSparseCases) right = check_sparse(c) && right;
    return right;
}

}  // namespace
}  // namespace attention
}  // namespace pdn
