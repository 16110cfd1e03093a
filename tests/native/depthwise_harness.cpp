// Stand-alone check and timing of csrc/weighted_conv/depthwise.inl, without torch:
//   g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno [ISA flags] tests/native/depthwise_harness.cpp -o harness
//   ./harness                                      all cases against a double-precision convolution; exit 1 on a
//   failure
//   ./harness time CHANNELS KERNEL SIZE [REPEATS]  best milliseconds of one square image, one thread
#include "../../csrc/weighted_conv/depthwise.inl"
#include "convolution_check.h"

using namespace check;

namespace {

const Case kCases[] = {
    {"3x3, an even number of rows, residual",
     2,
     48,
     1,
     1,
     {kFlat, {8, 3, 1, 1}, {20, 3, 1, 1}},
     Activation::relu,
     true,
     true},
    {"3x3x3", 1, 19, 1, 1, {{3, 3, 1, 1}, {5, 3, 1, 1}, {9, 3, 1, 1}}, Activation::relu},
    {"cropped: offsets are positive", 1, 16, 1, 1, {kFlat, {9, 3, 1, -1}, {31, 3, 1, -2}}},
    {"3x3, whole vectors", 1, 32, 1, 1, {kFlat, {9, 3, 1, 1}, {33, 3, 1, 1}}, Activation::relu},
    {"3x3, channels not a multiple of the vector width",
     2,
     35,
     1,
     1,
     {kFlat, {7, 3, 1, 1}, {18, 3, 1, 1}},
     Activation::none,
     true,
     true},
    {"fewer channels than a vector, gaps between pixels",
     1,
     3,
     1,
     1,
     {kFlat, {7, 3, 1, 1}, {18, 3, 1, 1}},
     Activation::silu,
     true,
     true,
     true,
     false,
     2},
    {"5x5", 1, 16, 1, 1, {kFlat, {6, 5, 1, 2}, {21, 5, 1, 2}}, Activation::gelu},
    {"leaky relu", 1, 32, 1, 1, {kFlat, {6, 3, 1, 1}, {21, 3, 1, 1}}, Activation::leaky_relu_02},
    {"softplus", 1, 20, 1, 1, {kFlat, {6, 3, 1, 1}, {21, 3, 1, 1}}, Activation::softplus},
    {"7x7", 1, 48, 1, 1, {kFlat, {8, 7, 1, 3}, {29, 7, 1, 3}}, Activation::gelu_tanh, false, true, false},
    {"7x7, more padding than half of the row", 1, 17, 1, 1, {kFlat, {3, 7, 1, 3}, {4, 7, 1, 3}}},
    {"31x31", 1, 16, 1, 1, {kFlat, {6, 31, 1, 15}, {40, 31, 1, 15}}},
    {"even kernel", 1, 16, 1, 1, {kFlat, {6, 2, 1, 1}, {15, 4, 1, 1}}},
    {"3x5", 1, 20, 1, 1, {kFlat, {6, 3, 1, 1}, {15, 5, 1, 2}}},
    {"stride 2", 1, 16, 1, 1, {kFlat, {9, 3, 2, 1}, {31, 3, 2, 1}}},
    {"dilation 2", 1, 24, 1, 1, {kFlat, {9, 3, 1, 2, 2}, {22, 3, 1, 2, 2}}},
    {"dilation beyond the image", 1, 16, 1, 1, {kFlat, {4, 3, 1, 6, 6}, {5, 3, 1, 6, 6}}},
    {"stride and dilation", 1, 19, 1, 1, {kFlat, {12, 3, 2, 2, 2}, {41, 3, 3, 2, 2}}},
    {"single pixel", 3, 16, 1, 1, {kFlat, {1, 3, 1, 1}, {1, 3, 1, 1}}},
    {"the padding is larger than image and kernel",
     1,
     16,
     1,
     1,
     {kFlat, {2, 2, 1, 7}, {3, 3, 1, 7}},
     Activation::none,
     true,
     true},
    {"1x1", 1, 16, 1, 1, {kFlat, {3, 1}, {18, 1}}, Activation::none, false},
    {"reversed kernel", 1, 32, 1, 1, {kFlat, {7, 3, 1, 1}, {16, 3, 1, 1}}, Activation::none, false, false, true, true},
    {"every second tap", 1, 16, 1, 1, {kFlat, {8, 5, 1, 1, 1, 2, 1, 2}, {15, 4, 1, 1, 1, 2, 1, 2}}},
    {"every second row, whole rows", 1, 16, 1, 1, {kFlat, {8, 5, 1, 1, 1, 2, 1, 2}, {19, 3, 1, 1}}},
    {"taps towards lower positions", 1, 16, 1, 1, {kFlat, {8, 3, 1, 1}, {19, 3, 1, 1, 1, -1, 0, 1, true}}},
    {"no taps: the bias alone", 1, 16, 1, 1, {kFlat, {4, 3, 1, 1, 1, 0}, {6, 3, 1, 1}}, Activation::relu, true, true},
    {"no taps in a row: the bias alone",
     1,
     16,
     1,
     1,
     {kFlat, {4, 3, 1, 1}, {16, 3, 1, 1, 1, 0}},
     Activation::relu,
     true,
     true},
    {"1-D", 2, 20, 1, 1, {kFlat, kFlat, {301, 5, 1, 2}}},
    {"3-D", 1, 16, 1, 1, {{4, 3, 1, 1}, {5, 2}, {19, 3, 1, 1}}, Activation::silu, true, true},
    {"no images", 0, 16, 1, 1, {kFlat, {8, 3, 1, 1}, {8, 3, 1, 1}}},
    {"channel multiplier",
     1,
     16,
     1,
     2,
     {kFlat, {4, 3, 1, 1}, {4, 3, 1, 1}},
     Activation::none,
     true,
     false,
     true,
     false,
     0,
     "per group"},
};

}  // namespace

int main(int count, char** words) {
    if (count < 5) return failures(kDepthwise, kCases) != 0;
    const int64_t channels = std::atoll(words[2]), kernel = std::atoll(words[3]), size = std::atoll(words[4]);
    const Side side = {size, kernel, 1, kernel / 2};
    measure(kDepthwise, {"timed", 1, channels, 1, 1, {kFlat, side, side}}, count > 5 ? std::atoi(words[5]) : 10);
}
