// The functions of ops.activation on a row of floats, for kernels that have such rows at hand.
#pragma once

#include <cstdint>

#include "args.h"

namespace cerberus::CERBERUS_ISA {

// out[i] = f(in[i]), as exact as values of `dtype` are: float32 to half a unit; for a 16-bit type, rounding
// to it is left to the caller, and then gives the bits of ops.activation. `out` may be `in`.
void activate(Activation kind, DType dtype, const float* in, int64_t count, float* out);

}  // namespace cerberus::CERBERUS_ISA
