// Products of matrices by a warpgroup of sm_90a (wgmma), whose operands the tensor cores read from shared memory.
//
// tests/native/cuda_emulator.h stands in for this file where kernels run on the host, lane by lane.
#pragma once

#include "cuda_mma.cuh"

namespace pdn {
namespace {

// Where 16-byte chunk `chunk` of row `row` lies in an operand with rows of 128 bytes: address bits 4 to 6 are combined
// with bits 7 to 9, as the tensor cores do for operands that start at multiples of 1024 bytes.
PDN_HD int swizzled128(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// Descriptor of an operand at shared address `address`, with a 128-byte swizzle. Where the depth runs along its rows of
// 128 bytes: groups of eight rows are 1024 bytes apart, a step of 32 bytes of depth adds 32 to the address, and `panel`
// has no meaning. Where the depth runs down its rows (16-bit elements): panels of 64 columns are `panel` bytes apart,
// and groups of eight depths 1024.
PDN_HD uint64_t operand_descriptor(uint32_t address, uint32_t panel = 16) {
    return static_cast<uint64_t>(address >> 4 & 0x3fffu) | static_cast<uint64_t>(panel >> 4 & 0x3fffu) << 16 |
           uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#if !defined(PDN_EMULATED_CUDA)

PDN_DEVICE void fence_products() {  // registers before this are seen by the products after it
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
PDN_DEVICE void commit_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int N = 0>
PDN_DEVICE void wait_products() {  // until at most N groups are under way
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}
PDN_DEVICE void fence_copies() {  // this thread's copies are seen by the tensor cores
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Registers of each thread of this warpgroup, from here on.
template <int N>
PDN_DEVICE void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N>
PDN_DEVICE void give_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

// Barriers 1 to 15 among `threads` threads, counting those that wait and those that only arrive.
PDN_DEVICE void barrier_wait(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
PDN_DEVICE void barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Uses of `d` stay behind this: it was written by products that the compiler knows nothing of.
template <int N>
PDN_DEVICE void settle(float (&d)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; ++j) asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}
template <int N>
PDN_DEVICE void settle(int (&d)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; ++j) asm volatile("" : "+r"(d[j][0]), "+r"(d[j][1]), "+r"(d[j][2]), "+r"(d[j][3])::"memory");
}

// d[j][2 h + e] holds row lane / 4 + 8 h of the warp's 16, column 8 j + 2 (lane % 4) + e.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PDN_REGISTERS_32                                                     \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PDN_SUMS_32(c)                                                                                              \
    "+" c(d[0][0]), "+" c(d[0][1]), "+" c(d[0][2]), "+" c(d[0][3]), "+" c(d[1][0]), "+" c(d[1][1]), "+" c(d[1][2]), \
        "+" c(d[1][3]), "+" c(d[2][0]), "+" c(d[2][1]), "+" c(d[2][2]), "+" c(d[2][3]), "+" c(d[3][0]),             \
        "+" c(d[3][1]), "+" c(d[3][2]), "+" c(d[3][3]), "+" c(d[4][0]), "+" c(d[4][1]), "+" c(d[4][2]),             \
        "+" c(d[4][3]), "+" c(d[5][0]), "+" c(d[5][1]), "+" c(d[5][2]), "+" c(d[5][3]), "+" c(d[6][0]),             \
        "+" c(d[6][1]), "+" c(d[6][2]), "+" c(d[6][3]), "+" c(d[7][0]), "+" c(d[7][1]), "+" c(d[7][2]), "+" c(d[7][3])
#define PDN_REGISTERS_64                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PDN_SUMS_64(c)                                                                                              \
    "+" c(d[0][0]), "+" c(d[0][1]), "+" c(d[0][2]), "+" c(d[0][3]), "+" c(d[1][0]), "+" c(d[1][1]), "+" c(d[1][2]), \
        "+" c(d[1][3]), "+" c(d[2][0]), "+" c(d[2][1]), "+" c(d[2][2]), "+" c(d[2][3]), "+" c(d[3][0]),             \
        "+" c(d[3][1]), "+" c(d[3][2]), "+" c(d[3][3]), "+" c(d[4][0]), "+" c(d[4][1]), "+" c(d[4][2]),             \
        "+" c(d[4][3]), "+" c(d[5][0]), "+" c(d[5][1]), "+" c(d[5][2]), "+" c(d[5][3]), "+" c(d[6][0]),             \
        "+" c(d[6][1]), "+" c(d[6][2]), "+" c(d[6][3]), "+" c(d[7][0]), "+" c(d[7][1]), "+" c(d[7][2]),             \
        "+" c(d[7][3]), "+" c(d[8][0]), "+" c(d[8][1]), "+" c(d[8][2]), "+" c(d[8][3]), "+" c(d[9][0]),             \
        "+" c(d[9][1]), "+" c(d[9][2]), "+" c(d[9][3]), "+" c(d[10][0]), "+" c(d[10][1]), "+" c(d[10][2]),          \
        "+" c(d[10][3]), "+" c(d[11][0]), "+" c(d[11][1]), "+" c(d[11][2]), "+" c(d[11][3]), "+" c(d[12][0]),       \
        "+" c(d[12][1]), "+" c(d[12][2]), "+" c(d[12][3]), "+" c(d[13][0]), "+" c(d[13][1]), "+" c(d[13][2]),       \
        "+" c(d[13][3]), "+" c(d[14][0]), "+" c(d[14][1]), "+" c(d[14][2]), "+" c(d[14][3]), "+" c(d[15][0]),       \
        "+" c(d[15][1]), "+" c(d[15][2]), "+" c(d[15][3])
#define PDN_PRODUCT_SS(SHAPE, TYPES, COUNT, KIND, A, B, P, FLAGS)                                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P ", 0;\nwgmma.mma_async.sync.aligned." SHAPE "." TYPES \
                 " {" PDN_REGISTERS_##COUNT "}, %" A ", %" B ", p" FLAGS ";\n}\n"                             \
                 : PDN_SUMS_##COUNT(KIND)                                                                     \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define PDN_PRODUCT_RS(SHAPE, TYPES, COUNT, A0, A1, A2, A3, B)                                                  \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned." SHAPE "." TYPES        \
                 " {" PDN_REGISTERS_##COUNT "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B ", p, 1, 1, 1;\n}\n" \
                 : PDN_SUMS_##COUNT("f")                                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#else
#define PDN_PRODUCT_SS(...)
#define PDN_PRODUCT_RS(...)
#endif

// d = A B^T, or d += A B^T (`add`), for 64 rows, 128 columns and 32 bytes of depth; both run along their rows.
PDN_DEVICE void product_async(BFloat16, float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
    PDN_PRODUCT_SS("m64n128k16", "f32.bf16.bf16", 64, "f", "64", "65", "66", ", 1, 1, 0, 0");
}
PDN_DEVICE void product_async(Float16, float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
    PDN_PRODUCT_SS("m64n128k16", "f32.f16.f16", 64, "f", "64", "65", "66", ", 1, 1, 0, 0");
}
PDN_DEVICE void product_async(int8_t, int (&d)[16][4], uint64_t a, uint64_t b, bool add) {
    PDN_PRODUCT_SS("m64n128k32", "s32.s8.s8", 64, "r", "64", "65", "66", "");
}

// d += P B: 16 columns of P in registers, and 16 depths of B, which run down its rows.
PDN_DEVICE void product_async(BFloat16, float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
    PDN_PRODUCT_RS("m64n64k16", "f32.bf16.bf16", 32, "32", "33", "34", "35", "36");
}
PDN_DEVICE void product_async(BFloat16, float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
    PDN_PRODUCT_RS("m64n128k16", "f32.bf16.bf16", 64, "64", "65", "66", "67", "68");
}
PDN_DEVICE void product_async(Float16, float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
    PDN_PRODUCT_RS("m64n64k16", "f32.f16.f16", 32, "32", "33", "34", "35", "36");
}
PDN_DEVICE void product_async(Float16, float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
    PDN_PRODUCT_RS("m64n128k16", "f32.f16.f16", 64, "64", "65", "66", "67", "68");
}

#undef PDN_PRODUCT_SS
#undef PDN_PRODUCT_RS

#endif

}  // namespace
}  // namespace pdn
