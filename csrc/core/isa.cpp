#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace pdn {
namespace {

constexpr const char* kNames[kIsaCount] = {"baseline", "avx2", "avx512", "avx512bf16"};

int level_of(const char* name) {
    for (int i = 0; i < kIsaCount; ++i)
        if (std::strcmp(kNames[i], name) == 0) return i;
    return -1;
}

Isa probe() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::baseline;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx512) return Isa::avx2;
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
#else
    return Isa::baseline;
#endif
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

Isa detected_isa() {
    static const Isa isa = probe();
    return isa;
}

Isa active_isa() {
    const int detected = static_cast<int>(detected_isa());
    return static_cast<Isa>(detected < cap() ? detected : cap());
}

bool set_isa_cap(const char* name) {
    const int level = level_of(name);
    if (level < 0) return false;
    cap() = level;
    return true;
}

const char* isa_environment_error() {
    cap();
    return bad_environment ? "PYDENOISE_ISA: expected one of baseline, avx2, avx512, avx512bf16" : nullptr;
}

}  // namespace pdn
