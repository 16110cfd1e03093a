// Block-sparse attention on CUDA: the launches of the gradients.
#include "../core/cuda_launch.cuh"
#include "cuda_backward.cuh"

namespace pdn {
namespace block_sparse_attention {
namespace cuda {

const char* backward(const BackwardProblem& p, void* stream) { return launch_backward(p, Launcher(stream)); }

}  // namespace cuda
}  // namespace block_sparse_attention
}  // namespace pdn
