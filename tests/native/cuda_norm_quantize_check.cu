// Runs the phases of the CUDA normalisation kernels on the host, block after block and thread after thread, against
// plain loops in double. Prints one line per case; exits 1 if any is wrong.
//
//   nvcc -std=c++20 -O1 -gencode=arch=compute_80,code=sm_80 tests/native/cuda_norm_quantize_check.cu -o check &&
//   ./check
#include <cstdio>
#include <vector>

#include "../../csrc/norm_quantize/cuda.cu"

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

std::vector<float> random_floats(int64_t n, float middle, float spread) {
    std::vector<float> v(static_cast<size_t>(n));
    for (auto& x : v) x = middle + spread * uniform();
    return v;
}

struct Case {
    const char* name;
    Element type;
    int batch, pixels, first, second, groups;  // groups 0: layer norm
    bool affine, film, dynamic;
    int activation;
    float mean;
    int multiprocessors;
};

struct Range2 {
    double low = 0, high = 0;
};

double activated(double x, int activation) {
    if (activation == 1) return x < 0 ? 0 : x;
    if (activation == 6) return x < 0 ? 0.1 * x : x;
    return activation == 2 ? x / (1 + std::exp(-x)) : x;
}

void run_group_norm(const Problem& p, const Plan& plan, std::vector<float>& memory) {
    float* shared = memory.data();
    for (int block = 0; block < p.batch * plan.slabs; ++block) {
        for (int chunk = 0; chunk * plan.columns < plan.vectors; ++chunk) {
            for (int t = 0; t < kThreads; ++t) GroupStats::accumulate(p, plan, block, chunk, t, shared);
            for (int t = 0; t < kThreads; ++t) GroupStats::merge_lanes(p, plan, block, chunk, t, shared);
        }
        for (int t = 0; t < kThreads; ++t) GroupStats::merge_channels(p, plan, block, t, shared);
    }
    for (int block = 0; block < p.batch * plan.write_blocks; ++block) {
        for (int t = 0; t < kThreads; ++t) GroupWrite::merge_slabs(p, plan, block, t, shared);
        for (int t = 0; t < kThreads; ++t) GroupWrite::merge_parts(p, t, shared);
        if (p.scale) {
            for (int t = 0; t < kThreads; ++t) GroupWrite::write(p, plan, block, t, shared);
            continue;
        }
        for (int t = 0; t < kThreads; ++t) GroupWrite::make_terms(p, plan, block, t, shared);
        const int n = block / plan.write_blocks, first = block % plan.write_blocks * plan.write_pixels;
        for (int pixel = first; pixel < smaller(p.pixels, first + plan.write_pixels); ++pixel) {
            const int64_t row = static_cast<int64_t>(n) * p.pixels + pixel;
            Range range;
            for (int lane = 0; lane < 32; ++lane) {
                const Range share = GroupWrite::range_of_pixel(p, plan, row, lane, shared);
                range.low = fminf(range.low, share.low), range.high = fmaxf(range.high, share.high);
            }
            const Grid g = grid_of_range(range.low, range.high, false, false);
            for (int lane = 0; lane < 32; ++lane) GroupWrite::codes_of_pixel(p, plan, row, lane, g, shared);
        }
    }
}

void run_layer_norm(const Problem& p, const Plan& plan) {
    for (int64_t row = 0; row < static_cast<int64_t>(p.batch) * p.pixels; ++row) {
        float sum = 0, squares = 0;
        for (int lane = 0; lane < 32; ++lane) sum += LayerNorm::sum(p, plan, row, lane);
        const float mean = sum / p.channels;
        for (int lane = 0; lane < 32; ++lane) squares += LayerNorm::squares(p, plan, row, lane, mean);
        const Stats stats = GroupWrite::stats_of(p, {static_cast<float>(p.channels), mean, squares});
        Range range;
        for (int lane = 0; lane < 32; ++lane) {
            const Range share = LayerNorm::range(p, plan, row, lane, stats);
            range.low = fminf(range.low, share.low), range.high = fmaxf(range.high, share.high);
        }
        const Grid g = p.scale ? load_grid(p.scale, p.zero_point) : grid_of_range(range.low, range.high, false, false);
        for (int lane = 0; lane < 32; ++lane) LayerNorm::codes(p, plan, row, lane, stats, g);
    }
}

