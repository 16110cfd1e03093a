// Stand-alone check and timing of csrc/weighted_conv/skinny.inl, without torch:
//   g++ -std=c++20 -O3 -ffp-contract=fast -fno-math-errno [ISA flags] tests/native/skinny_harness.cpp -o harness
//   ./harness                                   all cases against a double-precision convolution; exit 1 on a failure
//   ./harness time IN OUT KERNEL SIZE [REPEATS]  best milliseconds of one square image, one thread
#include "../../csrc/weighted_conv/skinny.inl"
#include "convolution_check.h"

using namespace check;

namespace {

const Case kIn[] = {
    {"3 to 64", 1, 1, 3, 64, {kFlat, {9, 3, 1, 1}, {33, 3, 1, 1}}, Activation::relu},
    {"1 to 64, gaps between pixels",
     2,
     1,
     1,
     64,
     {kFlat, {5, 3, 1, 1}, {17, 3, 1, 1}},
     Activation::silu,
     true,
     true,
     true,
     false,
     3},
    {"a block less than full", 1, 1, 3, 37, {kFlat, {6, 3, 1, 1}, {19, 3, 1, 1}}, Activation::gelu, true, true, false},
    {"one channel beyond a block", 1, 1, 2, 33, {kFlat, {6, 3, 1, 1}, {15, 3, 1, 1}}, Activation::gelu_tanh},
    {"4 to 20, 5x7, more padding than half of the row", 1, 1, 4, 20, {kFlat, {4, 5, 1, 2}, {5, 7, 1, 3}}},
    {"96 filters", 1, 1, 3, 96, {kFlat, {4, 3, 1, 1}, {31, 3, 1, 1}}},
    {"stride 2", 1, 1, 3, 32, {kFlat, {9, 3, 2, 1}, {21, 3, 2, 1}}},
    {"dilation beyond the image", 1, 1, 1, 16, {kFlat, {4, 3, 1, 6, 6}, {5, 3, 1, 6, 6}}},
    {"stride and dilation", 1, 1, 2, 24, {kFlat, {12, 3, 2, 2, 2}, {31, 3, 3, 2, 2}}},
    {"groups", 2, 3, 2, 20, {kFlat, {5, 3, 1, 1}, {16, 3, 1, 1}}, Activation::relu, true, true, true, false, 1},
    {"single pixel", 3, 1, 3, 16, {kFlat, {1, 3, 1, 1}, {1, 3, 1, 1}}},
    {"1x1", 1, 1, 3, 16, {kFlat, {3, 1}, {18, 1}}},
    {"kernel of the image's size", 1, 1, 3, 32, {kFlat, {5, 5}, {5, 5}}},
    {"the padding is larger than image and kernel", 1, 1, 3, 16, {kFlat, {2, 2, 1, 7}, {3, 2, 1, 7}}},
    {"reversed kernel", 1, 1, 3, 32, {kFlat, {7, 3, 1, 1}, {16, 3, 1, 1}}, Activation::none, false, false, true, true},
    {"every second tap", 1, 1, 2, 16, {kFlat, {8, 5, 1, 1, 1, 2, 1, 2}, {15, 4, 1, 1, 1, 2, 1, 2}}},
    {"taps towards lower positions", 1, 1, 3, 16, {kFlat, {8, 3, 1, 1}, {19, 3, 1, 1, 1, -1, 0, 1, true}}},
    {"no taps: the bias alone", 1, 1, 3, 16, {kFlat, {4, 3, 1, 1, 1, 0}, {6, 3, 1, 1}}, Activation::relu, true, true},
    {"1-D", 2, 1, 1, 40, {kFlat, kFlat, {301, 5, 1, 2}}},
    {"3-D", 1, 1, 1, 32, {{4, 3, 1, 1}, {5, 2}, {9, 3, 1, 1}}, Activation::silu, true, true},
    {"no images", 0, 1, 3, 64, {kFlat, {8, 3, 1, 1}, {8, 3, 1, 1}}},
    {"many channels in",
     1,
     1,
     40,
     64,
     {kFlat, {4, 3, 1, 1}, {4, 3, 1, 1}},
     Activation::none,
     true,
     false,
     true,
     false,
     0,
     "input channels"},
};

const Case kOut[] = {
    {"64 to 3", 1, 1, 64, 3, {kFlat, {9, 3, 1, 1}, {33, 3, 1, 1}}, Activation::none, true, true},
    {"64 to 1, gaps between pixels",
     2,
     1,
     64,
     1,
     {kFlat, {5, 3, 1, 1}, {17, 3, 1, 1}},
     Activation::silu,
     true,
     true,
     true,
     false,
     3},
    {"odd channels in", 1, 1, 21, 2, {kFlat, {9, 5, 1, 2}, {10, 5, 1, 2}}, Activation::relu},
    {"4 out, 7x7", 1, 1, 48, 4, {kFlat, {9, 7, 1, 3}, {23, 7, 1, 3}}, Activation::gelu},
    {"more padding than half of the row", 1, 1, 32, 3, {kFlat, {3, 7, 1, 3}, {4, 7, 1, 3}}, Activation::gelu_tanh},
    {"stride 2", 1, 1, 32, 3, {kFlat, {9, 3, 2, 1}, {21, 3, 2, 1}}},
    {"dilation beyond the image", 1, 1, 16, 1, {kFlat, {4, 3, 1, 6, 6}, {5, 3, 1, 6, 6}}},
    {"stride and dilation", 1, 1, 17, 2, {kFlat, {12, 3, 2, 2, 2}, {31, 3, 3, 2, 2}}},
    {"groups", 2, 3, 19, 2, {kFlat, {5, 3, 1, 1}, {16, 3, 1, 1}}, Activation::relu, true, true, true, false, 1},
    {"single pixel", 3, 1, 16, 3, {kFlat, {1, 3, 1, 1}, {1, 3, 1, 1}}},
    {"1x1", 1, 1, 40, 3, {kFlat, {3, 1}, {18, 1}}, Activation::none, false},
    {"the padding is larger than image and kernel", 1, 1, 16, 3, {kFlat, {2, 2, 1, 7}, {3, 2, 1, 7}}},
    {"reversed kernel", 1, 1, 32, 3, {kFlat, {7, 3, 1, 1}, {16, 3, 1, 1}}, Activation::none, false, false, true, true},
    {"every second tap", 1, 1, 32, 2, {kFlat, {8, 5, 1, 1, 1, 2, 1, 2}, {15, 4, 1, 1, 1, 2, 1, 2}}},
    {"a subset of neighbouring taps", 1, 1, 32, 2, {kFlat, {8, 5, 1, 1, 1, 2, 1, 1}, {19, 5, 1, 1, 1, 3, 2, 1}}},
    {"taps towards lower positions", 1, 1, 16, 3, {kFlat, {8, 3, 1, 1}, {19, 3, 1, 1, 1, -1, 0, 1, true}}},
    {"no taps: the bias alone", 1, 1, 16, 3, {kFlat, {4, 3, 1, 1, 1, 0}, {6, 3, 1, 1}}, Activation::relu, true, true},
    {"many channels in", 1, 1, 260, 3, {kFlat, {4, 3, 1, 1}, {13, 3, 1, 1}}},
    {"1-D", 2, 1, 64, 1, {kFlat, kFlat, {301, 5, 1, 2}}},
    {"3-D", 1, 1, 32, 1, {{4, 3, 1, 1}, {5, 2}, {9, 3, 1, 1}}, Activation::silu, true, true},
    {"no images", 0, 1, 64, 3, {kFlat, {8, 3, 1, 1}, {8, 3, 1, 1}}},
    {"many channels out",
     1,
     1,
     40,
     64,
     {kFlat, {4, 3, 1, 1}, {4, 3, 1, 1}},
     Activation::none,
     true,
     false,
     true,
     false,
     0,
     "output channels"},
};

}  // namespace

int main(int count, char** words) {
    if (count < 6) return failures(kSkinnyIn, kIn) + failures(kSkinnyOut, kOut) != 0;
    const int64_t in = std::atoll(words[2]), out = std::atoll(words[3]), kernel = std::atoll(words[4]),
                  size = std::atoll(words[5]);
    const Side side = {size, kernel, 1, kernel / 2};
    measure(in < out ? kSkinnyIn : kSkinnyOut, {"timed", 1, 1, in, out, {kFlat, side, side}},
            count > 6 ? std::atoi(words[6]) : 10);
}
