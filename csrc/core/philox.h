// Philox4x32-10, a counter-based generator (Salmon et al., 2011), and Gumbel noise made of its words: what all backends
// draw. pydenoise/reference/_philox.py says the same in plain torch; the kernels of a CPU use gumbel.inl.
#pragma once

#include <cstdint>
#include <cstring>

#include "activation.h"

namespace pdn {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxFirst = 0xD2511F53u, kPhiloxSecond = 0xCD9E8D57u;        // multipliers
constexpr uint32_t kPhiloxKeyFirst = 0x9E3779B9u, kPhiloxKeySecond = 0xBB67AE85u;  // added to the key every round

// Column v of a row takes word v / kNoiseLanes % 4 of the counter whose first word is
// v / kNoiseBlock * kNoiseLanes + v % kNoiseLanes; the others are the halves of the row's number, and the step.
constexpr int64_t kNoiseLanes = 32, kNoiseBlock = 4 * kNoiseLanes;

struct PhiloxWords {
    uint32_t v[4];
};

// What a row's noise hangs on.
struct NoiseRow {
    uint32_t key[2];
    uint32_t row[2];
    uint32_t step;
};

// The functions are static, so that the objects of the ISA levels share none.
PDN_ANYWHERE static inline NoiseRow noise_row(int64_t seed, int64_t row, uint32_t step) {
    const auto s = static_cast<uint64_t>(seed), r = static_cast<uint64_t>(row);
    return {{static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32)},
            {static_cast<uint32_t>(r), static_cast<uint32_t>(r >> 32)},
            step};
}

PDN_ANYWHERE static inline PhiloxWords philox(uint32_t counter, const NoiseRow& row) {
    uint32_t c0 = counter, c1 = row.row[0], c2 = row.row[1], c3 = row.step, k0 = row.key[0], k1 = row.key[1];
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 0; i < kPhiloxRounds; ++i) {
        const uint64_t first = static_cast<uint64_t>(kPhiloxFirst) * c0;
        const uint64_t second = static_cast<uint64_t>(kPhiloxSecond) * c2;
        c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
        c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(second);
        c3 = static_cast<uint32_t>(first);
        k0 += kPhiloxKeyFirst;
        k1 += kPhiloxKeySecond;
    }
    return {{c0, c1, c2, c3}};
}

// log(1 + t) = t - t^2 / 2 + t^3 P(t) for sqrt(1/2) <= 1 + t <= sqrt(2), fitted to the relative error, 6e-9.
PDN_ANYWHERE static constexpr float log_coefficient(int i) {
    constexpr float p[8] = {3.333333135e-1f, -2.500082254e-1f, 2.000122666e-1f, -1.662335694e-1f,
                            1.420176178e-1f, -1.316019446e-1f, 1.276154965e-1f, -7.634429634e-2f};
    return p[i];
}
constexpr float kLn2 = 0.693147180559945f;
constexpr int32_t kRootHalfBits = 0x3f3504f3;  // of sqrt(1/2)

// log((1 + t) 2^exponent)
PDN_ANYWHERE static inline float log_of_parts(float t, float exponent) {
    float p = log_coefficient(7);
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 6; i >= 0; --i) p = p * t + log_coefficient(i);
    return exponent * kLn2 + (t * t * (t * p - 0.5f) + t);
}

// log(x) of a positive normal number.
PDN_ANYWHERE static inline float log_positive(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const int32_t exponent = (bits - kRootHalfBits) >> 23;
    bits -= static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23);
    float mantissa;
    memcpy(&mantissa, &bits, sizeof mantissa);
    return log_of_parts(mantissa - 1.f, static_cast<float>(exponent));
}

// -log(-log(u)) with u = 1 - (word + 1/2) / 2^32. Large values come from small words, so none loses a digit.
PDN_ANYWHERE static inline float gumbel(uint32_t word) {
    const bool upper = (word >> 31) != 0;
    const auto nearest = static_cast<float>(static_cast<int32_t>(upper ? ~word : word));
    const float q = (nearest + 0.5f) * 2.3283064365386963e-10f;  // 2^-32
    const bool half = q > 0.29289322f;                           // 1 - q below sqrt(1/2)
    const float low = log_of_parts(half ? 1.f - 2.f * q : -q, half ? -1.f : 0.f);
    return -log_positive(-(upper ? log_positive(q) : low));
}

}  // namespace pdn
