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

#define CERBERUS_DECLARE_KERNELS(isa)                             \
  namespace cerberus::isa {                                       \
  void hidden_entropy(const HiddenEntropyArgs&, const Parallel&); \
  void head_stack(const HeadStackArgs&, const Parallel&);         \
  void draft_topk(const DraftTopkArgs&, const Parallel&);         \
  void choose_tokens(const ChooseTokensArgs&, const Parallel&);   \
  void tree_attention(const TreeAttentionArgs&, const Parallel&); \
  void write_cache(const WriteCacheArgs&, const Parallel&);       \
  void verify_tree(const VerifyTreeArgs&, const Parallel&);       \
  void commit_cache(const CommitCacheArgs&, const Parallel&);     \
  void linear(const LinearArgs&, const Parallel&);                \
  void activation(const ActivationArgs&, const Parallel&);        \
  }

#ifdef CERBERUS_ISA
CERBERUS_DECLARE_KERNELS(CERBERUS_ISA)
#endif
