// Attention of a block of queries of one head, with a softmax that streams over chunks of keys: no matrix of all
// scores. Included once per ISA level.
#pragma once

#include "chunk.inl"
#include "mask.inl"

namespace pdn {
namespace attention {
namespace {

// Scratch memory of one call; counted by the same code that hands it out.
struct Scratch {
    float *query, *scores, *top, *kept, *references, *totals, *checks, *sums, *keys, *values, *row;
    int32_t* starts;  // of int8 scores
    int64_t floats = 0;

    Scratch(const AttentionParams& p, void* memory) {
        const auto take = [&](int64_t count) {
            float* const begin = memory == nullptr ? nullptr : static_cast<float*>(memory) + floats;
            floats += round_up(count, 16);
            return begin;
        };
        const int64_t chunk = chunk_keys(p), queries = kQueryBlock, size = padded_size(p);
        const bool copies = p.dtype != DType::float32;
        query = take(queries * size);
        scores = take(chunk * kTile * kWidth);
        top = take(kTile * kWidth);
        kept = take(kTile * kWidth);
        references = take(queries);
        totals = take(queries);
        checks = take(queries);
        sums = take(queries * p.size);
        keys = take(copies && !p.int8 ? chunk * size : 0);
        values = take(copies ? chunk * size : 0);
        row = take(p.int8 ? kWidth * size : 0);
        starts = reinterpret_cast<int32_t*>(take(p.int8 ? queries : 0));
    }
};

int64_t scratch_bytes(const AttentionParams& p) { return Scratch(p, nullptr).floats * 4; }

template <class Body>
PDN_INLINE void with_vectors(int64_t vectors, const Body& body) {
    if (vectors == kTile) return body.template operator()<kTile>();
    if (vectors == 1) return body.template operator()<1>();
    if constexpr (kTile == 4) vectors == 2 ? body.template operator()<2>() : body.template operator()<3>();
}

// The queries at hand.
struct Queries {
    int64_t image, head, first, count;
};

// The scores of a tile of them and a chunk of keys, and the largest.
template <class KeyCells, int Vectors>
__attribute__((noinline)) void score_tile(const AttentionParams& p, const Queries& q, int64_t tile, const ScoreTask& t,
                                          const Chunk& c, float* scores) {
    constexpr int64_t kStep = Vectors * kWidth;
    for (int v = 0; v < Vectors; ++v) store(t.top + v * kWidth, splat(kNothing));
    float* at = scores;
    for (int64_t i = 0; i < c.key_parts; ++i) {
        each_group(c.key[i].count, [&]<int Rows>(int64_t first, int64_t groups) {
            if (t.value_lines > 0)
                score_groups<KeyCells, Rows, Vectors, true>(t, c.key[i], first, groups, at);
            else
                score_groups<KeyCells, Rows, Vectors, false>(t, c.key[i], first, groups, at);
        });
        at += c.key[i].count * kStep;
    }
    for (int v = 0; p.mask.data != nullptr && v < Vectors; ++v)
        store(t.top + v * kWidth, add_mask(p.mask, q.image, q.head, q.first + tile + v * kWidth,
                                           q.count - tile - v * kWidth, c.first, c.keys, scores + v * kWidth, kStep));
}

// The scores become weights, and the tile's sums take in the values.
template <class Cells, int Vectors>
__attribute__((noinline)) void mix_tile(const State& s, const Chunk& c, int64_t size, int64_t value_step, bool begun,
                                        const float* top, float* kept, float* scores) {
    const bool moved = move_references<Vectors>(s, top, kept);
    const Before before = !begun ? Before::none : moved ? Before::scaled : Before::kept;
    const int64_t mixed = least(kFirstRows, size);
    groups_of<kFirstRows>(mixed, 0, 1, [&]<int Rows>(int64_t, int64_t) {
        weigh_and_mix<Cells, Rows, Vectors>(s, c.value, c.value_parts, value_step, c.keys, scores, before, kept);
    });
    if (size == mixed) return;
    each_group(size - mixed, [&]<int Rows>(int64_t first, int64_t groups) {
        mix_groups<Cells, Rows, Vectors>(c.value, c.value_parts, mixed + first, groups, value_step, scores, before,
                                         kept, s.sums);
    });
}

State state_of(const AttentionParams& p, const Scratch& s, int64_t tile) {
    return {s.references + tile, s.totals + tile, s.checks + tile, s.sums + tile * p.size};
}

// Sums over totals of kWidth queries, 0 where no key counts, and the logarithms of the totals.
template <class T>
PDN_INLINE void write_rows(const AttentionParams& p, const Queries& q, int64_t at, const State& s, int64_t step,
                           bool begun, const float* shifts) {
    const int64_t live = least(kWidth, q.count - at);
    const vf check = load(s.checks), total = load(s.totals) + (check - check);
    const vf inverse = 1.f / select(total == 0.f, splat(1.f), total);
    T* out = static_cast<T*>(p.output) + q.image * p.output_batch_stride + q.head * p.output_head_stride +
             (q.first + at) * p.output_row_stride;
    for (int64_t d = 0; d < p.size; d += kWidth) {
        const int64_t n = least(kWidth, p.size - d);
        vf block[kWidth];
        for (int64_t i = 0; i < kWidth; ++i)
            block[i] = i < n && begun ? select(total == 0.f, vf{}, load(s.sums + (d + i) * step) * inverse) : vf{};
        transpose(block);
        for (int64_t i = 0; i < live; ++i) store_some(out + i * p.output_row_stride + d, block[i], n);
    }
    if (p.lse == nullptr) return;
    const vf sum = load(s.reference) * kLn2 + (log2_positive(total) * kLn2 + load_some(shifts, live));
    const vf lse = select(total == 0.f, splat(kNothing), select(total != total, total, sum));
    float* to = p.lse + (q.image * p.heads + q.head) * p.query.count + q.first + at;
    live == kWidth ? store(to, lse) : store_partial(to, lse, static_cast<int>(live));
}

// What int8 scores leave out, so that log-sum-exps mean the same: scale * dot(query, mean of the keys).
template <class T>
void mean_scores(const AttentionParams& p, const Rows<T>& rows, const Queries& q, const float* mean, float* scores) {
    for (int64_t i = 0; i < q.count; ++i) {
        vf sum{};
        for (int64_t d = 0; d < p.size; d += kWidth) sum += rows.elements(q.first + i, d) * load(mean + d);
        scores[i] = reduce_add(sum) * p.scale;
    }
}

template <class KeyCells, class ValueCells, class T>
void attend_as(const AttentionParams& p, const Queries& q, void* codes, void* memory) {
    constexpr bool kFromCodes = __is_same(KeyCells, Int8Cells);
    const int64_t kv_head = q.head / p.group, padded = round_up(q.count, kWidth);
    const Scratch s(p, memory);
    const Rows<T> rows(p.query, q.image, q.head, q.first + q.count, p.size);
    float factor = p.scale * kLog2E;
    const int64_t cells = (p.size + KeyCells::kPerCell - 1) / KeyCells::kPerCell;
    if constexpr (kFromCodes) {
        factor *= encode_queries(p, rows, q.first, q.first + q.count, s.row, s.query, s.starts);
    } else {
        pack_keys<KeyCells>(rows, cells, q.first, padded, s.query);
        if (KeyCells::kPerCell == 1)  // pairs would be rounded once more
            for (int64_t i = 0; i < padded * cells; i += kWidth) store(s.query + i, load(s.query + i) * factor);
    }
    const Source<KeyCells, ValueCells, T> source = {Rows<T>(p.key, q.image, kv_head, p.key.count, p.size),
                                                    Rows<T>(p.value, q.image, kv_head, p.key.count, p.size),
                                                    s.keys,
                                                    s.values,
                                                    kFromCodes ? KeyCodes(p, q.image, kv_head, codes) : KeyCodes(),
                                                    factor,
                                                    p.block_size,
                                                    cells};
    for (int64_t i = 0; i < padded; i += kWidth) {
        store(s.references + i, splat(kNothing));
        store(s.totals + i, vf{});
        store(s.checks + i, vf{});
    }
    Keys keys(p, q.image, q.head, q.first, kFromCodes);
    bool begun = false;
    const auto lines = [](int64_t bytes) { return (bytes + 63) / 64; };
    const int64_t value_lines = lines(p.size * int64_t{sizeof(T)});
    ScoreTask task = {source.key_step(),
                      kFromCodes ? lines(cells * 4) : value_lines,
                      source.values.stride * int64_t{sizeof(T)},
                      0,
                      nullptr,
                      cells,
                      nullptr,
                      s.top};
    for (Chunk chunk; source.next(keys, chunk_keys(p), chunk); begun = true)
        each_tile(padded, [&]<int Vectors>(int64_t tile) {
            task.value_lines = tile == 0 ? value_lines : 0;
            task.queries = s.query + tile * cells;
            task.starts = s.starts + tile;
            score_tile<KeyCells, Vectors>(p, q, tile, task, chunk, s.scores);
            if (tile == 0) source.find_values(chunk);
            mix_tile<ValueCells, Vectors>(state_of(p, s, tile), chunk, p.size, source.value_step(), begun, s.top,
                                          s.kept, s.scores);
        });
    float* const shifts = s.scores;
    for (int64_t i = 0; i < q.count; ++i) shifts[i] = 0.f;
    if constexpr (kFromCodes) mean_scores(p, rows, q, source.codes.mean, shifts);
    each_tile(padded, [&]<int Vectors>(int64_t tile) {
        for (int64_t v = 0; v < Vectors * kWidth && tile + v < q.count; v += kWidth) {
            State state = state_of(p, s, tile);
            state.reference += v, state.totals += v, state.checks += v, state.sums += v;
            write_rows<T>(p, q, tile + v, state, Vectors * kWidth, begun, shifts + tile + v);
        }
    });
}

void attend(const AttentionParams& p, int64_t image, int64_t head, int64_t first, int64_t last, const void* codes,
            void* scratch) {
    const Queries q = {image, head, first, last - first};
    void* const c = const_cast<void*>(codes);
    with_types(p.dtype, [&]<class Cells, class T>() {
        p.int8 ? attend_as<Int8Cells, Cells, T>(p, q, c, scratch) : attend_as<Cells, Cells, T>(p, q, c, scratch);
    });
}

}  // namespace
}  // namespace attention
}  // namespace pdn
