// What every kernel of attention takes: plain structs. Strides count elements.
#pragma once

#include <cstdint>

namespace pdn {
namespace attention {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// [batch, heads, count, size] in memory of any strides, but the elements of a head's token are adjacent.
struct Tokens {
    const void* data;
    int64_t count, batch_stride, head_stride, row_stride;
};

}  // namespace attention
}  // namespace pdn
