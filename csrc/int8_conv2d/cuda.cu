// int8 convolution on CUDA: the choice of kernel, and the launches.
#include "cuda.h"
#include "cuda_direct.cuh"
#include "cuda_mma.cuh"
#include "cuda_wgmma.cuh"

namespace pdn {
namespace {

using int8_conv2d::cuda::Device;

using Wgmma64 = WgmmaTile<64>;
using Wgmma128 = WgmmaTile<128>;
using Wgmma160 = WgmmaTile<160>;  // 320, 640 and 1280 channels without a rest

enum Kind : int { kLarge, kSmall, kTapLarge, kTapSmall, kWgmma64, kWgmma128, kWgmma160, kDirect, kDepthwise };

// A way to cut the matrix product. `rate` is multiplications per clock and multiprocessor, an estimate from the
// instruction rates (not measured yet); only ratios matter.
struct Candidate {
    Kind kind;
    int bm, bn, bk, resident;  // blocks that share a multiprocessor
    double rate;
};

template <class Tile>
constexpr Candidate candidate(Kind kind, double rate) {
    return {kind, Tile::BM, Tile::BN, Tile::BK, 512 / Tile::kThreads, rate};
}

constexpr Candidate kPlain[] = {candidate<TileLarge>(kLarge, 2000), candidate<TileSmall>(kSmall, 1300)};
constexpr Candidate kHopper[] = {candidate<Wgmma64>(kWgmma64, 2200), candidate<Wgmma128>(kWgmma128, 3000),
                                 candidate<Wgmma160>(kWgmma160, 3300), candidate<TileSmall>(kSmall, 1300)};
constexpr Candidate kPerTap[] = {candidate<TileTapLarge>(kTapLarge, 1500), candidate<TileTapSmall>(kTapSmall, 1200)};
#if defined(PDN_SM90A)  // setup_cuda.py: sm_90a is among the architectures
constexpr bool kHopperCode = true;
#else
constexpr bool kHopperCode = false;
#endif
constexpr double kBlockClocks = 2500;   // of a block besides its depth loop
constexpr double kReduceClocks = 4000;  // of a second launch
constexpr double kLone = 0.65;          // a block alone leaves gaps: it takes this share of the time of a full house
constexpr int kMaxSplits = 16, kMinSplitBlocks = 4;

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

bool strides_of(const Problem& p, int64_t bytes) {
    return p.in_stride_n % bytes == 0 && p.in_stride_h % bytes == 0 && p.in_stride_w % bytes == 0 &&
           aligned(p.input, bytes) && aligned(p.weight, bytes);
}

// Cuts `p` as `c` says into as many splits as finish first by estimate; returns that estimate in clocks.
double cut(const Problem& p, const Device& device, const Candidate& c, Plan& plan) {
    plan.kind = c.kind;
    plan.tiles_m = static_cast<int>(divide_up(plan.rows, c.bm));
    plan.tiles_n = static_cast<int>(divide_up(plan.group_out, c.bn));
    plan.wrap = plan.per_tap ? static_cast<int>(divide_up(plan.group_in, c.bk) * c.bk) : plan.group_in;
    plan.depth_blocks = static_cast<int>(divide_up(static_cast<int64_t>(p.kernel_h) * p.kernel_w * plan.wrap, c.bk));
    const int64_t unit = plan.per_tap ? plan.wrap / c.bk : 1;  // splits of a tap would meet only after its scaling
    const double tiles = static_cast<double>(plan.tiles_m) * plan.tiles_n * p.groups;
    const double slots = static_cast<double>(device.multiprocessors) * c.resident;
    const double block_clocks = static_cast<double>(c.bm) * c.bn * c.bk / c.rate;
    double best = -1;
    for (int splits = 1; splits <= kMaxSplits; ++splits) {
        const int64_t depth = divide_up(divide_up(plan.depth_blocks, unit), splits) * unit;
        if (splits > 1 && (depth < kMinSplitBlocks || divide_up(plan.depth_blocks, depth) != splits)) continue;
        const double in_turn =
            static_cast<double>(divide_up(static_cast<int64_t>(tiles * splits), device.multiprocessors));
        const double waves = tiles * splits <= slots ? 1 : tiles * splits / slots + 0.5;
        const double together = in_turn < c.resident ? in_turn : c.resident;
        const double sharing = together > kLone * c.resident ? together : kLone * c.resident;
        double clocks = waves * (static_cast<double>(depth) * block_clocks * sharing + kBlockClocks);
        if (splits > 1) {
            const double bytes = 8.0 * splits * plan.rows * p.out_channels;  // written and read
            clocks += kReduceClocks + bytes / (16.0 * device.multiprocessors);
        }
        if (best >= 0 && clocks >= best) continue;
        best = clocks, plan.splits = splits, plan.blocks_per_split = static_cast<int>(depth);
    }
    plan.blocks = static_cast<int64_t>(plan.tiles_m) * plan.tiles_n * p.groups * plan.splits;
    return best;
}

template <int N>
void choose(const Problem& p, const Device& device, const Candidate (&candidates)[N], Plan& plan) {
    double best = -1;
    for (const Candidate& c : candidates) {
        Plan next = plan;
        const double clocks = cut(p, device, c, next);
        if (best < 0 || clocks < best) best = clocks, plan = next;
    }
}

const char* make_plan(const Problem& p, const Device& device, Plan& plan) {
    const int64_t limit = 0x7fffffff, rows = static_cast<int64_t>(p.batch) * p.out_h * p.out_w;
    if (rows > limit - 256) return "the output has more than 2^31 pixels";
    plan = {};
    plan.rows = static_cast<int>(rows);
    plan.group_in = p.in_channels / p.groups, plan.group_out = p.out_channels / p.groups;
    plan.splits = 1;
    plan.vector_out = p.out_channels % 4 == 0 && plan.group_out % 4 == 0 && aligned(p.output, 16) &&
                      (!p.residual || aligned(p.residual, 16));
    const bool pointwise = p.kernel_h == 1 && p.kernel_w == 1;
    plan.per_tap = p.per_pixel && !pointwise;
    if (plan.group_in % 16 == 0 && strides_of(p, 16)) {
        if (plan.per_tap)
            choose(p, device, kPerTap, plan);
        else if (device.wgmma)
            choose(p, device, kHopper, plan);
        else
            choose(p, device, kPlain, plan);
    } else if (plan.per_tap = p.per_pixel;
               plan.group_in == 1 && p.groups == p.in_channels && p.kernel_h * p.kernel_w <= Depthwise::kMaxTaps) {
        plan.kind = kDepthwise;
        plan.words = plan.group_out == 1 && p.in_channels % 4 == 0 && strides_of(p, 4);
        plan.tiles_m = static_cast<int>(divide_up(p.out_w, Depthwise::kRun));
        plan.tiles_n = static_cast<int>(divide_up(p.out_channels, Depthwise::kChannels));
        plan.blocks = static_cast<int64_t>(p.batch) * p.out_h * plan.tiles_m * plan.tiles_n;
    } else {
        plan.kind = kDirect;
        plan.words = plan.group_in % 4 == 0 && strides_of(p, 4);
        plan.blocks = divide_up(rows * divide_up(plan.group_out, 4) * p.groups, kDirectThreads);
    }
    return plan.blocks > limit ? "the output needs more than 2^31 blocks" : nullptr;
}

const char* launch(void (*kernel)(Problem, Plan), const Problem& p, const Plan& plan, int64_t blocks, int threads,
                   int shared_bytes, void* stream) {
    if (shared_bytes > 48 << 10) {
        const auto wide = cudaFuncAttributeMaxDynamicSharedMemorySize;
        const cudaError_t error = cudaFuncSetAttribute(kernel, wide, shared_bytes);
        if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(p, plan);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Tile>
const char* launch_tile(void (*kernel)(Problem, Plan), const Problem& p, const Plan& plan, void* stream) {
    return launch(kernel, p, plan, plan.blocks, Tile::kThreads, Tile::kSharedBytes, stream);
}

const char* launch_plan(const Problem& p, const Plan& plan, void* stream) {
    switch (plan.kind) {
        case kLarge:
            return launch_tile<TileLarge>(mma_kernel<TileLarge>, p, plan, stream);
        case kSmall:
            return launch_tile<TileSmall>(mma_kernel<TileSmall>, p, plan, stream);
        case kTapLarge:
            return launch_tile<TileTapLarge>(mma_kernel<TileTapLarge>, p, plan, stream);
        case kTapSmall:
            return launch_tile<TileTapSmall>(mma_kernel<TileTapSmall>, p, plan, stream);
        case kWgmma64:
            return launch_tile<Wgmma64>(wgmma_kernel<Wgmma64>, p, plan, stream);
        case kWgmma128:
            return launch_tile<Wgmma128>(wgmma_kernel<Wgmma128>, p, plan, stream);
        case kWgmma160:
            return launch_tile<Wgmma160>(wgmma_kernel<Wgmma160>, p, plan, stream);
        case kDepthwise: {
            const int shared_bytes = p.kernel_h * p.kernel_w * Depthwise::kChannels;
            return launch(depthwise_kernel, p, plan, plan.blocks, kDirectThreads, shared_bytes, stream);
        }
        default:
            return launch(direct_kernel, p, plan, plan.blocks, kDirectThreads, 0, stream);
    }
}

bool empty(const Problem& p) { return p.batch == 0 || p.out_h == 0 || p.out_w == 0 || p.out_channels == 0; }

}  // namespace

namespace int8_conv2d {
namespace cuda {

Device current_device() {
    int device = 0, multiprocessors = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return {multiprocessors > 0 ? multiprocessors : 1, kHopperCode && major == 9 && minor == 0};
}

int64_t workspace_bytes(const Problem& p, const Device& device) {
    Plan plan;
    if (empty(p) || make_plan(p, device, plan) || plan.splits == 1) return 0;
    return 4 * static_cast<int64_t>(plan.splits) * plan.rows * p.out_channels;
}

const char* run(const Problem& p, const Device& device, void* stream) {
    Plan plan;
    if (empty(p)) return nullptr;
    if (const char* why = make_plan(p, device, plan)) return why;
    if (const char* why = launch_plan(p, plan, stream)) return why;
    if (plan.splits == 1) return nullptr;
    const int64_t blocks = divide_up(plan.rows * divide_up(p.out_channels, 4), kDirectThreads);
    return launch(reduce_kernel, p, plan, blocks, kDirectThreads, 0, stream);
}

}  // namespace cuda
}  // namespace int8_conv2d
}  // namespace pdn
