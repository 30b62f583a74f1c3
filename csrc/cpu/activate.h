#pragma once
#include "args.h"
namespace cerberus::CERBERUS_ISA {
void activate(Activation kind, DType dtype, const float* in, int64_t count, float* out);
}
