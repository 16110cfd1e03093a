// Runs the CUDA attention kernels on the host, lane by lane (cuda_emulator.h), against plain loops in double: block
// lists, tails, masks, padding of heads, groups of heads, int8 scores, gradients, importances; memory accesses under
// sanitizers, barriers and copies by the emulator. Prints one line per case; exits 1 if any is wrong.
// clang-format off
#include "cuda_emulator.h"  // first: it stands in for CUDA
// clang-format on
#include <string>

#include "../../csrc/block_importance/cuda_kernels.cuh"
#include "../../csrc/block_sparse_attention/cuda_backward.cuh"
#include "../../csrc/block_sparse_attention/cuda_wgmma.cuh"

namespace {

using namespace pdn;

uint32_t state = 12345;
double uniform() {  // in [-1, 1)
    state = state * 1664525u + 1013904223u;
    return static_cast<int32_t>(state) / 2147483648.0;
}
double normal() { return (uniform() + uniform() + uniform() + uniform()) * 0.87; }

struct alignas(16) Chunk {
    char bytes[16];
};

// A tensor [B, H, L, D]: as `type` in memory with rows of `pitch` elements (what lies between is poison), and in
// double.
struct Tensor {
    Element type;
    int batch, heads, rows, size, pitch;
    std::vector<Chunk> memory;
    std::vector<double> values;

    Tensor(Element t, int b, int h, int l, int d, int gap = 0)
        : type(t),
          batch(b),
          heads(h),
          rows(l),
          size(d),
          pitch(d + gap),
          memory((static_cast<size_t>(b) * h * l * pitch * 4 + 15) / 16),
          values(static_cast<size_t>(b) * h * l * d) {
        std::memset(memory.data(), 0xff, memory.size() * sizeof(Chunk));
    }
    void fill(double spread) {
        for (size_t i = 0; i < values.size(); ++i) {
            put(i, static_cast<float>(normal() * spread));
            values[i] = get(i);
        }
    }
    size_t place(size_t i) const { return i / size * pitch + i % size; }
    void put(size_t i, float x) {
        if (type == Element::float32) {
            from_float(x, reinterpret_cast<float*>(memory.data())[place(i)]);
        } else if (type == Element::bfloat16) {
            from_float(x, reinterpret_cast<BFloat16*>(memory.data())[place(i)]);
        } else {
            from_float(x, reinterpret_cast<Float16*>(memory.data())[place(i)]);
        }
    }
    double get(size_t i) const { return load_element(memory.data(), type, static_cast<int64_t>(place(i))); }
    const double* row(int b, int h, int l) const {
        return &values[((static_cast<size_t>(b) * heads + h) * rows + l) * size];
    }
    cuda::Tokens tokens() const {
        const int64_t head = static_cast<int64_t>(rows) * pitch;
        return {memory.data(), head * heads, head, pitch};
    }
};

struct Case {
    const char* name;
    Element type;
    int batch, heads, kv_heads, queries, keys, size, block;
    double density;
    bool wide, shared, lengths, int8;
    int gap;
    float scale;
    int new_blocks;
    bool sink = false, only_wgmma = false;
};

// Lists of blocks drawn at random; unused places hold numbers that must not be read.
struct Lists {
    int batch, heads, rows, columns;
    std::vector<int32_t> counts, numbers;
    std::vector<int16_t> narrow;
    std::vector<char> dense;