bool run_case(const Case& c) {
    const int channels = c.first + c.second;
    const int64_t rows = static_cast<int64_t>(c.batch) * c.pixels;
    auto x = random_floats(rows * c.first, c.mean, 2), skip = random_floats(rows * c.second, c.mean, 1);
    const auto x_memory = stored(x, c.type), skip_memory = stored(skip, c.type);
    const auto weight = random_floats(channels, 1, 0.5f), bias = random_floats(channels, 0, 0.5f);
    const auto film = random_floats(2 * c.batch * channels, 0, 0.5f), channel_scale = random_floats(channels, 1, 0.3f);
    std::vector<float> row_scale(rows, NAN);
    std::vector<int32_t> row_zero_point(rows, 1000);
    std::vector<Chunk> output(rows * channels / 16 + 1);
    const float scale = 0.03f;
    const int32_t zero_point = -40;
    Problem p{};
    p.type = c.type, p.batch = c.batch, p.pixels = c.pixels, p.first_channels = c.first, p.channels = channels;
    p.groups = c.groups, p.activation = c.activation, p.eps = 1e-5f;
    p.input = x_memory.data(), p.skip = c.second ? skip_memory.data() : nullptr;
    if (c.affine) p.weight = weight.data(), p.bias = bias.data(), p.channel_scale = channel_scale.data();
    p.film = c.film ? film.data() : nullptr;
    if (!c.dynamic) p.scale = &scale, p.zero_point = &zero_point;
    p.output = reinterpret_cast<int8_t*>(output.data());
    p.row_scale = row_scale.data(), p.row_zero_point = row_zero_point.data();
    std::vector<float> workspace(c.groups ? workspace_floats(p, c.multiprocessors) : 0, NAN);
    p.workspace = workspace.data();
    Plan plan = c.groups ? make_plan(p, c.multiprocessors) : Plan{};
    if (c.groups) {
        const int64_t bytes = plan.stats_shared > plan.write_shared ? plan.stats_shared : plan.write_shared;
        std::vector<float> memory(bytes / 4 + 16, NAN);
        run_group_norm(p, plan, memory);
    } else {
        plan.vector = whole_vectors(p), plan.vectors = divide_up(channels, kVector);
        run_layer_norm(p, plan);
    }

    auto value = [&](int64_t row, int ch) {
        return static_cast<double>(ch < c.first ? x[row * c.first + ch] : skip[row * c.second + ch - c.first]);
    };
    int wrong = 0, off = 0;
    double scale_error = 0;
    const int groups = c.groups ? c.groups : 1, per_group = channels / groups;
    std::vector<double> mean(rows * groups), deviation(rows * groups);
    for (int64_t row = 0; row < rows; ++row)
        for (int group = 0; group < groups; ++group) {
            const int64_t first = c.groups ? row / c.pixels * c.pixels : row,
                          last = c.groups ? first + c.pixels : row + 1;
            if (c.groups && row > first) {
                mean[row * groups + group] = mean[first * groups + group];
                deviation[row * groups + group] = deviation[first * groups + group];
                continue;
            }
            double sum = 0, squares = 0;
            for (int64_t r = first; r < last; ++r)
                for (int ch = group * per_group; ch < (group + 1) * per_group; ++ch) sum += value(r, ch);
            const double count = static_cast<double>(last - first) * per_group, m = sum / count;
            for (int64_t r = first; r < last; ++r)
                for (int ch = group * per_group; ch < (group + 1) * per_group; ++ch)
                    squares += (value(r, ch) - m) * (value(r, ch) - m);
            mean[row * groups + group] = m, deviation[row * groups + group] = std::sqrt(squares / count + 1e-5);
        }
    for (int64_t row = 0; row < rows; ++row) {
        std::vector<double> y(channels);
        Range2 range;
        for (int ch = 0; ch < channels; ++ch) {
            const int64_t at = row * groups + ch / per_group, image = row / c.pixels * 2 * channels;
            double v = (value(row, ch) - mean[at]) / deviation[at];
            if (c.affine) v = v * weight[ch] + bias[ch];
            if (c.film) v = v * (1 + film[image + ch]) + film[image + channels + ch];
            v = activated(v, c.activation) * (c.affine ? channel_scale[ch] : 1);
            y[ch] = v, range.low = std::fmin(range.low, v), range.high = std::fmax(range.high, v);
        }
        const double s = c.dynamic ? row_scale[row] : scale;
        const int z = c.dynamic ? row_zero_point[row] : zero_point;
        if (c.dynamic) scale_error = std::fmax(scale_error, std::fabs(s / ((range.high - range.low) / 255) - 1));
        for (int ch = 0; ch < channels; ++ch) {
            const double q = std::fmin(std::fmax(std::rint(y[ch] / s) + z, -128), 127);
            const double d = std::fabs(q - p.output[row * channels + ch]);
            off += d == 1, wrong += !(d <= 1);
        }
    }
    const bool good = wrong == 0 && off <= 1 + rows * channels / 500 && scale_error <= 1e-4;
    std::printf("%-28s %lld codes, %d off by one, %d wrong, scale error %.1e %s\n", c.name,
                static_cast<long long>(rows * channels), off, wrong, scale_error, good ? "" : "WRONG");
    return good;
}

constexpr Element F32 = Element::float32, BF16 = Element::bfloat16, F16 = Element::float16;
const Case kCases[] = {
    // name, type, batch, pixels, channels, skip's, groups, affine, film, dynamic, activation, mean, multiprocessors
    {"groups of 10, skip", F32, 2, 70, 200, 120, 32, true, true, false, 2, 0, 8},
    {"per pixel", BF16, 2, 63, 160, 0, 32, true, true, true, 2, 0, 8},
    {"per pixel, odd channels", F16, 1, 35, 21, 12, 3, true, false, true, 1, 0, 4},
    {"leaky relu", F32, 1, 63, 64, 0, 8, true, true, false, 6, 0, 8},
    {"large mean", F32, 1, 400, 64, 0, 8, false, false, false, 2, 1000, 16},
    {"one channel a group", F32, 1, 30, 24, 0, 24, false, false, false, 0, 0, 1},
    {"many groups", F32, 1, 9, 320, 0, 320, true, false, false, 0, 0, 1},
    {"wide", F32, 1, 5, 2560, 640, 32, true, true, true, 2, 0, 132},
    {"one pixel", F32, 3, 1, 32, 0, 4, true, true, false, 2, 0, 132},
    {"layer norm", F32, 2, 9, 320, 0, 0, true, true, false, 0, 0, 0},
    {"layer norm per token", BF16, 2, 5, 776, 0, 0, true, true, true, 0, 0, 0},
    {"layer norm, odd, large mean", F32, 1, 7, 77, 0, 0, false, false, true, 0, 300, 0},
};

}  // namespace

int main() {
    bool good = true;
    for (const Case& c : kCases) good = run_case(c) && good;
    return good ? 0 : 1;
}
