// One step of a sampler on CUDA: elementwise, in one pass; a second kernel joins the sums of pieces, where there are
// sums.
//
// A warp takes the columns of 32 Philox counters at a time. Where all tensors are aligned, a lane takes four
// neighbours, with one access each, and lanes pass on the noise that they draw; elsewhere it takes the four columns of
// its own counter, 32 apart.
//
// tests/native runs these kernels on the host.
#pragma once

#include "../core/cuda_mma.cuh"
#include "../core/cuda_normal.cuh"
#include "cuda.h"

namespace pdn {
namespace sampler_step {
namespace cuda {
namespace {

constexpr int kWarps = kThreads / 32, kEach = 4;
static_assert(kNoiseLanes == 32 && kNoiseBlock == 32 * kEach && kPiece == kWarps * kNoiseBlock,
              "a lane's columns share a counter");

using Four = float[kEach];

PDN_HD constexpr uint32_t bit(int column) { return 1u << column; }

// A unit's row, in shared memory. A column that is not `used` is 0: what it multiplies may be garbage, and is not read.
struct Row {
    float v[kRowWidth];
    uint32_t used;

    PDN_HD bool uses(int column) const { return (used >> column & 1u) != 0; }
    PDN_HD bool uses_any(uint32_t columns) const { return (used & columns) != 0; }
};

constexpr uint32_t kAnyKept = ~(bit(kKeptSample) - 1u);

// Shared memory: noise on its way to other lanes, sums of warps, the row.
constexpr int kNoiseBytes = kWarps * static_cast<int>(kNoiseBlock) * 4, kSumBytes = kWarps * kMostSums * 8;
constexpr int kSharedBytes = kNoiseBytes + kSumBytes + static_cast<int>(sizeof(Row));

// Where a lane works: its columns are `column` and the next three, `apart`; those that are its unit's are `ok`. With
// neighbours all four are or none.
template <int apart>
struct Place {
    int64_t sample;
    int32_t column;
    bool ok[kEach];
};

template <int apart>
PDN_HD Place<apart> place_of(const Problem& p, int64_t unit, int piece, int thread) {
    Place<apart> place;
    place.sample = unit / p.units_per_sample;
    const int32_t first = static_cast<int32_t>(unit - place.sample * p.units_per_sample) * p.unit_size;
    constexpr int32_t kBlock = static_cast<int32_t>(kNoiseBlock);
    place.column =
        first / kBlock * kBlock + piece * kPiece + thread / 32 * kBlock + thread % 32 * (apart == 1 ? kEach : 1);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int32_t column = place.column + apart * i;
        place.ok[i] = column >= first && column - first < p.unit_size;
    }
    return place;
}

template <typename T>
struct alignas(kEach * sizeof(T)) Together {
    T v[kEach];
};

// Plain loads: what is read may be what the same thread writes later.
template <typename T, int apart>
PDN_HD void read(const void* data, int64_t offset, const Place<apart>& place, Four& v) {
    const T* from = static_cast<const T*>(data) + offset + place.column;
    if constexpr (apart == 1) {
        Together<T> four{};
        if (place.ok[0]) four = *reinterpret_cast<const Together<T>*>(from);
#pragma unroll
        for (int i = 0; i < kEach; ++i) v[i] = to_float(four.v[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kEach; ++i) v[i] = place.ok[i] ? to_float(from[apart * i]) : 0.f;
    }
}

template <int apart>
PDN_HD void read(Element type, const void* data, int64_t offset, const Place<apart>& place, Four& v) {
    if (type == Element::float32) {
        read<float>(data, offset, place, v);
    } else if (type == Element::bfloat16) {
        read<BFloat16>(data, offset, place, v);
    } else {
        read<Float16>(data, offset, place, v);
    }
}

template <typename T, int apart>
PDN_HD void write(void* data, int64_t offset, const Place<apart>& place, const Four& v) {
    T* to = static_cast<T*>(data) + offset + place.column;
    if constexpr (apart == 1) {
        Together<T> four;
#pragma unroll
        for (int i = 0; i < kEach; ++i) from_float(v[i], four.v[i]);
        if (place.ok[0]) *reinterpret_cast<Together<T>*>(to) = four;
    } else {
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            if (place.ok[i]) from_float(v[i], to[apart * i]);
    }
}

template <int apart>
PDN_HD void write(Element type, void* data, int64_t offset, const Place<apart>& place, const Four& v) {
    if (type == Element::float32) {
        write<float>(data, offset, place, v);
    } else if (type == Element::bfloat16) {
        write<BFloat16>(data, offset, place, v);
    } else {
        write<Float16>(data, offset, place, v);
    }
}

// to += coefficient * v, unless the coefficient is 0.
PDN_HD void add(const Row& row, int column, const Four& v, Four& to) {
    if (!row.uses(column)) return;
    const float coefficient = row.v[column];
#pragma unroll
    for (int i = 0; i < kEach; ++i) to[i] = fmaf(coefficient, v[i], to[i]);
}

PDN_HD float clamped(float x, float bound) { return x > bound ? bound : x < -bound ? -bound : x; }  // keeps NaN

PDN_HD void clean_sample(const Problem& p, const Row& row, int64_t sample, const Four& x, const Four& y, Four& x0) {
    add(row, kX0Sample, x, x0);
    add(row, kX0Output, y, x0);
    const float bound = p.threshold ? p.threshold[sample] : row.v[kClip];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        x0[i] = clamped(x0[i], bound);
        if (p.threshold) x0[i] /= bound;
    }
}

// What a lane draws is for the columns of its counter, 32 apart; neighbours get theirs through shared memory.
template <int apart>
PDN_DEVICE void draw(const Problem& p, const Place<apart>& place, float* exchange, Four& z) {
    const NoiseRow noise = noise_row(p.keys[2 * place.sample], p.keys[2 * place.sample + 1],
                                     static_cast<uint32_t>(static_cast<uint64_t>(*p.step)));
    const int lane = threadIdx.x % 32;
    normal_columns(philox(static_cast<uint32_t>(place.column / (32 * kEach) * 32 + lane), noise), z);
    if constexpr (apart == 1) {
        exchange += threadIdx.x / 32 * (32 * kEach);
#pragma unroll
        for (int i = 0; i < kEach; ++i) exchange[32 * i + lane] = z[i];
        __syncwarp();
        const Float4 four = shared4(exchange + kEach * lane);
#pragma unroll
        for (int i = 0; i < kEach; ++i) z[i] = four.v[i];
    }
}

template <typename T, int apart>
PDN_DEVICE void noise_columns(const Problem& p, const Row& row, int64_t at, const Place<apart>& place, const Four& v,
                              float* exchange, Four& z) {
    if (p.noise) {
        read<T>(p.noise, at, place, z);
    } else {
        draw(p, place, exchange, z);
    }
    if (p.learned_variance) {
        const float small = row.v[kLogSmall], range = row.v[kLogLarge] - small;
#pragma unroll
        for (int i = 0; i < kEach; ++i) z[i] *= expf(fmaf((v[i] + 1.f) * 0.5f, range, small));
    }
}

PDN_HD bool finite(float x) { return fabsf(x) < INFINITY; }

// A lane's four columns; adds to its sums. Returns whether x' and m are finite.
template <typename T, Statistics kind, int apart>
PDN_DEVICE bool step_of_lane(const Problem& p, const Row& row, const Place<apart>& place, float* exchange,
                             float (&sums)[kMostSums]) {
    const int64_t at = place.sample * p.size;  // of tensors that are dense
    const bool wants_x0 = p.preview || row.uses(kMX0), has_output = p.output != nullptr;
    const bool draws = row.uses(kNoise) && (p.noise || p.keys);
    const uint32_t kept_columns = p.kept ? kAnyKept : 0u;

    // Loads first, so that they are under way together.
    Four x{}, y{}, other{}, base{}, variance{};
    const uint32_t of_sample = bit(kSample) | bit(kMSample) | (wants_x0 ? bit(kX0Sample) : 0u);
    const uint32_t of_output = bit(kOutput) | bit(kMOutput) | (wants_x0 ? bit(kX0Output) : 0u);
    if (row.uses_any(of_sample | (kept_columns & bit(kKeptSample)))) read<T>(p.sample, at, place, x);
    const bool reads_output = has_output && row.uses_any(of_output);
    const int64_t of_output_at = place.sample * p.output_stride;
    if (reads_output) read(p.output_type, p.output, of_output_at, place, y);
    const bool guided = reads_output && p.unconditional;
    if (guided) read(p.unconditional_type, p.unconditional, place.sample * p.unconditional_stride, place, other);
    if (p.base && row.uses_any(bit(kBase) | (kept_columns & bit(kKeptBase)))) read<T>(p.base, at, place, base);
    if (draws && p.learned_variance) read(p.output_type, p.output, of_output_at + p.size, place, variance);

    if (guided) {
        const float guidance = row.v[kGuidance];
#pragma unroll
        for (int i = 0; i < kEach; ++i) y[i] = fmaf(guidance, y[i] - other[i], other[i]);
    }
    Four m{}, fresh{}, kept{};
    add(row, kMSample, x, m);
    add(row, kMOutput, y, m);
    if (wants_x0) {
        Four x0{};
        clean_sample(p, row, place.sample, x, y, x0);
        add(row, kMX0, x0, m);
        if (p.preview) write<T>(p.preview, at, place, x0);
    }
    add(row, kSample, x, fresh);
    add(row, kM, m, fresh);
    add(row, kOutput, y, fresh);
    add(row, kBase, base, fresh);
    if (p.kept) {
        add(row, kKeptSample, x, kept);
        add(row, kKeptM, m, kept);
        add(row, kKeptBase, base, kept);
    }
    if constexpr (kind == Statistics::dots) {
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            if (place.ok[i]) sums[0] = fmaf(m[i], m[i], sums[0]);
    }
    const int64_t slot_size = p.batch * p.size;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
        if (j >= p.slots) break;
        const uint32_t columns = bit(kHistory + j) | (kept_columns & bit(kKeptHistory + j));
        if (kind != Statistics::dots && !row.uses_any(columns)) continue;
        Four old;
        read<T>(p.history, j * slot_size + at, place, old);
        add(row, kHistory + j, old, fresh);
        if (p.kept) add(row, kKeptHistory + j, old, kept);
        if constexpr (kind == Statistics::dots) {
#pragma unroll
            for (int i = 0; i < kEach; ++i)
                if (place.ok[i]) sums[1 + j] = fmaf(m[i], old[i], sums[1 + j]);
        }
    }
    const float slot = row.v[kSlot];
    if (slot >= 0.f && slot < static_cast<float>(p.slots))
        write<T>(p.history, static_cast<int64_t>(slot) * slot_size + at, place, m);
    if (draws) {
        Four z;
        noise_columns<T>(p, row, at, place, variance, exchange, z);
        add(row, kNoise, z, fresh);
    }
    write<T>(p.out, at, place, fresh);
    if (p.kept && row.uses_any(kAnyKept)) {
        add(row, kKeptOut, fresh, kept);
        write<T>(p.kept, at, place, kept);
    }
    bool good = true;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        if (!place.ok[i]) continue;
        good = good && finite(fresh[i]) && finite(m[i]);
        if constexpr (kind == Statistics::moments) {
            sums[0] += fresh[i];
            sums[1] = fmaf(fresh[i], fresh[i], sums[1]);
        }
    }
    if (p.model_input) {
        const float scale = row.v[kInputScale];
#pragma unroll
        for (int i = 0; i < kEach; ++i) fresh[i] *= scale;
        for (int copy = 0; copy < p.copies; ++copy)
            write(p.input_type, p.model_input, copy * slot_size + at, place, fresh);
    }
    return good;
}

PDN_DEVICE double warp_sum(double x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kEveryLane, x, distance);
    return x;
}

