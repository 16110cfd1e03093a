// Compiled once per ISA level.
#include "peaks_burst.h"
#include "vec.h"

#define PDN_JOIN2(a, b) a##b
#define PDN_JOIN(a, b) PDN_JOIN2(a, b)

namespace pdn {
namespace {

constexpr int kChains = 12;  // enough independent sums to hide the latency of a multiply-add
volatile float sink;

double burst_fma(int64_t rounds) {
    vf acc[kChains];
#pragma GCC unroll 12  // every loop over the sums: an index known only at run time would put them in memory
    for (int i = 0; i < kChains; ++i) acc[i] = splat(1.f);
    vf x = splat(0.5f);
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * x + x;
#if defined(__x86_64__)
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) asm volatile("" : "+v"(acc[i]));
#endif
    }
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sink = acc[i][0];
    return 2.0 * kWidth * kChains * static_cast<double>(rounds);
}

#if defined(__AVX512BF16__)
double burst_bf16(int64_t rounds) {
    vf acc[kChains];
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = vf{};
    vf x = (vf)_mm512_set1_epi32(0x3f803f80);
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(acc[i]) : "v"(x));
    }
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sink = acc[i][0];
    return 4.0 * kWidth * kChains * static_cast<double>(rounds);
}
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
double burst_vnni(int64_t rounds) {
    vi acc[kChains];
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = vi{};
    vi x = vi{} + 0x01010101;
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i)
#if defined(__AVX512VNNI__)
            asm volatile("vpdpbusd %1, %1, %0" : "+v"(acc[i]) : "v"(x));
#else
            asm volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(acc[i]) : "x"(x));  // else assemblers take EVEX
#endif
    }
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sink = static_cast<float>(acc[i][0]);
    return 8.0 * kWidth * kChains * static_cast<double>(rounds);
}
#endif

}  // namespace

extern const Bursts PDN_JOIN(bursts_, PDN_ISA);
const Bursts PDN_JOIN(bursts_, PDN_ISA) = {burst_fma,
#if defined(__AVX512BF16__)
                                           burst_bf16,
#else
                                           nullptr,
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
                                           burst_vnni
#else
                                           nullptr
#endif
};

}  // namespace pdn
