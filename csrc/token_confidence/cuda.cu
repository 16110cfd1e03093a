// Tokens and confidences on CUDA, in one pass over the logits: a block of threads takes a piece of a row, a warp joins
// the pieces of a row.
//
// PDN_HD functions of a lane's number hold the arithmetic; tests/native runs them on the host.
#include "../core/cuda_util.cuh"
#include "../core/philox.h"
#include "cuda.h"

namespace pdn {
namespace {

using token_confidence::cuda::kPiece;
using token_confidence::cuda::Partial;
using token_confidence::cuda::Problem;
using token_confidence::cuda::Tokens;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kColumns = static_cast<int>(kNoiseBlock), kEach = kColumns / 32;  // of a warp's step, of a lane's
static_assert(kNoiseLanes == 32 && kPiece % (kWarps * kColumns) == 0, "a lane's columns share a counter");

PDN_HD float impossible() { return -INFINITY; }

PDN_HD Partial nothing() { return {impossible(), 0.f, impossible(), impossible(), -1}; }

PDN_HD bool is_among(const Tokens& tokens, int column) {
    bool found = false;
#pragma unroll
    for (int i = 0; i < token_confidence::cuda::kMostTokens; ++i) found |= i < tokens.count && tokens.v[i] == column;
    return found;
}

PDN_HD float guided(const Problem& p, float conditional, float unconditional) {
    const float v = unconditional + (p.guidance + 1.f) * (conditional - unconditional);
    return conditional == impossible() ? conditional : v;
}

// exp(value - top), 0 for -inf whatever the top is.
PDN_HD float weight(float value, float top) { return value == impossible() ? 0.f : expf(value - top); }

PDN_HD int64_t source_row(const Problem& p, int64_t row) {
    const int64_t source = p.index ? p.index[row] : row;
    return source >= 0 && source < p.source_rows ? source : -1;
}

PDN_HD NoiseRow noise_of(const Problem& p, int64_t row) {
    return p.keys ? noise_row(p.keys[2 * row], p.keys[2 * row + 1], p.step) : noise_row(p.seed, row, p.step);
}

// A lane's columns of a step: every 32nd from `column` on. -inf beyond the vocabulary and where forbidden.
template <typename T>
PDN_HD void load_columns(const Problem& p, const T* x, const T* u, int column, float (&l)[kEach]) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
        const int at = column + j * 32;
        l[j] = at < p.vocabulary ? load1(x + at) : impossible();
    }
    if (u) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const int at = column + j * 32;
            if (at < p.vocabulary) l[j] = guided(p, l[j], load1(u + at));
        }
    }
    if (p.forbidden.count) {
#pragma unroll
        for (int j = 0; j < kEach; ++j)
            if (is_among(p.forbidden, column + j * 32)) l[j] = impossible();
    }
}

template <bool Noise>
PDN_HD void choose(const Problem& p, const NoiseRow& noise, int column, const float (&l)[kEach], Partial& known) {
    PhiloxWords words{};
    if constexpr (Noise) words = philox(static_cast<uint32_t>(column / kColumns * 32 + column % 32), noise);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
        float ranked = l[j];
        if constexpr (Noise) ranked += p.temperature * gumbel(words.v[j]);
        if (ranked > known.best) known.best = ranked, known.chosen = l[j], known.place = column + j * 32;
    }
}

PDN_HD void add_weights(const Problem& p, int column, float (&l)[kEach], Partial& known) {
    if (p.uncounted.count) {
#pragma unroll
        for (int j = 0; j < kEach; ++j)
            if (is_among(p.uncounted, column + j * 32)) {
                if (l[j] != l[j]) known.sum = l[j];  // no answer all the same
                l[j] = impossible();
            }
    }
    float top = known.top;
#pragma unroll
    for (int j = 0; j < kEach; ++j) top = l[j] > top ? l[j] : top;  // a NaN never is
    known.sum *= weight(known.top, top);
    known.top = top;
#pragma unroll
    for (int j = 0; j < kEach; ++j) known.sum += weight(l[j], top);
}

// What a lane finds in its share of a piece: in each step of the block of threads, the columns of its warp and lane.
template <typename T, bool Noise>
PDN_HD Partial piece_of_lane(const Problem& p, int64_t row, int piece, int warp, int lane) {
    Partial known = nothing();
    const int64_t source = source_row(p, row);
    if (source < 0) {
        known.sum = NAN;
        return known;
    }
    const T* x = static_cast<const T*>(p.logits) + source * p.stride;
    const T* u = p.unconditional ? static_cast<const T*>(p.unconditional) + source * p.unconditional_stride : nullptr;
    const NoiseRow noise = noise_of(p, row);
    const int first = piece * kPiece, end = p.vocabulary - first < kPiece ? p.vocabulary : first + kPiece;
#pragma unroll(Noise ? 1 : 2)  // loads in flight; noise has other things to wait for, and needs the registers
    for (int column = first + warp * kColumns + lane; column < end; column += kWarps * kColumns) {
        float l[kEach];
        load_columns(p, x, u, column, l);
        choose<Noise>(p, noise, column, l, known);
        add_weights(p, column, l, known);
    }
    return known;
}

