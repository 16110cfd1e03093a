// What the bindings of the CUDA kernels share.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace pdn {
namespace bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

// torch's current stream. The symbol lives in libtorch_cuda, which a CPU-only torch lacks: it is looked up when the
// first tensor on a GPU comes in, by which time that library is loaded.
inline void* current_stream(int32_t device) {
    using Getter = int32_t (*)(int32_t, void**);
    static const Getter getter = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
        return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    STD_TORCH_CHECK(
        getter, "libtorch_cuda.so is not loaded, or does not tell the current stream: is this torch built for CUDA?");
    void* stream = nullptr;
    STD_TORCH_CHECK(getter(device, &stream) == 0, "torch did not tell the current CUDA stream");
    return stream;
}

inline const void* pointer(const MaybeTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

}  // namespace bindings
}  // namespace pdn
