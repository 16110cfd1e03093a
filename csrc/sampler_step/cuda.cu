// One step of a sampler on CUDA: the launches.
#include "../core/cuda_launch.cuh"
#include "cuda.h"
#include "cuda_kernels.cuh"

namespace pdn {
namespace sampler_step {
namespace cuda {

const char* run(const Problem& p, void* stream) { return launch_step(p, Launcher(stream)); }

}  // namespace cuda
}  // namespace sampler_step
}  // namespace pdn