// The same whichever comes first.
PDN_HD Partial joined(const Partial& a, const Partial& b) {
    const bool second = b.best > a.best || (b.best == a.best && b.place >= 0 && (a.place < 0 || b.place < a.place));
    const float top = a.top > b.top ? a.top : b.top;
    Partial all;
    all.top = top;
    all.sum = a.sum * weight(a.top, top) + b.sum * weight(b.top, top);
    all.best = second ? b.best : a.best;
    all.chosen = second ? b.chosen : a.chosen;
    all.place = second ? b.place : a.place;
    return all;
}

PDN_HD float logit_at(const Problem& p, int64_t source, int column) {
    const auto read = [&](const void* data, int64_t stride) {
        const int64_t at = source * stride + column;
        if (p.type == token_confidence::cuda::Element::float32) return load1(static_cast<const float*>(data) + at);
        if (p.type == token_confidence::cuda::Element::float16) return load1(static_cast<const Float16*>(data) + at);
        return load1(static_cast<const BFloat16*>(data) + at);
    };
    const float l = read(p.logits, p.stride);
    return p.unconditional ? guided(p, l, read(p.unconditional, p.unconditional_stride)) : l;
}

PDN_HD float probability(const Problem& p, const Partial& all, int column, float logit) {
    if (is_among(p.uncounted, column) || is_among(p.forbidden, column) || all.sum == 0.f) return 0.f;
    return weight(logit, all.top) / all.sum;
}

PDN_HD void finish(const Problem& p, int64_t row, const Partial& all) {
    const bool answer = all.sum == all.sum && all.best < INFINITY && all.place >= 0;
    p.token[row] = answer ? all.place : -1;
    p.confidence[row] = answer ? probability(p, all, all.place, all.chosen) : NAN;
    if (p.eos >= 0)
        p.eos_probability[row] = answer ? probability(p, all, p.eos, logit_at(p, source_row(p, row), p.eos)) : NAN;
}

__device__ Partial warp_joined(Partial known) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        Partial other;
        other.top = __shfl_xor_sync(~0u, known.top, distance);
        other.sum = __shfl_xor_sync(~0u, known.sum, distance);
        other.best = __shfl_xor_sync(~0u, known.best, distance);
        other.chosen = __shfl_xor_sync(~0u, known.chosen, distance);
        other.place = __shfl_xor_sync(~0u, known.place, distance);
        known = joined(known, other);
    }
    return known;
}

template <typename T, bool Noise>
__global__ void __launch_bounds__(kThreads) token_piece_kernel(const __grid_constant__ Problem p) {
    __shared__ Partial warps[kWarps];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t items = p.rows * p.pieces;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const int64_t row = item / p.pieces;
        const Partial known =
            warp_joined(piece_of_lane<T, Noise>(p, row, static_cast<int>(item - row * p.pieces), warp, lane));
        if (lane == 0) warps[warp] = known;
        __syncthreads();
        if (warp == 0) {
            const Partial all = warp_joined(lane < kWarps ? warps[lane] : nothing());
            if (lane == 0) p.partials[item] = all;
        }
        __syncthreads();
    }
}

__global__ void __launch_bounds__(kThreads) token_join_kernel(const __grid_constant__ Problem p) {
    const int lane = threadIdx.x % 32;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; row < p.rows; row += step) {
        Partial known = nothing();
        for (int piece = lane; piece < p.pieces; piece += 32) known = joined(known, p.partials[row * p.pieces + piece]);
        known = warp_joined(known);
        if (lane == 0) finish(p, row, known);
    }
}

// --------------------------------------------------------------------------------------------------------- launchers

constexpr int64_t kMaxBlocks = 1 << 20;  // blocks take several items beyond that

const char* launch(void (*kernel)(Problem), const Problem& p, int64_t blocks, void* stream) {
    const auto count = static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
    kernel<<<count, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
const char* launch_pieces(const Problem& p, void* stream) {
    return launch(p.temperature > 0.f ? token_piece_kernel<T, true> : token_piece_kernel<T, false>, p,
                  p.rows * p.pieces, stream);
}

}  // namespace

namespace token_confidence {
namespace cuda {

const char* run(const Problem& p, void* stream) {
    if (p.rows == 0) return nullptr;
    const char* why = p.type == Element::float32    ? launch_pieces<float>(p, stream)
                      : p.type == Element::bfloat16 ? launch_pieces<BFloat16>(p, stream)
                                                    : launch_pieces<Float16>(p, stream);
    return why ? why : launch(token_join_kernel, p, (p.rows + kWarps - 1) / kWarps, stream);
}

}  // namespace cuda
}  // namespace token_confidence
}  // namespace pdn
