// The functions of ops.activation on a run of floats, for other kernels of a level.
#pragma once

#include "args.h"

namespace cerberus::CERBERUS_ISA {

// out[i] = kind(in[i]), to what `dtype` can show: rounded to it, the bits are those of ops.activation. `out` may be
// `in`.
void activate(Activation kind, DType dtype, const float* in, int64_t count, float* out);

}  // namespace cerberus::CERBERUS_ISA
