// One step of a sampler on CUDA: elementwise, in one pass; a second kernel joins the sums of pieces, where there are
// sums. A lane takes the four columns of a Philox counter, 32 apart, so that a warp reads lines of neighbours.
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

constexpr uint32_t bit(int column) { return 1u << column; }

// A unit's row, in shared memory. A column that is not `used` is 0: what it multiplies may be garbage, and is not read.
struct Row {
    float v[kRowWidth];
    uint32_t used;

    PDN_HD bool uses(int column) const { return (used >> column & 1u) != 0; }
    PDN_HD bool uses_any(uint32_t columns) const { return (used & columns) != 0; }
};

constexpr uint32_t kAnyKept = ~(bit(kKeptSample) - 1u);

constexpr int kSumBytes = kWarps * kMostSums * 8, kSharedBytes = kSumBytes + sizeof(Row);

// Where a lane works: its columns are `column` and the next three, 32 apart; those that are its unit's are `ok`.
struct Place {
    int64_t sample;
    int32_t column;
    bool ok[kEach];
};

PDN_HD Place place_of(const Problem& p, int64_t unit, int piece, int thread) {
    Place place;
    place.sample = unit / p.units_per_sample;
    const int32_t first = static_cast<int32_t>(unit - place.sample * p.units_per_sample) * p.unit_size;
    constexpr int32_t kBlock = static_cast<int32_t>(kNoiseBlock);
    place.column = first / kBlock * kBlock + piece * kPiece + thread / 32 * kBlock + thread % 32;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int32_t column = place.column + 32 * i;
        place.ok[i] = column >= first && column - first < p.unit_size;
    }
    return place;
}

// Plain loads: what is read may be what the same thread writes later.
template <typename T>
PDN_HD void read(const void* data, int64_t offset, const Place& place, Four& v) {
    const T* from = static_cast<const T*>(data) + offset + place.column;
#pragma unroll
    for (int i = 0; i < kEach; ++i) v[i] = place.ok[i] ? to_float(from[32 * i]) : 0.f;
}

PDN_HD void read(Element type, const void* data, int64_t offset, const Place& place, Four& v) {
    if (type == Element::float32) {
        read<float>(data, offset, place, v);
    } else if (type == Element::bfloat16) {
        read<BFloat16>(data, offset, place, v);
    } else {
        read<Float16>(data, offset, place, v);
    }
}

template <typename T>
PDN_HD void write(void* data, int64_t offset, const Place& place, const Four& v) {
    T* to = static_cast<T*>(data) + offset + place.column;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
        if (place.ok[i]) from_float(v[i], to[32 * i]);
}

PDN_HD void write(Element type, void* data, int64_t offset, const Place& place, const Four& v) {
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

PDN_HD void clean_sample(const Problem& p, const Row& row, const Place& place, const Four& x, const Four& y, Four& x0) {
    add(row, kX0Sample, x, x0);
    add(row, kX0Output, y, x0);
    const float bound = p.threshold ? p.threshold[place.sample] : row.v[kClip];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        x0[i] = clamped(x0[i], bound);
        if (p.threshold) x0[i] /= bound;
    }
}

template <typename T>
PDN_HD void noise_columns(const Problem& p, const Row& row, int64_t at, const Place& place, const Four& v, Four& z) {
    if (p.noise) {
        read<T>(p.noise, at, place, z);
    } else {
        const NoiseRow noise = noise_row(p.keys[2 * place.sample], p.keys[2 * place.sample + 1],
                                         static_cast<uint32_t>(static_cast<uint64_t>(*p.step)));
        normal_columns(philox(static_cast<uint32_t>(place.column / (32 * kEach) * 32 + place.column % 32), noise), z);
    }
    if (p.learned_variance) {
        const float small = row.v[kLogSmall], range = row.v[kLogLarge] - small;
#pragma unroll
        for (int i = 0; i < kEach; ++i) z[i] *= expf(fmaf((v[i] + 1.f) * 0.5f, range, small));
    }
}

PDN_HD bool finite(float x) { return fabsf(x) < INFINITY; }

// A lane's four columns; adds to its sums. Returns whether x' and m are finite.
template <typename T, Statistics kind>
PDN_HD bool step_of_lane(const Problem& p, const Row& row, const Place& place, float (&sums)[kMostSums]) {
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
        clean_sample(p, row, place, x, y, x0);
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
        noise_columns<T>(p, row, at, place, variance, z);
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

template <typename T, Statistics kind>
__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ Problem p) {
    PDN_SHARED(memory);
    auto* warps = reinterpret_cast<double*>(memory);
    Row& row = *reinterpret_cast<Row*>(memory + kSumBytes);
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
    const bool good = step_of_lane<T, kind>(p, row, place_of(p, unit, piece, static_cast<int>(threadIdx.x)), sums);
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

template <typename T, typename Launch>
const char* launch_steps(const Problem& p, const Launch& launch) {
    const auto kernel = p.statistics == Statistics::none      ? step_kernel<T, Statistics::none>
                        : p.statistics == Statistics::moments ? step_kernel<T, Statistics::moments>
                                                              : step_kernel<T, Statistics::dots>;
    return launch(kernel, p.units * p.pieces, 1, kThreads, kSharedBytes, p);
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
