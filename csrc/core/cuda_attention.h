// Arguments that the attention kernels on CUDA share. No torch and no CUDA header.
#pragma once

#include <cstdint>

#include "cuda_elements.h"

namespace pdn {
namespace cuda {

// A tensor [B, H, L, D] whose last dim is adjacent; strides in elements. Rows start at multiples of 16 bytes.
struct Tokens {
    const void* data;
    int64_t batch_stride, head_stride, row_stride;
};

// For each block of rows, the ascending numbers of the blocks that it reads: counts [B, H, rows], indices
// [B, H, rows, longest] of int32 (`wide`) or int16. Strides in rows; 0 where batches or heads share their lists.
struct BlockLists {
    const int32_t* counts;
    const void* indices;
    bool wide;
    int64_t longest, batch_stride, head_stride;
};

}  // namespace cuda
}  // namespace pdn
