// Block-sparse attention on CUDA: the launches of the forward pass. On sm_90a, if asked for, the wgmma kernel where it
// fits.
#include <cstdlib>

#include "../core/cuda_launch.cuh"
#include "cuda.h"
#include "cuda_wgmma.cuh"

namespace pdn {
namespace {

// PYDENOISE_ATTENTION_WGMMA=1 asks for it: no GPU has run this kernel yet, only the emulator of the tests.
bool device_has_wgmma() {
#if defined(PDN_SM90A)  // setup_cuda.py: sm_90a is among the architectures
    static const char* const asked = std::getenv("PYDENOISE_ATTENTION_WGMMA");
    if (!asked || asked[0] != '1') return false;
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return major == 9 && minor == 0;
#else
    return false;
#endif
}

}  // namespace

namespace block_sparse_attention {
namespace cuda {

int64_t workspace_bytes(const ForwardProblem& p) { return p.int8_scores ? Codes(p).bytes : 0; }

const char* forward(const ForwardProblem& p, void* stream) {
    return launch_forward(p, device_has_wgmma(), Launcher(stream));
}

}  // namespace cuda
}  // namespace block_sparse_attention
}  // namespace pdn
