// CPU instruction-set levels, in ascending order. A processor need not offer every level below its highest: AVX-VNNI
// (avx2vnni) is missing from many that have AVX-512.
#pragma once

namespace pdn {

enum class Isa : int { baseline = 0, avx2 = 1, avx2vnni = 2, avx512 = 3, avx512vnni = 4, avx512bf16 = 5 };
constexpr int kIsaCount = 6;

// Name as used by PYDENOISE_ISA and in reports.
const char* isa_name(Isa isa);

// Whether this processor and operating system offer `isa`.
bool isa_available(Isa isa);

// The highest level they offer.
Isa detected_isa();

// The level in use: the highest available one that PYDENOISE_ISA or set_isa_cap does not exclude.
Isa active_isa();

// Lower the level at run time (tests, benches). Returns false if `name` is no level.
bool set_isa_cap(const char* name);

// Non-null if PYDENOISE_ISA holds a word that is no level: the error to show.
const char* isa_environment_error();

}  // namespace pdn
