// One pass over what a step reads: guidance, conversion, history, the linear update, noise. A tile of vectors is read
// before `out`, `kept` and the slot of the history are written, so these may be what was read.
// Included once per ISA level.
#pragma once

#include "../core/fp16.h"
#include "../core/normal.inl"
#include "../core/past.inl"
#include "params.h"

namespace pdn {
namespace sampler_step {
namespace {

constexpr int kTile = 4;                        // vectors
constexpr int64_t kNoiseRun = 8 * kNoiseBlock;  // columns whose noise is made at once: they stay in the first cache
static_assert(kChunk % kNoiseBlock == 0 && kNoiseBlock % (kTile * kWidth) == 0, "noise comes in whole blocks");

// A slot of the history and what it is multiplied with.
template <class T>
struct Past {
    const T* data;
    float on_out, on_kept;
    int slot;
};

// What a chunk does: pointers to its first elements, null for what is not touched.
template <class T, class O>
struct Task {
    const float* row;
    const T *sample, *base, *noise;
    const O *output, *unconditional, *variance;
    Past<T> past[kSlots];
    int past_count;
    T *slot, *out, *kept, *preview;
    void* input[kMostCopies];
    int copies;
    DType input_dtype;
    Statistics statistics;
    bool converts, keeps, makes_noise, thresholds, past_caches;
    float bound;  // of x0
};

// What a chunk adds up.
struct Found {
    vf sums[kMostSums];
    vi bad;  // not 0 where something was not finite
};

using Tile = vf[kTile];

template <class E>
PDN_INLINE void write(E* p, const Tile& v, [[maybe_unused]] bool past_caches) {
    if constexpr (sizeof(E) == sizeof(float)) {
        if (past_caches && streams_to(p)) {
            for (int i = 0; i < kTile; ++i) store_past(p + i * kWidth, v[i]);
            return;
        }
    }
    for (int i = 0; i < kTile; ++i) store(p + i * kWidth, v[i]);
}

PDN_INLINE vf clamped(vf x, float bound) {  // keeps NaN
    x = select(x > bound, splat(bound), x);
    return select(x < -bound, splat(-bound), x);
}

PDN_INLINE vf total(const Tile& v) { return (v[0] + v[1]) + (v[2] + v[3]); }

PDN_INLINE vf product_sum(const Tile& a, const Tile& b) {
    vf sum = a[0] * b[0];
    for (int i = 1; i < kTile; ++i) sum += a[i] * b[i];
    return sum;
}

// NaN where one of them is not finite, else 0.
PDN_INLINE vi not_finite(const Tile& v) {
    vf sum{};
    for (int i = 0; i < kTile; ++i) sum += v[i] * 0.f;
    return (vi)sum;
}

// The kTile vectors from element `at` of the chunk on. `z` is generated noise.
template <class T, class O>
PDN_INLINE void tile(const Task<T, O>& t, int64_t at, const float* z, Found& found) {
    const float* c = t.row;
    Tile x, y, m, next, kept;
    const auto each = [](const auto& body) {
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i) body(i, i * kWidth);
    };
    const auto from = [&](const auto* p, int offset) { return load(p + at + offset); };

    each([&](int i, int) { x[i] = y[i] = m[i] = next[i] = kept[i] = vf{}; });
    if (t.sample) each([&](int i, int o) { x[i] = from(t.sample, o); });
    if (t.output) each([&](int i, int o) { y[i] = from(t.output, o); });
    if (t.unconditional)
        each([&](int i, int o) {
            const vf u = from(t.unconditional, o);
            y[i] = u + c[kGuidance] * (y[i] - u);
        });

