// The tables of kernels by ISA level, in the order of `Isa`: a level that an op has no body for points at the next
// lower one. Each macro stands in the op's own namespace, declares what the objects of the levels export, and defines
// `const Type* const table[kIsaCount]`.
#pragma once

#include "isa.h"

#if defined(__x86_64__)

// For setup.py's FLOAT_LEVELS: nothing more for floats at avx2vnni and avx512vnni.
#define PDN_FLOAT_LEVELS(Type, name, table)                                                      \
    extern const Type name##_baseline, name##_avx2, name##_avx512, name##_avx512bf16;            \
    static const Type* const table[kIsaCount] = {&name##_baseline, &name##_avx2,   &name##_avx2, \
                                                 &name##_avx512,   &name##_avx512, &name##_avx512bf16};

// For INT8_LEVELS: nothing more for integers at avx512bf16.
#define PDN_INT8_LEVELS(Type, name, table)                                                               \
    extern const Type name##_baseline, name##_avx2, name##_avx2vnni, name##_avx512, name##_avx512vnni;   \
    static const Type* const table[kIsaCount] = {&name##_baseline, &name##_avx2,       &name##_avx2vnni, \
                                                 &name##_avx512,   &name##_avx512vnni, &name##_avx512vnni};

// A body for every level.
#define PDN_ALL_LEVELS(Type, name, table)                                                                \
    extern const Type name##_baseline, name##_avx2, name##_avx2vnni, name##_avx512, name##_avx512vnni,   \
        name##_avx512bf16;                                                                               \
    static const Type* const table[kIsaCount] = {&name##_baseline, &name##_avx2,       &name##_avx2vnni, \
                                                 &name##_avx512,   &name##_avx512vnni, &name##_avx512bf16};

#else

#define PDN_BASELINE_ONLY(Type, name, table) \
    extern const Type name##_baseline;       \
    static const Type* const table[kIsaCount] = {&name##_baseline};
#define PDN_FLOAT_LEVELS PDN_BASELINE_ONLY
#define PDN_INT8_LEVELS PDN_BASELINE_ONLY
#define PDN_ALL_LEVELS PDN_BASELINE_ONLY

#endif