    Lists(const Case& c, int r, int n)
        : batch(c.shared ? 1 : c.batch), heads(c.shared ? 1 : c.heads), rows(r), columns(n) {
        const int total = batch * heads * rows;
        dense.resize(static_cast<size_t>(total) * columns);
        for (auto& kept : dense) kept = (uniform() + 1) / 2 < c.density;
        collect();
    }
    Lists(const Lists& from, bool) : batch(from.batch), heads(from.heads), rows(from.columns), columns(from.rows) {
        dense.resize(from.dense.size());
        for (int i = 0; i < batch * heads; ++i)
            for (int r = 0; r < rows; ++r)
                for (int c = 0; c < columns; ++c)
                    dense[(static_cast<size_t>(i) * rows + r) * columns + c] =
                        from.dense[(static_cast<size_t>(i) * columns + c) * rows + r];
        collect();
    }
    void collect() {
        const int total = batch * heads * rows;
        counts.assign(total, 0), numbers.assign(static_cast<size_t>(total) * columns, -7);
        for (int i = 0; i < total; ++i)
            for (int c = 0; c < columns; ++c)
                if (dense[static_cast<size_t>(i) * columns + c])
                    numbers[static_cast<size_t>(i) * columns + counts[i]++] = c;
        narrow.assign(numbers.begin(), numbers.end());
    }
    bool kept(int b, int h, int r, int c) const {
        return dense[((static_cast<size_t>(batch > 1 ? b : 0) * heads + (heads > 1 ? h : 0)) * rows + r) * columns + c];
    }
    cuda::BlockLists lists(bool wide) const {
        return {counts.data(),
                wide ? static_cast<const void*>(numbers.data()) : narrow.data(),
                wide,
                columns,
                batch > 1 ? static_cast<int64_t>(heads) * rows : 0,
                heads > 1 ? rows : 0};
    }
};

struct Oracle {
    std::vector<double> output, lse;
};

struct Inputs {
    Tensor query, key, value;
    std::vector<int32_t> lengths;
    Lists lists;

    explicit Inputs(const Case& c)
        : query(c.type, c.batch, c.heads, c.queries, c.size, c.gap),
          key(c.type, c.batch, c.kv_heads, c.keys, c.size, c.gap),
          value(c.type, c.batch, c.kv_heads, c.keys, c.size),
          lists(c, blocks(c.queries, c), blocks(c.keys, c)) {
        query.fill(1.0), key.fill(1.0), value.fill(1.0);
        if (c.sink) {  // a first key that takes nearly all of every row
            for (size_t i = 0; i < query.values.size(); ++i) query.put(i, 4.f), query.values[i] = query.get(i);
            for (int i = 0; i < c.size; ++i) key.put(i, 4.f), key.values[i] = key.get(i);
        }
        for (int b = 0; b < c.batch; ++b) lengths.push_back(b == 0 ? c.keys * 2 / 3 : b == 1 ? 0 : c.keys);
    }
    static int blocks(int length, const Case& c) { return (length + c.block - 1) / c.block; }
    int length(const Case& c, int b) const { return c.lengths ? lengths[b] : c.keys; }

    template <typename Problem>
    void set(Problem& p, const Case& c) const {
        p.type = c.type, p.batch = c.batch, p.heads = c.heads, p.kv_heads = c.kv_heads;
        p.queries = c.queries, p.keys = c.keys, p.size = c.size, p.scale = c.scale;
        p.log_block = c.block == 16 ? 4 : c.block == 32 ? 5 : c.block == 64 ? 6 : 7;
        p.query_blocks = blocks(c.queries, c), p.key_blocks = blocks(c.keys, c);
        p.key_lengths = c.lengths ? lengths.data() : nullptr;
        p.query = query.tokens(), p.key = key.tokens();
    }
    double score(const Case& c, int b, int h, int i, int j) const {
        double sum = 0;
        const double *q = query.row(b, h, i), *k = key.row(b, h / (c.heads / c.kv_heads), j);
        for (int d = 0; d < c.size; ++d) sum += q[d] * k[d];
        return sum * c.scale;
    }
    bool counts(const Case& c, int b, int h, int i, int j) const {
        return j < length(c, b) && lists.kept(b, h, i / c.block, j / c.block);
    }
};

// Smoothed, coded scores, as the op defines them.
struct CodedScores {
    std::vector<double> mean;
    std::vector<float> query_scale, key_scale;
    std::vector<int> query, key;

