#include "dispatch.h"

#include "../core/levels.h"
#include "../core/two_passes.h"

namespace pdn {
namespace norm_quantize {

PDN_FLOAT_LEVELS(KernelSet, kernels, kSets)

namespace {

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
    const int64_t grain = p.batch * p.pixels * p.channels <= kSerialElements ? 2 * items : 1;
    return two_passes(
        p.batch, chunks, grain,
        [&](int64_t image, int64_t i) { set.group_statistics(p, image, i, partials(image * chunks + i)); },
        [&](int64_t image) { set.group_fold(p, image, partials(image * chunks), image_coefficients(image)); },
        [&](int64_t image, int64_t i) {
            set.group_write(p, image, i, image_coefficients(image), memory.scratch(image * chunks + i));
        });
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
