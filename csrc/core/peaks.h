// Machine peaks, measured: what the fraction of the floor in the benches is a fraction of.
#pragma once

namespace pdn {

// Operations (or bytes) per second over `threads` threads, the best burst within `seconds`. Negative if `what` is none
// of "fma_f32", "bf16_dot", "vnni_dot", "read", "copy", "write"; 0 where the level in use has no such instruction.
double measure_peak(const char* what, double seconds, int threads);

}  // namespace pdn
