// Runs the arithmetic of the CUDA quantization kernels on the host against plain loops in double. Prints one line per
// case; exits 1 if any is wrong.
//
//   nvcc -std=c++20 -O1 -gencode=arch=compute_80,code=sm_80 tests/native/cuda_quantize_check.cu -o check && ./check
#include <cstdio>
#include <vector>

#include "../../csrc/quantize/cuda.cu"

namespace {

using namespace pdn;

uint32_t state = 12345;
float uniform() {  // in [-1, 1)
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state) / 2147483648.0);
}

struct alignas(16) Chunk {
    char bytes[16];
};

// Floats as `type` in aligned memory, and what they became.
std::vector<Chunk> stored(std::vector<float>& values, Element type) {
    std::vector<Chunk> memory(values.size() / 4 + 1);
    for (size_t i = 0; i < values.size(); ++i) {
        if (type == Element::float32) {
            reinterpret_cast<float*>(memory.data())[i] = values[i];
        } else if (type == Element::bfloat16) {
            from_float(values[i], reinterpret_cast<BFloat16*>(memory.data())[i]);
        } else {
            from_float(values[i], reinterpret_cast<Float16*>(memory.data())[i]);
        }
        values[i] = load_element(memory.data(), type, static_cast<int64_t>(i));
    }
    return memory;
}

double transformed(const std::vector<float>& x, int64_t row, int64_t c, int64_t channels, int activation) {
    if (activation == kGeglu) {
        const double gate = x[row * channels * 2 + channels + c];
        return x[row * channels * 2 + c] * 0.5 * gate * (1 + std::erf(gate / std::sqrt(2.0)));
    }
    const double v = x[row * channels + c];
    if (activation == 1) return v < 0 ? 0 : v;
    if (activation == 6) return v < 0 ? 0.1 * v : v;
    return activation == 2 ? v / (1 + std::exp(-v)) : v;
}

struct Case {
    const char* name;
    Element type;
    int64_t rows, channels;
    int activation;
    bool channel_scale, per_row, zero_point;
};

bool off_by_one_at_most(double steps, int zero_point, int low, int code, bool exact) {
    const double q = std::fmin(std::fmax((std::isnan(steps) ? 0 : std::rint(steps)) + zero_point, low), 127);
    const bool tie = std::fabs(std::fabs(steps - std::floor(steps)) - 0.5) < 1e-4;
    return std::fabs(q - code) <= (tie && !exact ? 1 : 0);
}

bool run_case(const Case& c) {
    const int64_t wide = c.channels * (c.activation == kGeglu ? 2 : 1);
    std::vector<float> x(static_cast<size_t>(c.rows * wide)), scale(c.rows), channel_scale(c.channels);
    for (auto& v : x) v = 3 * uniform();
    x[0] = NAN, x[1] = INFINITY, x[2] = -INFINITY, x[3] = 0.25f, x[4] = 0.75f;
    for (auto& v : scale) v = 0.02f + 0.01f * uniform();
    scale[0] = 0.5f;  // the values above are ties
    for (auto& v : channel_scale) v = 1 + 0.5f * uniform();
    std::vector<int32_t> zero_point(c.rows);
    for (auto& z : zero_point) z = static_cast<int>(100 * uniform());
    const auto memory = stored(x, c.type);
    auto scales = stored(channel_scale, Element::float32);
    std::vector<Chunk> output(c.rows * c.channels / 16 + 1), back(c.rows * c.channels / 4 + 1);
    Problem p{};
    p.type = c.type, p.rows = c.rows, p.channels = c.channels, p.activation = c.activation;
    p.input = memory.data(), p.output = output.data(), p.scale = scale.data(), p.per_row = c.per_row;
    p.channel_scale = c.channel_scale ? reinterpret_cast<const float*>(scales.data()) : nullptr;
    p.zero_point = c.zero_point ? zero_point.data() : nullptr;
    const Plan plan = make_plan(p, true);
    const auto* codes = reinterpret_cast<const int8_t*>(output.data());
    for (int64_t i = 0; i < plan.rows * plan.vectors; ++i) quantize_item(p, plan, i);
    const int low = c.zero_point ? -128 : -127;
    bool good = true;
    for (int64_t row = 0; row < c.rows; ++row)
        for (int64_t ch = 0; ch < c.channels; ++ch) {
            const double v =
                transformed(x, row, ch, c.channels, c.activation) * (c.channel_scale ? channel_scale[ch] : 1);
            const int64_t at = c.per_row ? row : 0;
            const float single = static_cast<float>(v);
            const bool exact = c.activation == 0 && !c.channel_scale;
            const double steps = exact ? single / scale[at] : v / scale[at];
            good = good && off_by_one_at_most(steps, c.zero_point ? zero_point[at] : 0, low,
                                              codes[row * c.channels + ch], exact);
        }
    Problem q = p;  // and back
    q.input = output.data(), q.output = back.data(), q.activation = 0, q.channel_scale = nullptr;
    const Plan back_plan = make_plan(q, true);
    for (int64_t i = 0; i < back_plan.rows * back_plan.vectors; ++i) dequantize_item(q, back_plan, i);
    for (int64_t i = 0; i < c.rows * c.channels; ++i) {
        const int64_t at = c.per_row ? i / c.channels : 0;
        const double y = (codes[i] - (c.zero_point ? zero_point[at] : 0)) * static_cast<double>(scale[at]);
        good = good && std::fabs(load_element(back.data(), c.type, i) - y) <= 8e-3 * std::fabs(y);
    }
    std::printf("%-24s static  %s\n", c.name, good ? "" : "WRONG");
    return good;
}

