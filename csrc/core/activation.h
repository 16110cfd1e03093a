// The functions that an op may apply in its epilogue or to its input. pydenoise/reference/activations.py numbers them
// alike.
#pragma once

#if defined(__CUDACC__)
#define PDN_ANYWHERE __host__ __device__
#else
#define PDN_ANYWHERE
#endif

namespace pdn {

enum class Activation : int {
    none = 0,
    relu = 1,
    silu = 2,
    gelu = 3,
    gelu_tanh = 4,
    leaky_relu_001 = 5,  // slope 0.01 below zero
    leaky_relu_01 = 6,   // 0.1
    leaky_relu_02 = 7,   // 0.2
    geglu = 8,           // only on the way into quantization: it halves the channels
    softplus = 9,        // only in the epilogue of a float convolution
};

// The functions are static, so that the objects of the ISA levels share none.
PDN_ANYWHERE static constexpr bool is_leaky_relu(Activation a) {
    return a == Activation::leaky_relu_001 || a == Activation::leaky_relu_01 || a == Activation::leaky_relu_02;
}

// Of a leaky ReLU.
PDN_ANYWHERE static constexpr float leaky_slope(Activation a) {
    return a == Activation::leaky_relu_001 ? 0.01f : a == Activation::leaky_relu_01 ? 0.1f : 0.2f;
}

// Whether `number`, which came from Python, is an activation that leaves the channels as they are.
static constexpr bool is_elementwise(long long number) {
    return number >= 0 && number <= static_cast<long long>(Activation::leaky_relu_02);
}

// Whether `number` is an activation that a float convolution may end in.
static constexpr bool ends_convolution(long long number) {
    return is_elementwise(number) || number == static_cast<long long>(Activation::softplus);
}

}  // namespace pdn
