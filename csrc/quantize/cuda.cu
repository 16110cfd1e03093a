// Quantization to int8 and back on CUDA: bound by memory, in vectors of eight channels.
//
// PDN_HD functions of a thread's number hold the arithmetic; tests/native runs them on the host.
#include "../core/cuda_quantize.cuh"
#include "cuda.h"

namespace pdn {
namespace {

using quantize::cuda::kGeglu;
using quantize::cuda::Problem;

constexpr int kThreads = 256, kWarps = kThreads / 32, kVector = 8;
constexpr int64_t kMaxBlocks = 1 << 20;  // threads take several items beyond that

struct Plan {
    int64_t rows, channels;  // one row where channels do not matter
    int64_t vectors;         // of a row
    bool vector;             // whole vectors only, at aligned addresses
};

PDN_HD void load_transformed(const Problem& p, const Plan& plan, int64_t row, int64_t channel, Float4 (&x)[2]) {
    const bool pairs = p.activation == kGeglu;
    const int64_t at = row * plan.channels * (pairs ? 2 : 1) + channel, count = plan.channels - channel;
    load8(p.input, p.type, at, count, plan.vector, x);
    if (pairs) {
        Float4 gate[2];
        load8(p.input, p.type, at + plan.channels, count, plan.vector, gate);
        activate(gate, 3);
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[i / 4].v[i % 4] *= gate[i / 4].v[i % 4];
    } else {
        activate(x, p.activation);
    }
    if (p.channel_scale) {
        Float4 scale[2];
        load8(p.channel_scale, Element::float32, channel, count, plan.vector, scale);
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[i / 4].v[i % 4] *= scale[i / 4].v[i % 4];
    }
}

PDN_HD void quantize_item(const Problem& p, const Plan& plan, int64_t item) {
    const int64_t row = item / plan.vectors, channel = item % plan.vectors * kVector;
    Float4 x[2];
    load_transformed(p, plan, row, channel, x);
    const Grid g = load_grid(p.scale, p.zero_point, p.per_row ? row : 0);
    store8_codes(static_cast<int8_t*>(p.output) + row * plan.channels + channel, x, g, 0.f, plan.channels - channel,
                 plan.vector);
}

PDN_HD void dequantize_item(const Problem& p, const Plan& plan, int64_t item) {
    const int64_t row = item / plan.vectors, channel = item % plan.vectors * kVector;
    const int64_t at = row * plan.channels + channel, count = plan.channels - channel;
    const int8_t* codes = static_cast<const int8_t*>(p.input) + at;
    const Grid g = load_grid(p.scale, p.zero_point, p.per_row ? row : 0);
    struct alignas(8) Codes {
        int8_t v[kVector];
    } q;
    if (plan.vector) {
        q = *reinterpret_cast<const Codes*>(codes);
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) q.v[i] = i < count ? codes[i] : 0;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        Float4 y;
#pragma unroll
        for (int j = 0; j < 4; ++j) y.v[j] = static_cast<float>(q.v[half * 4 + j] - g.zero_point) * g.scale;
        store4_any(p.output, p.type, at + half * 4, y, count - half * 4, plan.vector);
    }
}

// A lane's share of a row's range: every 32nd vector.
PDN_HD Range range_of_row(const Problem& p, const Plan& plan, int64_t row, int lane) {
    Range range;
    for (int64_t v = lane; v < plan.vectors; v += 32) {
        Float4 x[2];
        load_transformed(p, plan, row, v * kVector, x);
        range.add8(x, plan.channels - v * kVector);
    }
    return range;
}

PDN_HD void codes_of_row(const Problem& p, const Plan& plan, int64_t row, int lane, const Grid& g) {
    int8_t* out = static_cast<int8_t*>(p.output) + row * plan.channels;
    for (int64_t v = lane; v < plan.vectors; v += 32) {
        Float4 x[2];
        load_transformed(p, plan, row, v * kVector, x);
        store8_codes(out + v * kVector, x, g, 0.f, plan.channels - v * kVector, plan.vector);
    }
    if (lane == 0) p.row_scale[row] = g.scale, p.row_zero_point[row] = g.zero_point;
}

__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
    const int64_t items = plan.rows * plan.vectors, step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < items; i += step)
        quantize_item(p, plan, i);
}

__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
    const int64_t items = plan.rows * plan.vectors, step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < items; i += step)
        dequantize_item(p, plan, i);
}

__global__ void __launch_bounds__(kThreads)
    quantize_dynamic_kernel(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
    const int lane = threadIdx.x % 32;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; row < plan.rows; row += step) {
        const Range range = warp_range(range_of_row(p, plan, row, lane));
        codes_of_row(p, plan, row, lane, grid_of_range(range.low, range.high, range.nan, p.symmetric));
    }
}

// --------------------------------------------------------------------------------------------------------- launchers

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// `flat`: the kernel neither reads nor writes anything per row.
Plan make_plan(const Problem& p, bool flat) {
    const bool merge = flat && !p.per_row && !p.channel_scale && p.activation != kGeglu;
    Plan plan{p.rows, p.channels, 0, false};
    if (merge && (p.rows * p.channels) % kVector == 0)  // whole vectors of a tensor whose rows may be odd
        plan.rows = p.rows * p.channels / kVector, plan.channels = kVector;
    plan.vectors = (plan.channels + kVector - 1) / kVector;
    plan.vector =
        plan.channels % kVector == 0 && aligned(p.input, 16) && aligned(p.output, 16) && aligned(p.channel_scale, 16);
    return plan;
}

const char* launch(void (*kernel)(Problem, Plan), const Problem& p, const Plan& plan, int64_t per_block, int64_t items,
                   void* stream) {
    const int64_t wanted = (items + per_block - 1) / per_block, blocks = wanted < kMaxBlocks ? wanted : kMaxBlocks;
    if (blocks == 0) return nullptr;
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, plan);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

namespace quantize {
namespace cuda {

const char* run_static(const Problem& p, void* stream) {
    const Plan plan = make_plan(p, true);
    return launch(quantize_kernel, p, plan, kThreads, plan.rows * plan.vectors, stream);
}

const char* run_dynamic(const Problem& p, void* stream) {
    return launch(quantize_dynamic_kernel, p, make_plan(p, false), kWarps, p.rows, stream);
}

const char* run_dequantize(const Problem& p, void* stream) {
    const Plan plan = make_plan(p, true);
    return launch(dequantize_kernel, p, plan, kThreads, plan.rows * plan.vectors, stream);
}

}  // namespace cuda
}  // namespace quantize
}  // namespace pdn
