// Launches of kernels that take one struct of arguments.
#pragma once

#include <cstdint>

namespace pdn {
namespace {

// Launches on a stream; returns null, or why it failed. The call does not wait.
struct Launcher {
    cudaStream_t stream;

    explicit Launcher(void* s) : stream(static_cast<cudaStream_t>(s)) {}

    template <typename P>
    const char* operator()(void (*kernel)(P), int64_t x, int64_t y, int threads, int shared_bytes, const P& p) const {
        if (x == 0 || y == 0) return nullptr;
        if (x > 0x7fffffff || y > 0xffff) return "more than 2^31 thread blocks are needed";
        if (shared_bytes > 48 << 10) {
            const auto wide = cudaFuncAttributeMaxDynamicSharedMemorySize;
            const cudaError_t error = cudaFuncSetAttribute(kernel, wide, shared_bytes);
            if (error != cudaSuccess) return cudaGetErrorString(error);
        }
        const dim3 blocks(static_cast<unsigned>(x), static_cast<unsigned>(y));
        kernel<<<blocks, threads, shared_bytes, stream>>>(p);
        const cudaError_t error = cudaGetLastError();
        return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
    }
};

}  // namespace
}  // namespace pdn