// The sums of a block of threads, in one order whatever runs first.
PDN_DEVICE void write_sums(const Problem& p, int count, const float (&sums)[kMostSums], double* warps) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kMostSums; ++i) {
        if (i >= count) break;
        const double sum = warp_sum(static_cast<double>(sums[i]));
        if (lane == 0) warps[warp * kMostSums + i] = sum;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < count) {
        double sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += warps[w * kMostSums + threadIdx.x];
        (p.partials ? p.partials : p.statistic)[static_cast<int64_t>(blockIdx.x) * count + threadIdx.x] = sum;
    }
}

template <typename T, Statistics kind, int apart>
__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ Problem p) {
    PDN_SHARED(memory);
    auto* exchange = reinterpret_cast<float*>(memory);
    auto* warps = reinterpret_cast<double*>(memory + kNoiseBytes);
    Row& row = *reinterpret_cast<Row*>(memory + kNoiseBytes + kSumBytes);
    const auto pieces = static_cast<unsigned>(p.pieces);
    const int64_t unit = blockIdx.x / pieces;
    const int piece = static_cast<int>(blockIdx.x % pieces);
    if (threadIdx.x < kRowWidth) {
        const int64_t number = p.rows[p.one_row ? 0 : unit];
        const bool exists = number >= 0 && number < p.table_rows;
        const float value = exists ? p.table[number * kRowWidth + threadIdx.x] : NAN;
        row.v[threadIdx.x] = value;
        const uint32_t used = __ballot_sync(kEveryLane, value != 0.f);
        if (threadIdx.x == 0) row.used = used;
    }
    __syncthreads();
    float sums[kMostSums] = {};
    const auto place = place_of<apart>(p, unit, piece, static_cast<int>(threadIdx.x));
    const bool good = step_of_lane<T, kind>(p, row, place, exchange, sums);
    if (p.faults && __any_sync(kEveryLane, !good) && threadIdx.x % 32 == 0)
        atomicMin(p.faults, static_cast<int32_t>(*p.step & 0x7fffffff));
    if constexpr (kind != Statistics::none) write_sums(p, sum_count(p), sums, warps);
}

