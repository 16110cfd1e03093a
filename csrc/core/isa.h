// CPU instruction-set levels, in ascending order. Each level includes all lower ones.
#pragma once

namespace pdn {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };
constexpr int kIsaCount = 4;

// Name as used by PYDENOISE_ISA and in reports.
const char* isa_name(Isa isa);

// The highest level this processor and operating system offer.
Isa detected_isa();

// The level in use: the detected one, lowered by PYDENOISE_ISA or set_isa_cap; never raised.
Isa active_isa();

// Lower the level at run time (tests, benches). Returns false if `name` is no level.
bool set_isa_cap(const char* name);

// Non-null if PYDENOISE_ISA holds a word that is no level: the error to show.
const char* isa_environment_error();

}  // namespace pdn