    if (t.converts) {
        Tile clean;
        each([&](int i, int) { clean[i] = vf{}; });
        if (c[kX0Sample] != 0.f) each([&](int i, int) { clean[i] = c[kX0Sample] * x[i]; });
        if (c[kX0Output] != 0.f) each([&](int i, int) { clean[i] += c[kX0Output] * y[i]; });
        if (t.bound < __builtin_inff()) each([&](int i, int) { clean[i] = clamped(clean[i], t.bound); });
        if (t.thresholds) each([&](int i, int) { clean[i] /= t.bound; });
        if (c[kMX0] != 0.f) each([&](int i, int) { m[i] = c[kMX0] * clean[i]; });
        if (t.preview) write(t.preview + at, clean, t.past_caches);
    }
    if (c[kMSample] != 0.f) each([&](int i, int) { m[i] += c[kMSample] * x[i]; });
    if (c[kMOutput] != 0.f) each([&](int i, int) { m[i] += c[kMOutput] * y[i]; });

    if (c[kSample] != 0.f) each([&](int i, int) { next[i] = c[kSample] * x[i]; });
    if (c[kBase] != 0.f && t.base) each([&](int i, int o) { next[i] += c[kBase] * from(t.base, o); });
    if (c[kOutput] != 0.f) each([&](int i, int) { next[i] += c[kOutput] * y[i]; });
    if (c[kM] != 0.f) each([&](int i, int) { next[i] += c[kM] * m[i]; });
    for (int k = 0; k < t.past_count; ++k) {
        const Past<T>& past = t.past[k];
        Tile h;
        each([&](int i, int o) { h[i] = from(past.data, o); });
        if (past.on_out != 0.f) each([&](int i, int) { next[i] += past.on_out * h[i]; });
        if (past.on_kept != 0.f) each([&](int i, int) { kept[i] += past.on_kept * h[i]; });
        if (t.statistics == Statistics::dots) found.sums[1 + past.slot] += product_sum(m, h);
    }
    if (t.makes_noise || t.noise) {
        each([&](int i, int o) {
            vf noise = t.noise ? from(t.noise, o) : load(z + o);
            if (t.variance) {
                const vf v = from(t.variance, o);
                noise *= vexp(c[kLogSmall] + (0.5f * v + 0.5f) * (c[kLogLarge] - c[kLogSmall]));
            }
            next[i] += c[kNoise] * noise;
        });
    }
    found.bad |= not_finite(next) | not_finite(m);

