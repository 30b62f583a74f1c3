// The CPU kernels, below the choice of the instruction set. No torch.
#pragma once

#include <string>

#include "args.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace cerberus {

// void <op>_cpu(const <Op>Args&, const Parallel&) of every op.
#define CERBERUS_DECLARE(name, Name, schema) \
  void name##_cpu(const Name##Args& args, const Parallel& parallel);
CERBERUS_OPS(CERBERUS_DECLARE)
#undef CERBERUS_DECLARE

// Into how many parts draft_topk splits a vocabulary of that size: by the size alone, so that a row's bits
// depend neither on the other rows nor on the number of threads.
int64_t draft_topk_parts_cpu(int64_t vocab);

// The level of the instruction set that the kernels use: the best one of this CPU, or CERBERUS_ISA where
// that is set. Throws std::runtime_error if CERBERUS_ISA names none that runs here.
std::string cpu_isa();

}  // namespace cerberus
