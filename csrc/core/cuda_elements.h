// Element types of tensors that CUDA kernels choose at run time. No torch and no CUDA header.
#pragma once

#include <cstdint>

namespace pdn {
namespace cuda {

enum class Element : int { float32 = 0, bfloat16 = 1, float16 = 2, int8 = 3, int32 = 4 };

constexpr int64_t bytes_of(Element element) {
    return element == Element::float32 || element == Element::int32 ? 4 : element == Element::int8 ? 1 : 2;
}

}  // namespace cuda
}  // namespace pdn
