#include "dispatch.h"

#include "../core/threads.h"

namespace pdn {
namespace norm_quantize {

extern const KernelSet kernels_baseline;
#if defined(__x86_64__)
extern const KernelSet kernels_avx2;
extern const KernelSet kernels_avx512;
extern const KernelSet kernels_avx512bf16;
#endif

namespace {

const KernelSet* const kSets[kIsaCount] = {
    &kernels_baseline,
#if defined(__x86_64__)
    &kernels_avx2,
    &kernels_avx2,  // avx2vnni: no dot products here
    &kernels_avx512,
    &kernels_avx512,  // avx512vnni
    &kernels_avx512bf16,
#endif
};

constexpr int64_t kSerialElements = 24576;  // below, waking another thread costs more than it saves

// Floats for everything a call shares, then `per_range` bytes for each of `ranges` loop bodies.
struct Memory {
    char* data;
    int64_t shared, per_range;

    Memory(int64_t floats, int64_t ranges, int64_t per_range_bytes)
        : shared((floats * 4 + 63) / 64 * 64), per_range((per_range_bytes + 63) / 64 * 64) {
        data = static_cast<char*>(thread_scratch(shared + ranges * per_range));
    }
    float* floats(int64_t offset) const { return reinterpret_cast<float*>(data) + offset; }
    void* scratch(int64_t range) const { return data + shared + range * per_range; }
};

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

bool run(Isa isa, const GroupNormParams& p) {
    const KernelSet& set = kernel_set(isa);
    const int64_t chunk = set.group_chunk(p), chunks = (p.pixels + chunk - 1) / chunk, items = p.batch * chunks;
    const int64_t partial = set.group_partial(p), coefficients = set.group_coefficients(p);
    const Memory memory(items * partial + p.batch * coefficients, items, set.group_scratch(p));
    if (memory.data == nullptr) return false;
    const auto partials = [&](int64_t item) { return memory.floats(item * partial); };
    const auto image_coefficients = [&](int64_t image) {
        return memory.floats(items * partial + image * coefficients);
    };
    const int64_t grain = p.batch * p.pixels * p.channels <= kSerialElements ? items : 1;
    parallel_ranges(items, grain, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item)
            set.group_statistics(p, item / chunks, item % chunks, partials(item));
    });
    parallel_ranges(p.batch, grain, [&](int64_t begin, int64_t end) {
        for (int64_t image = begin; image < end; ++image)
            set.group_fold(p, image, partials(image * chunks), image_coefficients(image));
    });
    parallel_ranges(items, grain, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item)
            set.group_write(p, item / chunks, item % chunks, image_coefficients(item / chunks), memory.scratch(item));
    });
    return true;
}

bool run(Isa isa, const LayerNormParams& p) {
    const KernelSet& set = kernel_set(isa);
    const int64_t films = p.film ? p.rows / p.film_rows : 1;
    const int64_t coefficients = set.layer_coefficients(p);
    const int64_t ranges_rows = kSerialElements / p.channels > 0 ? kSerialElements / p.channels : 1;
    const int64_t items = (p.rows + ranges_rows - 1) / ranges_rows;
    const Memory memory(films * coefficients, items, set.layer_scratch(p));
    if (memory.data == nullptr) return false;
    for (int64_t film = 0; film < films; ++film) set.layer_fold(p, film, memory.floats(film * coefficients));
    parallel_ranges(items, 1, [&](int64_t begin, int64_t end) {
        const int64_t last = end * ranges_rows < p.rows ? end * ranges_rows : p.rows;
        set.layer_rows(p, begin * ranges_rows, last, memory.floats(0), memory.scratch(begin));
    });
    return true;
}

}  // namespace norm_quantize
}  // namespace pdn
