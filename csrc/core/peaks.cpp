#include "peaks.h"

#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "isa.h"
#include "levels.h"
#include "peaks_burst.h"

namespace pdn {

PDN_ALL_LEVELS(Bursts, bursts, kBursts)

namespace {

using Clock = std::chrono::steady_clock;

// Larger than a last-level cache share, small enough to allocate anywhere: per thread.
constexpr int64_t kStreamWords = 8 << 20;

double stream(const char* what, uint64_t* a, uint64_t* b) {
    const double bytes = static_cast<double>(kStreamWords) * 8;
    if (std::strcmp(what, "copy") == 0) {
        std::memcpy(b, a, static_cast<size_t>(kStreamWords) * 8);
        return 2 * bytes;
    }
    if (std::strcmp(what, "write") == 0) {
        std::memset(b, static_cast<int>(a[0] & 1), static_cast<size_t>(kStreamWords) * 8);
        return bytes;
    }
    uint64_t sums[8] = {};
    for (int64_t i = 0; i < kStreamWords; i += 8)
        for (int j = 0; j < 8; ++j) sums[j] += a[i + j];
    for (int j = 0; j < 8; ++j) b[j] = sums[j];
    return bytes;
}

// The arithmetic called `what` at this level; null if it has none, or if `what` is no arithmetic.
auto burst_of(const char* what) -> double (*)(int64_t) {
    const Bursts& bursts = *kBursts[static_cast<int>(active_isa())];
    if (std::strcmp(what, "fma_f32") == 0) return bursts.fma_f32;
    if (std::strcmp(what, "bf16_dot") == 0) return bursts.bf16_dot;
    return std::strcmp(what, "vnni_dot") == 0 ? bursts.vnni_dot : nullptr;
}

bool is_arithmetic(const char* what) {
    return std::strcmp(what, "fma_f32") == 0 || std::strcmp(what, "bf16_dot") == 0 ||
           std::strcmp(what, "vnni_dot") == 0;
}

// The best burst of one thread within its time, as a rate.
double best_rate(const char* what, double seconds) {
    const auto burst = burst_of(what);
    std::unique_ptr<uint64_t[]> a, b;
    if (burst == nullptr) {
        if (is_arithmetic(what)) return 0;
        a.reset(new uint64_t[static_cast<size_t>(kStreamWords)]());
        b.reset(new uint64_t[static_cast<size_t>(kStreamWords)]());
    }
    double best = 0;
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);
    do {
        const auto start = Clock::now();
        const double done = burst != nullptr ? burst(100000) : stream(what, a.get(), b.get());
        const double rate = done / std::chrono::duration<double>(Clock::now() - start).count();
        if (rate > best) best = rate;
    } while (Clock::now() < end);
    return best;
}

}  // namespace

double measure_peak(const char* what, double seconds, int threads) {
    bool known = is_arithmetic(what);
    for (const char* name : {"read", "copy", "write"}) known |= std::strcmp(what, name) == 0;
    if (!known) return -1;
    std::vector<double> rates(static_cast<size_t>(threads < 1 ? 1 : threads));
    std::vector<std::thread> others;
    for (size_t i = 1; i < rates.size(); ++i) others.emplace_back([&, i] { rates[i] = best_rate(what, seconds); });
    rates[0] = best_rate(what, seconds);
    for (auto& thread : others) thread.join();
    double total = 0;
    for (double rate : rates) total += rate;
    return total;
}

}  // namespace pdn
