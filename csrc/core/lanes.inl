// Lanes across vectors: transposed blocks, and sums over the lanes of many vectors at once. Included once per ISA
// level.
#pragma once

#include "vec.h"

namespace pdn {
namespace {

// r[i] lane j becomes r[j] lane i. Each round is a perfect shuffle of the two halves; log2(kWidth) of them transpose.
PDN_INLINE void transpose(vf (&r)[kWidth]) {
    vi low, high;
#pragma GCC unroll 16
    for (int l = 0; l < kWidth; ++l) {
        low[l] = l / 2 + (l % 2 ? kWidth : 0);
        high[l] = low[l] + kWidth / 2;
    }
#pragma GCC unroll 4
    for (int round = 1; round < kWidth; round *= 2) {
        vf next[kWidth];
#pragma GCC unroll 8
        for (int i = 0; i < kWidth / 2; ++i) {
            next[2 * i] = __builtin_shuffle(r[i], r[i + kWidth / 2], low);
            next[2 * i + 1] = __builtin_shuffle(r[i], r[i + kWidth / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) r[i] = next[i];
    }
}

// Lane l of the result is a[l] + a[l + Distance] where bit Distance of l is clear, b[l - Distance] + b[l] where it is
// set.
template <int Distance>
PDN_INLINE vf fold_lanes(vf a, vf b) {
    vi low, high;
#pragma GCC unroll 16
    for (int l = 0; l < kWidth; ++l) {
        low[l] = l & Distance ? kWidth + l - Distance : l;
        high[l] = l & Distance ? kWidth + l : l + Distance;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// Lane l of the result is the sum over the lanes of v[l]; Count <= kWidth vectors, the others count as zero.
template <int Count, int Distance = kWidth / 2>
PDN_INLINE vf sums_of_lanes(const vf* v) {
    if constexpr (Count <= 0) {
        return vf{};
    } else if constexpr (Distance == 0) {
        return v[0];
    } else {
        constexpr int kFirst = Count < Distance ? Count : Distance;
        return fold_lanes<Distance>(sums_of_lanes<kFirst, Distance / 2>(v),
                                    sums_of_lanes<Count - kFirst, Distance / 2>(v + kFirst));
    }
}

}  // namespace
}  // namespace pdn
