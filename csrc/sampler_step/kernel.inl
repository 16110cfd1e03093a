// One pass over what a step reads: guidance, conversion, history, the linear update, noise. A tile of vectors is read
// before `out`, `kept` and the slot of the history are written, so these may be what was read.
// Included once per ISA level.
#pragma once

#include "../core/fp16.h"
#include "../core/normal.inl"
#include "params.h"

namespace pdn {
namespace sampler_step {
namespace {

constexpr int kTile = 4;  // vectors
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

template <bool Partial, class E>
PDN_INLINE vf read(const E* p, int lanes) {
    if constexpr (Partial) return load_partial(p, lanes);
    return load(p);
}

PDN_INLINE bool streams_to(const void* p) { return reinterpret_cast<uintptr_t>(p) % (kWidth * sizeof(float)) == 0; }

// Without reading the line first that is written, nor keeping it.
PDN_INLINE void store_past(float* p, vf v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
    _mm_stream_ps(p, (__m128)v);
#else
    store(p, v);
#endif
}

template <int Vectors, bool Partial, class E>
PDN_INLINE void write(E* p, const vf (&v)[Vectors], int lanes, [[maybe_unused]] bool past_caches) {
    if constexpr (Partial) {
        store_partial(p, v[0], lanes);
        return;
    }
    if constexpr (sizeof(E) == sizeof(float)) {
        if (past_caches && streams_to(p)) {
            for (int i = 0; i < Vectors; ++i) store_past(p + i * kWidth, v[i]);
            return;
        }
    }
    for (int i = 0; i < Vectors; ++i) store(p + i * kWidth, v[i]);
}

PDN_INLINE vf clamped(vf x, float bound) {  // keeps NaN
    x = select(x > bound, splat(bound), x);
    return select(x < -bound, splat(-bound), x);
}

template <int Vectors>
PDN_INLINE vf total(const vf (&v)[Vectors]) {
    if constexpr (Vectors == 4) return (v[0] + v[1]) + (v[2] + v[3]);
    if constexpr (Vectors == 2) return v[0] + v[1];
    return v[0];
}

template <int Vectors>
PDN_INLINE vf product_sum(const vf (&a)[Vectors], const vf (&b)[Vectors]) {
    vf sum = a[0] * b[0];
    for (int i = 1; i < Vectors; ++i) sum += a[i] * b[i];
    return sum;
}

// NaN where one of them is not finite, else 0.
template <int Vectors>
PDN_INLINE vi not_finite(const vf (&v)[Vectors]) {
    vf sum{};
    for (int i = 0; i < Vectors; ++i) sum += v[i] * 0.f;
    return (vi)sum;
}

// Elements [at, at + Vectors * kWidth) of the chunk; Partial: the first `lanes` of one vector. `z` is generated noise.
template <int Vectors, bool Partial, class T, class O>
PDN_INLINE void tile(const Task<T, O>& t, int64_t at, [[maybe_unused]] int lanes, const float* z, Found& found) {
    const float* c = t.row;
    vf x[Vectors], y[Vectors], m[Vectors], next[Vectors], kept[Vectors];
    const auto each = [](const auto& body) {
#pragma GCC unroll 4
        for (int i = 0; i < Vectors; ++i) body(i, i * kWidth);
    };
    const auto cut = [&](vf& v) {
        if constexpr (Partial)
            for (int j = 0; j < kWidth; ++j) v[j] = j < lanes ? v[j] : 0.f;
    };
    const auto from = [&](const auto* p, int offset) { return read<Partial>(p + at + offset, lanes); };

    each([&](int i, int) { x[i] = y[i] = m[i] = next[i] = kept[i] = vf{}; });
    if (t.sample) each([&](int i, int o) { x[i] = from(t.sample, o); });
    if (t.output) each([&](int i, int o) { y[i] = from(t.output, o); });
    if (t.unconditional)
        each([&](int i, int o) {
            const vf u = from(t.unconditional, o);
            y[i] = u + c[kGuidance] * (y[i] - u);
        });

    if (t.converts) {
        vf clean[Vectors];
        each([&](int i, int) { clean[i] = vf{}; });
        if (c[kX0Sample] != 0.f) each([&](int i, int) { clean[i] = c[kX0Sample] * x[i]; });
        if (c[kX0Output] != 0.f) each([&](int i, int) { clean[i] += c[kX0Output] * y[i]; });
        if (t.bound < __builtin_inff()) each([&](int i, int) { clean[i] = clamped(clean[i], t.bound); });
        if (t.thresholds) each([&](int i, int) { clean[i] /= t.bound; });
        if (c[kMX0] != 0.f) each([&](int i, int) { m[i] = c[kMX0] * clean[i]; });
        if (t.preview) write<Vectors, Partial>(t.preview + at, clean, lanes, t.past_caches);
    }
    if (c[kMSample] != 0.f) each([&](int i, int) { m[i] += c[kMSample] * x[i]; });
    if (c[kMOutput] != 0.f) each([&](int i, int) { m[i] += c[kMOutput] * y[i]; });
    each([&](int i, int) { cut(m[i]); });

    if (c[kSample] != 0.f) each([&](int i, int) { next[i] = c[kSample] * x[i]; });
    if (c[kBase] != 0.f && t.base) each([&](int i, int o) { next[i] += c[kBase] * from(t.base, o); });
    if (c[kOutput] != 0.f) each([&](int i, int) { next[i] += c[kOutput] * y[i]; });
    if (c[kM] != 0.f) each([&](int i, int) { next[i] += c[kM] * m[i]; });
    for (int k = 0; k < t.past_count; ++k) {
        const Past<T>& past = t.past[k];
        vf h[Vectors];
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
    each([&](int i, int) { cut(next[i]); });
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
        write<Vectors, Partial>(t.kept + at, kept, lanes, t.past_caches && t.kept != t.base);
    }
    if (t.slot) write<Vectors, Partial>(t.slot + at, m, lanes, t.past_caches);
    write<Vectors, Partial>(t.out + at, next, lanes, t.past_caches && t.copies > 0 && t.out != t.sample);
    if (t.copies > 0) {
        each([&](int i, int) { next[i] *= c[kInputScale]; });
        for (int k = 0; k < t.copies; ++k) switch (t.input_dtype) {
                case DType::float32:
                    write<Vectors, Partial>(static_cast<float*>(t.input[k]) + at, next, lanes, false);
                    break;
                case DType::bfloat16:
                    write<Vectors, Partial>(static_cast<bf16*>(t.input[k]) + at, next, lanes, false);
                    break;
                case DType::float16:
                    write<Vectors, Partial>(static_cast<fp16*>(t.input[k]) + at, next, lanes, false);
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

template <class T, class O>
bool chunk_of(const Params& p, int64_t b, int64_t row, int64_t first, int64_t count, double* sums) {
    const Task<T, O> t = task_of<T, O>(p, b, row, first);
    Found found{};
    alignas(64) float z[kNoiseBlock];
    NoiseRow noise{};
    if (t.makes_noise) noise = noise_row(p.keys[2 * b], p.keys[2 * b + 1], p.step);
    for (int64_t i = 0; i < count;) {
        int64_t end = count, before = 0;  // of the block of noise: its columns before i
        if (t.makes_noise) {
            before = (first + i) % kNoiseBlock;
            if (i + kNoiseBlock - before < end) end = i + kNoiseBlock - before;
            normal_block(first + i - before, noise, z);
        }
        const float* here = z + before - i;
        for (; i + kTile * kWidth <= end; i += kTile * kWidth) tile<kTile, false>(t, i, 0, here + i, found);
        for (; i < end; i += kWidth) {
            const int lanes = end - i < kWidth ? static_cast<int>(end - i) : kWidth;
            alignas(64) float rest[kWidth];
            if (t.makes_noise) std::memcpy(rest, here + i, static_cast<size_t>(lanes) * sizeof(float));
            for (int j = t.makes_noise ? lanes : 0; j < kWidth; ++j) rest[j] = 0.f;
            tile<1, true>(t, i, lanes, rest, found);
        }
        if (i > end) i = end;
    }
    const int wanted = sum_count(p);
    for (int k = 0; k < wanted; ++k) {
        sums[k] = 0;
        for (int j = 0; j < kWidth; ++j) sums[k] += static_cast<double>(found.sums[k][j]);
    }
    int32_t bad = 0;
    for (int j = 0; j < kWidth; ++j) bad |= found.bad[j];
#if defined(__SSE2__)
    if (t.past_caches) _mm_sfence();
#endif
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
