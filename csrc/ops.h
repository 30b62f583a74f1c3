// The ops of the library: the one list of them.
//
//   OP(name, Name, schema)
//
// stands for the op `cerberus_ext::name` of this schema (ops.cpp), for its kernels name_cpu (cpu/cpu.h) and
// name_cuda (cuda/kernels.h), which take a NameArgs (args.h), and for what torch calls, which runs
// prepare_name (prepare.h) and then the kernel (bind.h). All of it is declared and registered from here.
#pragma once

// What has kernels for the CPU and for CUDA.
#define CERBERUS_OPS_OF_EVERY_DEVICE(OP)                                                                 \
  OP(hidden_entropy, HiddenEntropy, "(Tensor hidden) -> Tensor")                                         \
  OP(head_stack, HeadStack, "(Tensor hidden, Tensor anchor, Tensor weight, Tensor bias) -> Tensor")      \
  OP(draft_topk, DraftTopk, "(Tensor states, Tensor projection, int drafts) -> (Tensor, Tensor)")        \
  OP(rerank, Rerank,                                                                                     \
     "(Tensor ids, Tensor logprobs, Tensor parents, Tensor children, Tensor slopes, Tensor rest) -> "    \
     "Tensor")                                                                                           \
  OP(choose_tokens, ChooseTokens,                                                                        \
     "(Tensor logits, Tensor positions, int seed, float temperature, int top_k, float top_p, Tensor? "   \
     "numbers=None) -> Tensor")                                                                          \
  OP(tree_attention, TreeAttention,                                                                      \
     "(Tensor q, Tensor keys, Tensor values, Tensor length, Tensor ancestors, float scale, int window, " \
     "float softcap=0.0, Tensor? sinks=None) -> Tensor")                                                 \
  OP(write_cache, WriteCache,                                                                            \
     "(Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values, Tensor length) -> ()")    \
  OP(verify_tree, VerifyTree,                                                                            \
     "(Tensor draft, Tensor target, Tensor parents, Tensor ancestors, int depth) -> (Tensor, Tensor)")   \
  OP(commit_cache, CommitCache, "(Tensor(a!) cache, Tensor(b!) length, Tensor path, Tensor accepted) -> ()")

// What has kernels for the CPU alone. There, what torch's own ops compute for a row or an element depends on
// how many there are: its matrix product is another one for a few rows, and the last elements of a thread's
// share go through other code than the rest.
#define CERBERUS_OPS_OF_THE_CPU(OP)                                                                  \
  OP(linear, Linear, "(Tensor input, Tensor weight, Tensor? bias, bool transposed=False) -> Tensor") \
  OP(grouped_linear, GroupedLinear,                                                                  \
     "(Tensor input, Tensor weight, Tensor? bias, Tensor chosen, bool transposed=False) -> Tensor")  \
  OP(activation, Activation, "(Tensor input, str kind) -> Tensor")

#define CERBERUS_OPS(OP)           \
  CERBERUS_OPS_OF_EVERY_DEVICE(OP) \
  CERBERUS_OPS_OF_THE_CPU(OP)
