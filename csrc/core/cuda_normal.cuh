// Standard normal numbers from Philox words on CUDA, by Box and Muller: those of normal.inl, which says the same in
// vectors, and of pydenoise/reference/sampler_step.py.
#pragma once

#include "cuda_util.cuh"
#include "philox.h"

namespace pdn {
namespace {

// sqrt(-2 log(u)) with u = (word + 1/2) / 2^32. Near 1 the logarithm is taken from 1 - u, which loses no bit.
PDN_HD float normal_radius(uint32_t word) {
    const bool upper = (word >> 31) != 0;
    const auto nearest = static_cast<float>(static_cast<int32_t>(upper ? ~word : word));
    const float q = (nearest + 0.5f) * 2.3283064365386963e-10f;  // 2^-32
    const bool half = q > 0.29289322f;                           // 1 - q below sqrt(1/2)
    const float near_one = log_of_parts(half ? 1.f - 2.f * q : -q, half ? -1.f : 0.f);
    return sqrtf(-2.f * (upper ? near_one : log_positive(q)));
}

// cos and sin of pi word / 2^31, the word signed. The quarter turn that is nearest is taken off in integers, so small
// angles lose no bit; what is left is within pi / 4.
PDN_HD void cosine_sine(uint32_t word, float& cosine, float& sine) {
    const uint32_t quarter = (word + 0x20000000u) >> 30;
    const float x = static_cast<float>(static_cast<int32_t>(word - (quarter << 30))) * 1.4629180792671596e-9f;
    const float s = x * x;
    float odd = fmaf(fmaf(-1.951521821e-4f, s, 8.332160293e-3f), s, -1.666665460e-1f);
    odd = fmaf(odd * s, x, x);
    float even = fmaf(fmaf(-1.359179350e-3f, s, 4.165577261e-2f), s, -4.999988467e-1f);
    even = fmaf(even, s, 1.f);
    const bool swapped = (quarter & 1u) != 0;
    const uint32_t c = bit_copy<uint32_t>(swapped ? odd : even) ^ ((quarter + 1u) << 30 & 0x80000000u);
    const uint32_t d = bit_copy<uint32_t>(swapped ? even : odd) ^ (quarter << 30 & 0x80000000u);
    cosine = bit_copy<float>(c), sine = bit_copy<float>(d);
}

// Of the columns of one counter: classes 0 and 1 share a radius and an angle, 2 and 3 too.
PDN_HD void normal_columns(const PhiloxWords& words, float (&z)[4]) {
#pragma unroll
    for (int even = 0; even < 4; even += 2) {
        const float radius = normal_radius(words.v[even]);
        cosine_sine(words.v[even + 1], z[even], z[even + 1]);
        z[even] *= radius, z[even + 1] *= radius;
    }
}

}  // namespace
}  // namespace pdn