    CodedScores(const Case& c, const Inputs& x) {
        const int d = c.size;
        mean.assign(static_cast<size_t>(c.batch) * c.kv_heads * d, 0);
        key.resize(x.key.values.size()), query.resize(x.query.values.size());
        for (int i = 0; i < c.batch * c.kv_heads; ++i) {
            const int length = x.length(c, i / c.kv_heads);
            for (int j = 0; j < length; ++j)
                for (int e = 0; e < d; ++e)
                    mean[static_cast<size_t>(i) * d + e] +=
                        x.key.values[(static_cast<size_t>(i) * c.keys + j) * d + e] / length;
        }
        code(x.key.values, c.batch * c.kv_heads, c.keys, c, &x, key, key_scale);
        code(x.query.values, c.batch * c.heads, c.queries, c, nullptr, query, query_scale);
    }
    void code(const std::vector<double>& values, int heads, int rows, const Case& c, const Inputs* keys,
              std::vector<int>& codes, std::vector<float>& scales) {
        const int d = c.size, blocks = (rows + c.block - 1) / c.block;
        for (int i = 0; i < heads; ++i)
            for (int block = 0; block < blocks; ++block) {
                int end = std::min(rows, (block + 1) * c.block);
                if (keys) end = std::min(end, keys->length(c, i / c.kv_heads));
                auto at = [&](int row, int e) {
                    return values[(static_cast<size_t>(i) * rows + row) * d + e] -
                           (keys ? mean[static_cast<size_t>(i) * d + e] : 0);
                };
                double top = 0;
                for (int row = block * c.block; row < end; ++row)
                    for (int e = 0; e < d; ++e) top = std::max(top, std::fabs(at(row, e)));
                const double scale = top / 127 < 1.2e-38 ? 1 : top / 127;
                scales.push_back(static_cast<float>(scale));
                for (int row = block * c.block; row < end; ++row)
                    for (int e = 0; e < d; ++e)
                        codes[(static_cast<size_t>(i) * rows + row) * d + e] =
                            static_cast<int>(std::rint(at(row, e) / scale));
            }
    }
    double score(const Case& c, const Inputs& x, int b, int h, int i, int j) const {
        const int kv = b * c.kv_heads + h / (c.heads / c.kv_heads), head = b * c.heads + h, d = c.size;
        const int *q = &query[(static_cast<size_t>(head) * c.queries + i) * d],
                  *k = &key[(static_cast<size_t>(kv) * c.keys + j) * d];
        int dot = 0;
        double smooth = 0;
        for (int e = 0; e < d; ++e) {
            dot += q[e] * k[e];
            smooth += x.query.row(b, h, i)[e] * mean[static_cast<size_t>(kv) * d + e];
        }
        const int blocks = (c.queries + c.block - 1) / c.block, kv_blocks = (c.keys + c.block - 1) / c.block;
        return c.scale * (dot * static_cast<double>(query_scale[head * blocks + i / c.block]) *
                              key_scale[kv * kv_blocks + j / c.block] +
                          smooth);
    }
};

Oracle oracle_of(const Case& c, const Inputs& x) {
    Oracle o;
    o.output.assign(x.query.values.size(), 0),
        o.lse.assign(static_cast<size_t>(c.batch) * c.heads * c.queries, -INFINITY);
    const CodedScores* coded = c.int8 ? new CodedScores(c, x) : nullptr;
    std::vector<double> scores(c.keys);
    for (int b = 0; b < c.batch; ++b)
        for (int h = 0; h < c.heads; ++h)
            for (int i = 0; i < c.queries; ++i) {
                double top = -INFINITY, sum = 0;
                for (int j = 0; j < c.keys; ++j) {
                    if (!x.counts(c, b, h, i, j)) continue;
                    scores[j] = coded ? coded->score(c, x, b, h, i, j) : x.score(c, b, h, i, j);
                    top = std::fmax(top, scores[j]);
                }
                if (top == -INFINITY) continue;
                const size_t row = (static_cast<size_t>(b) * c.heads + h) * c.queries + i;
                for (int j = 0; j < c.keys; ++j)
                    if (x.counts(c, b, h, i, j)) sum += std::exp(scores[j] - top);
                for (int j = 0; j < c.keys; ++j) {
                    if (!x.counts(c, b, h, i, j)) continue;
                    const double* v = x.value.row(b, h / (c.heads / c.kv_heads), j);
                    for (int d = 0; d < c.size; ++d)
                        o.output[row * c.size + d] += std::exp(scores[j] - top) / sum * v[d];
                }
                o.lse[row] = top + std::log(sum);
            }
    delete coded;
    return o;
}

double bound_of(Element type) { return type == Element::float32 ? 3e-6 : type == Element::float16 ? 2e-3 : 1.5e-2; }

// The largest error over the largest value; infinities must be the same.
double error_of(const std::vector<double>& expected, const std::function<double(size_t)>& actual) {
    double error = 0, scale = 1e-30;
    for (size_t i = 0; i < expected.size(); ++i) {
        const double y = actual(i);
        if (std::isinf(expected[i])) {
            if (y != expected[i]) return INFINITY;
            continue;
        }
        if (!(std::fabs(y - expected[i]) <= error)) error = std::fabs(y - expected[i]);
        scale = std::fmax(scale, std::fabs(expected[i]));
    }
    return std::isnan(error) ? INFINITY : error / scale;
}

bool report(const char* name, const char* what, double error, double bound) {
    const bool good = error <= bound && emulator::bank_conflicts == 0;
    std::printf("%-28s %-12s error %.1e of %.1e%s %s\n", name, what, error, bound,
                emulator::bank_conflicts ? ", bank conflicts" : "", good ? "" : "WRONG");
    emulator::bank_conflicts = 0;
    return good;
}

constexpr auto on_host = [](auto kernel, int64_t x, int64_t y, int threads, int shared_bytes, const auto& p) {
    emulator::launch(kernel, {static_cast<unsigned>(x), static_cast<unsigned>(y)}, threads, shared_bytes, p);
    return static_cast<const char*>(nullptr);
};

bool run_forward(const Case& c, const Inputs& x, const Oracle& o, bool wgmma) {
    Tensor output(c.type, c.batch, c.heads, c.queries, c.size, c.gap);
    std::vector<float> lse(o.lse.size(), NAN);
    ForwardProblem p{};
    x.set(p, c);
    p.value = x.value.tokens(), p.output = output.tokens(), p.lse = lse.data();
    p.kept = x.lists.lists(c.wide), p.int8_scores = c.int8;
    std::vector<Chunk> workspace(Codes(p).bytes / 16 + 1);
    std::memset(workspace.data(), 0xff, workspace.size() * 16);
    p.workspace = workspace.data();
    if (wgmma && !fits_wgmma(p)) return true;
    launch_forward(p, wgmma, on_host);
    const double bound = bound_of(c.type);
    bool good = report(c.name,
                       wgmma    ? "wgmma"
                       : c.int8 ? "int8 output"
                                : "output",
                       error_of(o.output, [&](size_t i) { return output.get(i); }), c.int8 ? bound + 1e-3 : bound);
    return report(c.name, "lse", error_of(o.lse, [&](size_t i) { return lse[i]; }), c.int8 ? 1e-3 : 2e-6) && good;
}

bool run_backward(const Case& c, const Inputs& x, const Oracle& o) {
    const int group = c.heads / c.kv_heads;
    Tensor grad(c.type, c.batch, c.heads, c.queries, c.size, c.gap);
    grad.fill(1.0);
    std::vector<float> lse(o.lse.begin(), o.lse.end()), delta(lse.size());
    for (size_t i = 0; i < delta.size(); ++i) {
        double sum = 0.1 * normal();  // as if the log-sum-exp had a gradient
        for (int d = 0; d < c.size; ++d) sum += grad.values[i * c.size + d] * o.output[i * c.size + d];
        delta[i] = static_cast<float>(sum);
    }
    std::vector<double> dq(x.query.values.size()), dk(x.key.values.size()), dv(x.key.values.size());
    for (int b = 0; b < c.batch; ++b)
        for (int h = 0; h < c.heads; ++h)
            for (int i = 0; i < c.queries; ++i)
                for (int j = 0; j < c.keys; ++j) {
                    if (!x.counts(c, b, h, i, j)) continue;
                    const size_t row = (static_cast<size_t>(b) * c.heads + h) * c.queries + i;
                    const size_t other = (static_cast<size_t>(b) * c.kv_heads + h / group) * c.keys + j;
                    const double *q = x.query.row(b, h, i), *k = x.key.row(b, h / group, j), *g = grad.row(b, h, i);
                    const double weight = std::exp(x.score(c, b, h, i, j) - o.lse[row]);
                    double inner = -delta[row];
                    for (int d = 0; d < c.size; ++d) inner += g[d] * x.value.row(b, h / group, j)[d];
                    for (int d = 0; d < c.size; ++d) {
                        dq[row * c.size + d] += c.scale * weight * inner * k[d];
                        dk[other * c.size + d] += c.scale * weight * inner * q[d];
                        dv[other * c.size + d] += weight * g[d];
                    }
                }
    Tensor grad_query(c.type, c.batch, c.heads, c.queries, c.size),
        grad_key(c.type, c.batch, c.kv_heads, c.keys, c.size), grad_value(c.type, c.batch, c.kv_heads, c.keys, c.size);
    const Lists readers(x.lists, true);
    BackwardProblem p{};
    x.set(p, c);
    p.value = x.value.tokens(), p.grad = grad.tokens(), p.lse = lse.data(), p.delta = delta.data();
    p.kept = x.lists.lists(c.wide), p.readers = readers.lists(c.wide);
    p.grad_query = grad_query.tokens(), p.grad_key = grad_key.tokens(), p.grad_value = grad_value.tokens();
    launch_backward(p, on_host);
    const double bound = bound_of(c.type);
    bool good = report(c.name, "grad query", error_of(dq, [&](size_t i) { return grad_query.get(i); }), bound);
    good = report(c.name, "grad key", error_of(dk, [&](size_t i) { return grad_key.get(i); }), bound) && good;
    return report(c.name, "grad value", error_of(dv, [&](size_t i) { return grad_value.get(i); }), bound) && good;
}

// `given`: the log-sum-exp over all keys comes from the caller.
bool run_importance(const Case& c, const Inputs& x, bool given) {
    const int rows = Inputs::blocks(c.queries, c), columns = Inputs::blocks(c.keys, c), first = columns - c.new_blocks;
    std::vector<double> all(static_cast<size_t>(c.batch) * c.heads * rows * columns);
    std::vector<double> generated(static_cast<size_t>(c.batch) * c.heads * rows * c.new_blocks);
    std::vector<float> lse;
    for (int b = 0; b < c.batch; ++b)
        for (int h = 0; h < c.heads; ++h)
            for (int i = 0; i < c.queries; ++i) {
                double sum_all = 0, sum_generated = 0;
                for (int j = 0; j < x.length(c, b); ++j) {
                    const double weight = std::exp(x.score(c, b, h, i, j));
                    sum_all += weight;
                    if (j >= first * c.block) sum_generated += weight;
                }
                lse.push_back(static_cast<float>(std::log(sum_all)));
                const size_t row = (static_cast<size_t>(b) * c.heads + h) * rows + i / c.block;
                for (int j = 0; j < x.length(c, b); ++j) {
                    const double weight = std::exp(x.score(c, b, h, i, j)) / (c.block * c.block);
                    const int block = j / c.block;
                    all[row * columns + block] += weight / sum_all;
                    if (block >= first) generated[row * c.new_blocks + block - first] += weight / sum_generated;
                }
            }
    std::vector<float> over_all(all.size(), NAN), over_generated(generated.size(), NAN), workspace(2 * lse.size(), NAN);
    ImportanceProblem p{};
    x.set(p, c);
    p.first_generated = first, p.lse = given ? lse.data() : nullptr;
    p.over_all = over_all.data(), p.over_generated = over_generated.data(), p.workspace = workspace.data();
    launch_importance(p, on_host);
    const double bound = 5e-6;
    const bool good =
        report(c.name, given ? "all, given" : "all", error_of(all, [&](size_t i) { return over_all[i]; }), bound);
    return report(c.name, "generated", error_of(generated, [&](size_t i) { return over_generated[i]; }), bound) && good;
}

constexpr Element F32 = Element::float32, BF16 = Element::bfloat16, F16 = Element::float16;
const Case kCases[] = {
    // name, type, batch, heads, kv, Lq, Lk, D, block, density, wide, shared, lengths, int8, gap, scale, new blocks
    {"whole", BF16, 1, 2, 2, 256, 256, 64, 128, 0.6, true, false, false, false, 0, 0.125f, 1},
    {"tails", F16, 2, 2, 2, 203, 203, 64, 64, 0.5, false, false, false, false, 0, 0.125f, 1},
    {"long heads, groups", BF16, 1, 4, 2, 150, 300, 128, 128, 0.6, false, false, false, false, 8, 0.09f, 1},
    {"lengths", F16, 3, 2, 1, 70, 100, 40, 64, 0.8, true, false, true, false, 8, 0.2f, 1},
    {"lengths, small blocks", BF16, 3, 2, 1, 70, 100, 40, 32, 0.5, false, false, true, false, 0, 0.2f, 2},
    {"blocks of 16", F16, 1, 2, 2, 90, 75, 24, 16, 0.4, false, true, false, false, 0, 0.2f, 5},
    {"negative scale", F16, 1, 1, 1, 64, 64, 128, 64, 1.0, true, false, false, false, 0, -0.1f, 1},
    {"attention sink", F16, 1, 1, 1, 70, 160, 64, 64, 1.0, true, false, false, false, 0, 0.125f, 1, true},
    {"longest heads", BF16, 1, 1, 1, 130, 140, 256, 128, 0.8, true, false, false, false, 0, 0.06f, 1},
    {"longest heads, small blocks", F16, 1, 1, 1, 40, 60, 200, 32, 0.6, true, false, false, false, 0, 0.06f, 1},
    {"float", F32, 2, 2, 1, 150, 100, 64, 64, 0.6, false, false, true, false, 4, 0.125f, 1},
    {"float, blocks of 16", F32, 1, 2, 2, 50, 70, 16, 16, 0.5, true, false, false, false, 0, 0.25f, 1},
    {"float, long heads", F32, 1, 1, 1, 130, 140, 104, 128, 0.9, true, false, false, false, 0, 0.1f, 1},
    {"float, longest heads", F32, 1, 1, 1, 60, 70, 256, 64, 0.7, true, false, false, false, 0, 0.06f, 1},
    {"int8", BF16, 2, 2, 1, 140, 203, 64, 64, 0.6, false, false, true, true, 0, 0.125f, 1},
    {"int8, blocks of 128", F16, 1, 2, 1, 140, 203, 128, 128, 0.6, false, false, false, true, 0, 0.1f, 1},
    {"int8, blocks of 32", F16, 1, 2, 1, 70, 90, 40, 32, 0.6, true, false, false, true, 8, 0.1f, 1},
    {"int8, float", F32, 1, 1, 1, 50, 60, 72, 16, 0.6, true, false, false, true, 0, 0.1f, 1},
    {"int8, longest heads", BF16, 1, 1, 1, 50, 90, 256, 64, 0.9, true, false, false, true, 0, 0.06f, 1},
    // the rest for wgmma: many steps, both widths, padded heads, rows and batches without keys
    {"many blocks", F16, 1, 2, 1, 130, 900, 128, 128, 0.9, false, false, false, false, 0, 0.09f, 1, false, true},
    {"many blocks, int8", BF16, 1, 1, 1, 200, 800, 64, 128, 0.9, true, false, false, true, 0, 0.1f, 1, false, true},
    {"many blocks, sink", BF16, 1, 1, 1, 64, 640, 64, 128, 1.0, true, false, false, false, 0, 0.125f, 1, true, true},
    {"padded heads", BF16, 3, 2, 1, 65, 300, 104, 128, 0.8, true, false, true, false, 8, 0.1f, 1, false, true},
    {"padded heads, int8", F16, 3, 2, 1, 63, 400, 72, 128, 0.8, false, false, true, true, 8, 0.1f, 1, false, true},
    {"small heads", F16, 3, 2, 2, 129, 390, 8, 128, 0.7, true, true, true, false, 0, 0.4f, 1, false, true},
    {"small heads, int8", BF16, 3, 2, 1, 1, 260, 24, 128, 0.7, true, false, true, true, 0, 0.2f, 1, false, true},
    {"long heads, int8", BF16, 1, 2, 1, 100, 520, 128, 128, 0.9, false, false, false, true, 0, 0.1f, 1, false, true},
    {"few blocks", F16, 1, 3, 1, 500, 500, 64, 128, 0.2, true, false, false, false, 0, 0.125f, 1, false, true},
    {"few blocks, int8", F16, 1, 2, 1, 500, 500, 64, 128, 0.2, true, false, false, true, 0, 0.1f, 1, false, true},
};

}  // namespace

int main() {
    bool good = true;
    for (const Case& c : kCases) {
        emulator::backward = !emulator::backward;
        const Inputs x(c);
        const Oracle o = oracle_of(c, x);
        if (!c.only_wgmma) good = run_forward(c, x, o, false) && good;
        for (int order = 0; order < 2; ++order) {
            good = run_forward(c, x, o, true) && good;
            emulator::backward = !emulator::backward;
        }
        if (c.only_wgmma) continue;
        if (c.int8) continue;
        good = run_backward(c, x, o) && good;
        good = run_importance(c, x, false) && good;
        good = run_importance(c, x, true) && good;
    }
    return good ? 0 : 1;
}
