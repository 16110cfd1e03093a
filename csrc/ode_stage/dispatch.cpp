#include "dispatch.h"

#include "../core/levels.h"
#include "../core/two_passes.h"

namespace pdn {
namespace ode_stage {

PDN_FLOAT_LEVELS(KernelSet, kernels, kSets)

namespace {

constexpr int64_t kSerialElements = 24576;  // below, waking another thread costs more than it saves

// How a call is split, and its sums.
struct Plan {
    int64_t chunks, items, grain, partial, coefficients;
    float* memory = nullptr;

    Plan(const KernelSet& set, int64_t batch, int64_t pixels, int64_t channels) {
        const int64_t chunk = set.chunk(pixels, channels);
        chunks = (pixels + chunk - 1) / chunk;
        items = batch * chunks;
        grain = batch * pixels * channels <= kSerialElements ? 2 * items : 1;
        partial = set.partial(channels);
        coefficients = set.coefficients(channels);
    }
    bool take_memory(int64_t batch) {
        const int64_t floats = items * partial + batch * coefficients;
        memory = static_cast<float*>(thread_scratch(floats * static_cast<int64_t>(sizeof(float))));
        return memory != nullptr;
    }
    float* partials(int64_t image, int64_t chunk = 0) const { return memory + (image * chunks + chunk) * partial; }
    float* coefficients_of(int64_t image) const { return memory + items * partial + image * coefficients; }
};

}  // namespace

const KernelSet& kernel_set(Isa isa) { return *kSets[static_cast<int>(isa)]; }

bool run(Isa isa, const StageParams& p) {
    const KernelSet& set = kernel_set(isa);
    Plan plan(set, p.batch, p.pixels, p.channels);
    if (p.output == nullptr) {
        parallel_ranges(plan.items, plan.grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) set.combine(p, i / plan.chunks, i % plan.chunks, nullptr);
        });
        return true;
    }
    if (!plan.take_memory(p.batch)) return false;
    return two_passes(
        p.batch, plan.chunks, plan.grain,
        [&](int64_t image, int64_t i) { set.combine(p, image, i, plan.partials(image, i)); },
        [&](int64_t image) { set.fold(p, image, plan.partials(image), plan.coefficients_of(image)); },
        [&](int64_t image, int64_t i) { set.normalise(p, image, i, plan.coefficients_of(image)); });
}

bool run(Isa isa, const GradParams& p) {
    const KernelSet& set = kernel_set(isa);
    Plan plan(set, p.batch, p.pixels, p.channels);
    if (!plan.take_memory(p.batch)) return false;
    return two_passes(
        p.batch, plan.chunks, plan.grain,
        [&](int64_t image, int64_t i) { set.grad_sums(p, image, i, plan.partials(image, i)); },
        [&](int64_t image) { set.grad_fold(p, image, plan.partials(image), plan.coefficients_of(image)); },
        [&](int64_t image, int64_t i) { set.grad_write(p, image, i, plan.coefficients_of(image)); });
}

}  // namespace ode_stage
}  // namespace pdn
