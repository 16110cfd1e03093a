// int8 convolution for the bindings and for harnesses: choose an algorithm, pack, run on all threads.
#pragma once

#include "../core/isa.h"
#include "params.h"

namespace pdn {
namespace int8_conv2d {

// The kernels of one ISA level. A level that brings nothing new for int8 has those of the level below.
const KernelSet& kernel_set(Isa isa);

// Index of the first algorithm of the level that can run `p`. Looks at channels and groups alone.
int choose_algorithm(Isa isa, const ConvParams& p);

// Pack on all threads into `packed` (Algorithm::packed_bytes, 64-byte aligned). `weight` is dense.
void pack(const Algorithm& algorithm, const ConvParams& p, const int8_t* weight, void* packed);

// Ready to run, once or many times: planned, with images and rows joined where that changes no result (a 1x1 kernel
// over dense memory sees one long row).
ConvParams prepared(const Algorithm& algorithm, const ConvParams& p);

// Run what is prepared, on all threads. False if scratch memory is exhausted.
bool run(const Algorithm& algorithm, const ConvParams& p);

}  // namespace int8_conv2d
}  // namespace pdn
