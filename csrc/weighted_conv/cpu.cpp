// Compiled once per ISA level: PDN_ISA names the level, and the one exported symbol carries the name.
#include "depthwise.inl"
#include "depthwise_grad.inl"
#include "depthwise_large.inl"
#include "depthwise_large_grad.inl"
#include "grad_weight.inl"
#include "kernel.inl"
#include "params.h"
#include "skinny.inl"
#include "winograd.inl"

#define PDN_JOIN2(a, b) a##b
#define PDN_JOIN(a, b) PDN_JOIN2(a, b)

namespace pdn {
namespace weighted_conv {
namespace {

constexpr Algorithm kAlgorithms[] = {
    kDepthwiseLarge, kDepthwise, kSkinnyIn, kSkinnyOut, kWinograd, kDirectF32,
#if defined(__AVX512BF16__)
    kDirectBF16,
#endif
};

constexpr GradAlgorithm kGradAlgorithms[] = {kGradDepthwiseLarge, kGradDepthwise, kGradDirect};

}  // namespace

extern const KernelSet PDN_JOIN(kernels_, PDN_ISA);
const KernelSet PDN_JOIN(kernels_, PDN_ISA) = {
    kWidth,
    kAlgorithms,
    static_cast<int>(sizeof kAlgorithms / sizeof kAlgorithms[0]),
    kGradAlgorithms,
    static_cast<int>(sizeof kGradAlgorithms / sizeof kGradAlgorithms[0]),
};

}  // namespace weighted_conv
}  // namespace pdn