// A warp adds up the pieces of one sum of a unit.
__global__ void __launch_bounds__(kThreads) sums_kernel(const __grid_constant__ Problem p) {
    const int count = sum_count(p), lane = threadIdx.x % 32;
    const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, unit = item / count;
    if (unit >= p.units) return;
    double sum = 0;
    for (int piece = lane; piece < p.pieces; piece += 32)
        sum += p.partials[(unit * p.pieces + piece) * count + (item - unit * count)];
    sum = warp_sum(sum);
    if (lane == 0) p.statistic[item] = sum;
}

// --------------------------------------------------------------------------------------------------------- launches

// Whether four neighbours always lie at an address that is a multiple of their size.
inline bool aligned(const Problem& p) {
    const auto at = [](const void* data, Element type) {
        return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(kEach * pdn::cuda::bytes_of(type)) == 0;
    };
    bool good = p.unit_size % kEach == 0 && (!p.output || p.output_stride % kEach == 0) &&
                (!p.unconditional || p.unconditional_stride % kEach == 0);
    for (const void* data :
         {p.sample, p.base, p.noise, static_cast<const void*>(p.history), static_cast<const void*>(p.out),
          static_cast<const void*>(p.kept), static_cast<const void*>(p.preview)})
        good = good && at(data, p.state);
    return good && at(p.output, p.output_type) && at(p.unconditional, p.unconditional_type) &&
           at(p.model_input, p.input_type);
}

