// Block-sparse attention on CUDA: the launches of the forward pass.
#include "../core/cuda_launch.cuh"
#include "cuda.h"
#include "cuda_forward.cuh"

namespace pdn {
namespace block_sparse_attention {
namespace cuda {

int64_t workspace_bytes(const ForwardProblem& p) { return p.int8_scores ? Codes(p).bytes : 0; }

const char* forward(const ForwardProblem& p, void* stream) { return launch_forward(p, Launcher(stream)); }

}  // namespace cuda
}  // namespace block_sparse_attention
}  // namespace pdn
