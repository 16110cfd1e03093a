// Importance of blocks on CUDA: the launches.
#include "../core/cuda_launch.cuh"
#include "cuda.h"
#include "cuda_kernels.cuh"

namespace pdn {
namespace block_importance {
namespace cuda {

int64_t workspace_floats(const Problem& p) { return RowSums(p).floats; }

const char* run(const Problem& p, void* stream) { return launch_importance(p, Launcher(stream)); }

}  // namespace cuda
}  // namespace block_importance
}  // namespace pdn