bool run_dynamic_case(const Case& c) {
    const int64_t wide = c.channels * (c.activation == kGeglu ? 2 : 1);
    std::vector<float> x(static_cast<size_t>(c.rows * wide)), row_scale(c.rows);
    std::vector<int32_t> row_zero_point(c.rows);
    for (auto& v : x) v = 3 * uniform();
    for (int64_t i = 0; i < wide; ++i) x[wide + i] = 0;  // a row of zeros, one with NaN, one of one sign
    x[2 * wide] = NAN;
    for (int64_t i = 0; i < wide; ++i) x[3 * wide + i] = 2 + uniform();
    const auto memory = stored(x, c.type);
    std::vector<Chunk> output(c.rows * c.channels / 16 + 1);
    Problem p{};
    p.type = c.type, p.rows = c.rows, p.channels = c.channels, p.activation = c.activation;
    p.input = memory.data(), p.output = output.data(), p.symmetric = !c.zero_point;
    p.row_scale = row_scale.data(), p.row_zero_point = row_zero_point.data();
    const Plan plan = make_plan(p, false);
    const auto* codes = reinterpret_cast<const int8_t*>(output.data());
    bool good = true;
    for (int64_t row = 0; row < c.rows; ++row) {
        Range range;
        for (int lane = 0; lane < 32; ++lane) {
            const Range share = range_of_row(p, plan, row, lane);
            range.low = std::fmin(range.low, share.low), range.high = std::fmax(range.high, share.high);
            range.nan = range.nan || share.nan;
        }
        const Grid g = grid_of_range(range.low, range.high, range.nan, p.symmetric);
        for (int lane = 0; lane < 32; ++lane) codes_of_row(p, plan, row, lane, g);
        double low = 0, high = 0;
        bool nan = false;
        for (int64_t ch = 0; ch < c.channels; ++ch) {
            const double v = transformed(x, row, ch, c.channels, c.activation);
            low = std::fmin(low, v), high = std::fmax(high, v), nan = nan || std::isnan(v);
        }
        double scale = p.symmetric ? std::fmax(-low, high) / 127 : (high - low) / 255;
        if (scale < kSmallestScale) scale = 1;
        const double zp = p.symmetric ? 0 : std::fmin(std::fmax(std::rint(-128 - low / scale), -128), 127);
        if (nan) {
            good = good && std::isnan(row_scale[row]) && row_zero_point[row] == 0;
            for (int64_t ch = 0; ch < c.channels; ++ch) good = good && codes[row * c.channels + ch] == 0;
            continue;
        }
        good = good && std::fabs(row_scale[row] - scale) <= 1e-5 * scale && std::fabs(row_zero_point[row] - zp) <= 1;
        for (int64_t ch = 0; ch < c.channels; ++ch) {
            const double v = transformed(x, row, ch, c.channels, c.activation);
            const double steps = v / row_scale[row];
            good = good && off_by_one_at_most(steps, row_zero_point[row], p.symmetric ? -127 : -128,
                                              codes[row * c.channels + ch], false);
        }
    }
    std::printf("%-24s dynamic %s\n", c.name, good ? "" : "WRONG");
    return good;
}

const Case kCases[] = {
    // name, type, rows, channels, activation, channel_scale, per_row, zero_point
    {"flat", Element::float32, 7, 24, 0, false, false, false},
    {"flat, odd rows", Element::bfloat16, 8, 35, 0, false, false, true},
    {"odd everything", Element::float16, 5, 13, 0, true, false, true},
    {"silu, a scale each", Element::float32, 9, 320, 2, true, true, true},
    {"geglu", Element::bfloat16, 6, 40, kGeglu, true, false, true},
    {"geglu, odd", Element::float32, 6, 21, kGeglu, false, true, false},
    {"leaky relu", Element::float32, 11, 64, 6, false, true, false},
    {"relu", Element::float16, 11, 64, 1, false, true, false},
};

}  // namespace

int main() {
    bool good = true;
    for (const Case& c : kCases) good = run_dynamic_case(c) && run_case(c) && good;
    return good ? 0 : 1;
}
