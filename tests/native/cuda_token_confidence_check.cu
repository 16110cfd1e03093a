// Runs the arithmetic of the CUDA kernels of token_confidence on the host against plain loops in double. Prints one
// line per case; exits 1 if any is wrong.
//
//   nvcc -std=c++20 -O1 -gencode=arch=compute_80,code=sm_80 tests/native/cuda_token_confidence_check.cu -o check
#include <cstdio>
#include <vector>

#include "../../csrc/token_confidence/cuda.cu"

namespace {

using namespace pdn;
using token_confidence::cuda::Element;

uint32_t state = 12345;
float uniform() {  // in [-1, 1)
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state) / 2147483648.0);
}

struct Case {
    const char* name;
    Element type;
    int64_t rows;
    int32_t vocabulary;
    float temperature;
    bool guided, picked, specials;
};

const Case kCases[] = {
    {"one token", Element::float32, 2, 1, 0, false, false, false},
    {"characters", Element::bfloat16, 3, 65, 0, false, false, false},
    {"a piece and one", Element::float16, 2, kPiece + 1, 0, false, false, false},
    {"words", Element::bfloat16, 2, 50257, 0, false, false, false},
    {"guided", Element::float32, 2, 5000, 0, true, false, false},
    {"left out", Element::float32, 3, 20000, 0, false, true, true},
    {"noise", Element::float32, 3, 300, 1.f, false, false, false},
    {"everything", Element::float16, 3, 17000, 0.8f, true, true, true},
};

template <typename T>
Partial piece_on_host(const Problem& p, int64_t row, int piece) {
    Partial all = nothing();
    for (int warp = 0; warp < kWarps; ++warp)
        for (int lane = 0; lane < 32; ++lane)
            all = joined(p.temperature > 0 ? piece_of_lane<T, true>(p, row, piece, warp, lane)
                                           : piece_of_lane<T, false>(p, row, piece, warp, lane),
                         all);
    return all;
}

struct Input {
    std::vector<float> values, memory;
    void fill(const Case& c, int64_t rows) {
        const auto count = static_cast<size_t>(rows * c.vocabulary);
        values.resize(count), memory.resize(count);
        for (size_t i = 0; i < count; ++i) {
            values[i] = 5 * uniform();
            if (c.type == Element::float32) {
                memory[i] = values[i];
            } else if (c.type == Element::bfloat16) {
                auto* out = reinterpret_cast<BFloat16*>(memory.data()) + i;
                from_float(values[i], *out), values[i] = to_float(*out);
            } else {
                auto* out = reinterpret_cast<Float16*>(memory.data()) + i;
                from_float(values[i], *out), values[i] = to_float(*out);
            }
        }
    }
};

bool run_case(const Case& c) {
    const int64_t source = c.picked ? c.rows + 2 : c.rows;
    Input x, u;
    x.fill(c, source), u.fill(c, source);
    std::vector<int64_t> index, keys, token(c.rows, -7);
    for (int64_t r = 0; r < c.rows; ++r) index.push_back(source - 1 - r), keys.push_back(r << 40), keys.push_back(-r);
    std::vector<float> confidence(c.rows), eos(c.rows);
    Problem p{};
    p.type = c.type, p.vocabulary = c.vocabulary, p.pieces = (c.vocabulary + kPiece - 1) / kPiece;
    p.rows = c.rows, p.source_rows = source, p.logits = x.memory.data(), p.stride = c.vocabulary;
    if (c.guided) p.unconditional = u.memory.data(), p.unconditional_stride = c.vocabulary, p.guidance = 1.25f;
    if (c.picked) p.index = index.data(), p.keys = keys.data();
    p.seed = -11, p.step = 77, p.temperature = c.temperature, p.eos = c.vocabulary / 2;
    if (c.specials) p.forbidden = {2, {0, c.vocabulary - 1}}, p.uncounted = {2, {1, kPiece + 3}};
    p.token = token.data(), p.confidence = confidence.data(), p.eos_probability = eos.data();
    bool good = true;
    for (int64_t row = 0; row < c.rows; ++row) {
        Partial all = nothing();
        for (int piece = p.pieces - 1; piece >= 0; --piece)
            all = joined(all, c.type == Element::float32    ? piece_on_host<float>(p, row, piece)
                              : c.type == Element::bfloat16 ? piece_on_host<BFloat16>(p, row, piece)
                                                            : piece_on_host<Float16>(p, row, piece));
        finish(p, row, all);
        const int64_t at = c.picked ? index[row] : row;
        const NoiseRow noise = noise_of(p, row);
        const auto score = [&](int v) {
            const double l = x.values[at * c.vocabulary + v], o = u.values[at * c.vocabulary + v];
            return is_among(p.forbidden, v) ? -INFINITY : c.guided ? o + (1. + p.guidance) * (l - o) : l;
        };
        double top = -INFINITY, best = -INFINITY, got = -INFINITY, total = 0;
        for (int v = 0; v < c.vocabulary; ++v) {
            const uint32_t word = philox(static_cast<uint32_t>(v / 128 * 32 + v % 32), noise).v[v / 32 % 4];
            const double g = -std::log(-std::log1p(-(word + 0.5) / 4294967296.));
            const double ranked = score(v) + (c.temperature > 0 ? c.temperature * g : 0);
            best = std::fmax(best, ranked);
            if (v == token[row]) got = ranked;
            if (!is_among(p.uncounted, v)) top = std::fmax(top, score(v));
        }
        for (int v = 0; v < c.vocabulary; ++v)
            if (!is_among(p.uncounted, v)) total += std::exp(score(v) - top);
        const auto exact = [&](int v) { return is_among(p.uncounted, v) ? 0. : std::exp(score(v) - top) / total; };
        good = good && token[row] >= 0 && best - got <= (c.temperature > 0 || c.guided ? 2e-5 : 0.);
        const double sure = exact(static_cast<int>(token[row])), end = exact(p.eos);
        good = good && std::fabs(confidence[row] - sure) <= 1e-5 * sure && std::fabs(eos[row] - end) <= 1e-5 * end;
    }
    std::printf("%-20s %s\n", c.name, good ? "" : "WRONG");
    return good;
}

bool run_no_answer() {
    std::vector<float> x(3 * 200, 1.f);
    x[250] = NAN, x[450] = INFINITY;
    int64_t token[3];
    float confidence[3];
    Problem p{};
    p.type = Element::float32, p.vocabulary = 200, p.pieces = 1, p.rows = p.source_rows = 3, p.logits = x.data();
    p.stride = 200, p.eos = -1, p.token = token, p.confidence = confidence;
    for (int row = 0; row < 3; ++row) finish(p, row, piece_on_host<float>(p, row, 0));
    const bool good = token[0] == 0 && token[1] == -1 && token[2] == -1 && std::isnan(confidence[1] + confidence[2]);
    std::printf("%-20s %s\n", "no answer", good ? "" : "WRONG");
    return good;
}

}  // namespace

int main() {
    bool good = run_no_answer();
    for (const Case& c : kCases) good = run_case(c) && good;
    return good ? 0 : 1;
}