template <typename T, int apart, typename Launch>
const char* launch_kind(const Problem& p, const Launch& launch) {
    const auto kernel = p.statistics == Statistics::none      ? step_kernel<T, Statistics::none, apart>
                        : p.statistics == Statistics::moments ? step_kernel<T, Statistics::moments, apart>
                                                              : step_kernel<T, Statistics::dots, apart>;
    return launch(kernel, p.units * p.pieces, 1, kThreads, kSharedBytes, p);
}

template <typename T, typename Launch>
const char* launch_steps(const Problem& p, const Launch& launch) {
    return aligned(p) ? launch_kind<T, 1>(p, launch) : launch_kind<T, 32>(p, launch);
}

template <typename Launch>
const char* launch_step(const Problem& p, const Launch& launch) {
    const char* why = p.state == Element::float32    ? launch_steps<float>(p, launch)
                      : p.state == Element::bfloat16 ? launch_steps<BFloat16>(p, launch)
                                                     : launch_steps<Float16>(p, launch);
    if (why || p.statistics == Statistics::none || !p.partials) return why;
    return launch(sums_kernel, (p.units * sum_count(p) + kWarps - 1) / kWarps, 1, kThreads, 0, p);
}

}  // namespace
}  // namespace cuda
}  // namespace sampler_step
}  // namespace pdn
