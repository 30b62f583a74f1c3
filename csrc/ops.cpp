// Every schema of the library. bind_cpu.cpp and bind_cuda.cpp register the implementations, cerberus_ext/ops/
// the documentation and the fake implementations.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cerberus_ext, m) {
#define DEFINE(name, Name, schema) m.def(#name schema);
  CERBERUS_OPS(DEFINE)
#undef DEFINE
  // The level of the instruction set that the CPU kernels use: portable, avx2, avx512, avx512_bf16 or
  // amx_bf16.
  m.def("cpu_isa() -> str");
}
