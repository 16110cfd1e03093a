// Compiled once per ISA level: PDN_ISA names the level, and the one exported symbol carries the name.
#include "dense.inl"
#include "depthwise.inl"
#include "params.h"

#define PDN_JOIN2(a, b) a##b
#define PDN_JOIN(a, b) PDN_JOIN2(a, b)

namespace pdn {
namespace int8_conv2d {
namespace {

constexpr Algorithm kAlgorithms[] = {kDepthwise, kDense};

}  // namespace

extern const KernelSet PDN_JOIN(kernels_, PDN_ISA);
const KernelSet PDN_JOIN(kernels_, PDN_ISA) = {
    kWidth,
    kAlgorithms,
    static_cast<int>(sizeof kAlgorithms / sizeof kAlgorithms[0]),
};

}  // namespace int8_conv2d
}  // namespace pdn
