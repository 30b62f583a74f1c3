// The kernels of one level of the instruction set: an <op>.cpp is compiled once for each level that makes a
// difference to it (CMakeLists.txt says which, dispatch.cpp what a level takes instead), with CERBERUS_ISA
// defined as the name of the level, which is also the namespace that everything it defines lives in.
//
// Why that matters: the linker merges inline functions of the same name, and would take, say, an AVX-512 copy
// of one for all levels. So the code compiled per level defines nothing outside of its namespace, and uses
// nothing of the standard library that is an inline function or a template (std::sort, std::vector,
// std::max): only C functions and builtins.
#pragma once

#include "args.h"
#include "cpu/parallel.h"
#include "ops.h"

// void <op>(const <Op>Args&, const Parallel&) of every op, and what steps have besides, see cpu.h; which of
// them a level defines is said in CMakeLists.txt.
#define CERBERUS_DECLARE_KERNEL(name, Name, schema) void name(const Name##Args&, const Parallel&);
#define CERBERUS_DECLARE_KERNELS(isa)                               \
  namespace cerberus::isa {                                         \
  CERBERUS_OPS(CERBERUS_DECLARE_KERNEL)                             \
  void tree_attentions(const TreeAttentionsArgs&, const Parallel&); \
  void rows(const RowsArgs&, const Parallel&);                      \
  void packed_linear(const LinearArgs&, const Parallel&);           \
  void pack_weights(const PackWeightsArgs&, const Parallel&);       \
  int64_t packed_elements(DType, int64_t rows, int64_t size);       \
  void block_linear(const LinearArgs&, Packing, const Parallel&);   \
  void pack_blocks(const PackBlocksArgs&, const Parallel&);         \
  int64_t block_bytes(Packing, int64_t rows, int64_t size);         \
  void pack_device_blocks(const PackBlocksArgs&, const Parallel&);  \
  void eight_bit_linear(const LinearArgs&, const Parallel&);        \
  void pack_eight_bits(const PackEightBitsArgs&, const Parallel&);  \
  void draft(const DraftArgs&, const Parallel&);                    \
  }

#ifdef CERBERUS_ISA
CERBERUS_DECLARE_KERNELS(CERBERUS_ISA)
#endif
