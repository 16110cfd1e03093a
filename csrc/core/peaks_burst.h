// Register-only bursts of arithmetic, one set per ISA level (compiled from peaks_isa.cpp).
#pragma once

#include <cstdint>

namespace pdn {

struct Bursts {
    double (*fma_f32)(int64_t rounds);   // -> operations done
    double (*bf16_dot)(int64_t rounds);  // null where there is none
    double (*vnni_dot)(int64_t rounds);  // sums of four u8 x s8 products; null where there is none
};

}  // namespace pdn
