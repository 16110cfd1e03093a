#include "isa.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pdn {
namespace {

constexpr const char* kNames[kIsaCount] = {"baseline", "avx2", "avx2vnni", "avx512", "avx512vnni", "avx512bf16"};

int level_of(const char* name) {
    for (int i = 0; i < kIsaCount; ++i)
        if (std::strcmp(kNames[i], name) == 0) return i;
    return -1;
}

// One bit per level.
unsigned probe() {
    unsigned levels = 1u << static_cast<int>(Isa::baseline);
#if defined(__x86_64__)
    const auto offer = [&](Isa isa) { levels |= 1u << static_cast<int>(isa); };
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return levels;
    offer(Isa::avx2);
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    constexpr unsigned kAvxVnni = 1u << 4;  // of leaf 7.1, which __builtin_cpu_supports of GCC 11 does not know
    if (__get_cpuid_max(0, nullptr) >= 7 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvxVnni))
        offer(Isa::avx2vnni);
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx512) return levels;
    offer(Isa::avx512);
    if (!__builtin_cpu_supports("avx512vnni")) return levels;
    offer(Isa::avx512vnni);
    if (__builtin_cpu_supports("avx512bf16")) offer(Isa::avx512bf16);
#endif
    return levels;
}

Isa highest(int cap) {
    int level = cap;
    while (level > 0 && !isa_available(static_cast<Isa>(level))) --level;
    return static_cast<Isa>(level);
}

bool bad_environment = false;

int initial_cap() {
    const char* text = std::getenv("PYDENOISE_ISA");
    if (text == nullptr || *text == '\0') return kIsaCount - 1;
    const int level = level_of(text);
    if (level >= 0) return level;
    bad_environment = true;
    return kIsaCount - 1;
}

int& cap() {
    static int value = initial_cap();
    return value;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_available(Isa isa) {
    static const unsigned levels = probe();
    return levels >> static_cast<int>(isa) & 1u;
}

Isa detected_isa() {
    static const Isa isa = highest(kIsaCount - 1);
    return isa;
}

Isa active_isa() { return highest(cap()); }

bool set_isa_cap(const char* name) {
    const int level = level_of(name);
    if (level < 0) return false;
    cap() = level;
    return true;
}

const char* isa_environment_error() {
    cap();
    return bad_environment ? "PYDENOISE_ISA: expected one of baseline, avx2, avx2vnni, avx512, avx512vnni, avx512bf16"
                           : nullptr;
}

}  // namespace pdn