    if (t.statistics == Statistics::moments) {
        found.sums[0] += total(next);
        found.sums[1] += product_sum(next, next);
    } else if (t.statistics == Statistics::dots) {
        found.sums[0] += product_sum(m, m);
    }
    if (t.keeps) {
        if (c[kKeptSample] != 0.f) each([&](int i, int) { kept[i] += c[kKeptSample] * x[i]; });
        if (c[kKeptBase] != 0.f && t.base) each([&](int i, int o) { kept[i] += c[kKeptBase] * from(t.base, o); });
        if (c[kKeptM] != 0.f) each([&](int i, int) { kept[i] += c[kKeptM] * m[i]; });
        if (c[kKeptOut] != 0.f) each([&](int i, int) { kept[i] += c[kKeptOut] * next[i]; });
        write(t.kept + at, kept, t.past_caches && t.kept != t.base);
    }
    if (t.slot) write(t.slot + at, m, t.past_caches);
    write(t.out + at, next, t.past_caches && t.copies > 0 && t.out != t.sample);
    if (t.copies > 0) {
        each([&](int i, int) { next[i] *= c[kInputScale]; });
        for (int k = 0; k < t.copies; ++k) switch (t.input_dtype) {
                case DType::float32:
                    write(static_cast<float*>(t.input[k]) + at, next, false);
                    break;
                case DType::bfloat16:
                    write(static_cast<bf16*>(t.input[k]) + at, next, false);
                    break;
                case DType::float16:
                    write(static_cast<fp16*>(t.input[k]) + at, next, false);
                    break;
            }
    }
}

PDN_INLINE bool any_column(const float* row, int first, int count) {
    for (int i = first; i < first + count; ++i)
        if (row[i] != 0.f) return true;
    return false;
}

template <class T, class O>
PDN_INLINE Task<T, O> task_of(const Params& p, int64_t b, int64_t row, int64_t first) {
    Task<T, O> t{};
    const float* c = t.row = p.table + row * kRowWidth;
    const int64_t at = b * p.size + first;
    const auto state = [&](const void* data) { return data ? static_cast<const T*>(data) + at : nullptr; };
    const auto written = [&](void* data) { return data ? static_cast<T*>(data) + at : nullptr; };
    t.converts = c[kMX0] != 0.f || p.preview;
    t.keeps = p.kept && any_column(c, kKeptSample, kRowWidth - kKeptSample);
    if (c[kSample] != 0.f || c[kMSample] != 0.f || (t.converts && c[kX0Sample] != 0.f) || c[kKeptSample] != 0.f)
        t.sample = state(p.sample);
    if (p.output && (c[kOutput] != 0.f || c[kMOutput] != 0.f || (t.converts && c[kX0Output] != 0.f))) {
        t.output = static_cast<const O*>(p.output) + b * p.output_stride + first;
        if (p.unconditional)
            t.unconditional = static_cast<const O*>(p.unconditional) + b * p.unconditional_stride + first;
    }
    t.base = state(p.base);
    if (c[kNoise] != 0.f) {
        t.noise = state(p.noise);
        t.makes_noise = !p.noise && p.keys;
        if (p.learned_variance && p.output)
            t.variance = static_cast<const O*>(p.output) + b * p.output_stride + p.size + first;
    }
    for (int j = 0; j < p.slots; ++j) {
        const float on_kept = t.keeps ? c[kKeptHistory + j] : 0.f;
        if (c[kHistory + j] == 0.f && on_kept == 0.f && p.statistics != Statistics::dots) continue;
        t.past[t.past_count++] = {state(p.history) + j * p.batch * p.size, c[kHistory + j], on_kept, j};
    }
    const int slot = static_cast<int>(c[kSlot]);
    if (slot >= 0 && slot < p.slots) t.slot = written(p.history) + slot * p.batch * p.size;
    t.out = written(p.out), t.kept = written(p.kept), t.preview = written(p.preview);
    const int64_t bytes = p.input_dtype == DType::float32 ? 4 : 2;
    for (int k = 0; p.model_input && k < p.copies; ++k)
        t.input[t.copies++] = static_cast<char*>(p.model_input) + (k * p.batch * p.size + at) * bytes;
    t.input_dtype = p.input_dtype, t.statistics = p.statistics, t.past_caches = p.past_caches;
    t.thresholds = p.threshold != nullptr;
    t.bound = p.threshold ? p.threshold[b] : c[kClip];
    return t;
}

// Whole tiles: elements [begin, end) of the chunk, `z` being the noise of `begin`.
template <class T, class O>
__attribute__((noinline)) void tiles(const Task<T, O>& t, int64_t begin, int64_t end, const float* z, Found& found) {
    Found mine = found;
    for (int64_t at = begin; at < end; at += kTile * kWidth) tile(t, at, z + (at - begin), mine);
    found = mine;
}

// The `lanes` elements from `at` on, fewer than a tile, `z` being the noise of `at`: worked on in copies. What they are
// filled up with is 0, and so is what comes of it.
template <class T, class O>
void rest(const Task<T, O>& t, int64_t at, int lanes, const float* z, Found& found) {
    constexpr int kElements = kTile * kWidth;
    alignas(64) T state[3 + kSlots][kElements], made[4][kElements];
    alignas(64) O model[3][kElements];
    alignas(64) float noise[kElements], input[kElements];
    const auto count = static_cast<size_t>(lanes);
    const auto copy_in = [&](auto*& from, auto* room, int64_t first) {
        if (from == nullptr) return;
        std::memset(static_cast<void*>(room), 0, kElements * sizeof *room);
        std::memcpy(room, from + first, count * sizeof *room);
        from = room;
    };
    Task<T, O> copy = t;
    copy_in(copy.sample, state[0], at), copy_in(copy.base, state[1], at), copy_in(copy.noise, state[2], at);
    copy_in(copy.output, model[0], at), copy_in(copy.unconditional, model[1], at), copy_in(copy.variance, model[2], at);
    for (int k = 0; k < t.past_count; ++k) copy_in(copy.past[k].data, state[3 + k], at);
    if (t.makes_noise) copy_in(z, noise, 0);
    copy.out = made[0], copy.kept = made[1], copy.past_caches = false;
    if (t.slot) copy.slot = made[2];
    if (t.preview) copy.preview = made[3];
    copy.copies = t.copies > 0, copy.input[0] = input;
    tiles(copy, 0, kElements, z, found);

    const auto copy_out = [&](T* to, const T* room) {
        if (to) std::memcpy(to + at, room, count * sizeof *to);
    };
    if (t.keeps) copy_out(t.kept, made[1]);
    copy_out(t.out, made[0]), copy_out(t.slot, made[2]), copy_out(t.preview, made[3]);
    const size_t bytes = t.input_dtype == DType::float32 ? 4 : 2;
    for (int k = 0; k < t.copies; ++k)
        std::memcpy(static_cast<char*>(t.input[k]) + static_cast<size_t>(at) * bytes, input, count * bytes);
}

template <class T, class O>
bool chunk_of(const Params& p, int64_t b, int64_t row, int64_t first, int64_t count, double* sums) {
    const Task<T, O> t = task_of<T, O>(p, b, row, first);
    Found found{};
    alignas(64) float z[kNoiseRun];
    NoiseRow noise{};
    if (t.makes_noise) noise = noise_row(p.keys[2 * b], p.keys[2 * b + 1], p.step);
    for (int64_t i = 0; i < count;) {
        int64_t end = count, before = 0;  // of the run of noise: its columns before i
        if (t.makes_noise) {
            before = (first + i) % kNoiseBlock;
            if (i + kNoiseRun - before < end) end = i + kNoiseRun - before;
            normal_blocks(first + i - before, (before + end - i + kNoiseBlock - 1) / kNoiseBlock, noise, z);
        }
        const int64_t whole = i + (end - i) / (kTile * kWidth) * (kTile * kWidth);
        tiles(t, i, whole, z + before, found);
        if (whole < end) rest(t, whole, static_cast<int>(end - whole), z + before + whole - i, found);
        i = end;
    }
    const int wanted = sum_count(p);
    for (int k = 0; k < wanted; ++k) {
        sums[k] = 0;
        for (int j = 0; j < kWidth; ++j) sums[k] += static_cast<double>(found.sums[k][j]);
    }
    int32_t bad = 0;
    for (int j = 0; j < kWidth; ++j) bad |= found.bad[j];
    if (t.past_caches) finish_past();
    return bad == 0;
}

template <class T>
bool chunk_from(const Params& p, int64_t b, int64_t row, int64_t first, int64_t count, double* sums) {
    switch (p.model) {
        case DType::bfloat16:
            return chunk_of<T, bf16>(p, b, row, first, count, sums);
        case DType::float16:
            return chunk_of<T, fp16>(p, b, row, first, count, sums);
        default:
            return chunk_of<T, float>(p, b, row, first, count, sums);
    }
}

bool chunk(const Params& p, int64_t b, int64_t row, int64_t first, int64_t count, double* sums) {
    switch (p.state) {
        case DType::bfloat16:
            return chunk_from<bf16>(p, b, row, first, count, sums);
        case DType::float16:
            return chunk_from<fp16>(p, b, row, first, count, sums);
        default:
            return chunk_from<float>(p, b, row, first, count, sums);
    }
}

}  // namespace
}  // namespace sampler_step
}  // namespace pdn
