// Every schema of the library, in one place. bind_cpu.cpp and bind_cuda.cpp register the implementations,
// cerberus_ext/ops.py the documentation and the fake implementations.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cerberus_ext, m) {
  m.def("hidden_entropy(Tensor hidden) -> Tensor");
  m.def("head_stack(Tensor hidden, Tensor anchor, Tensor weight, Tensor bias) -> Tensor");
  m.def("draft_topk(Tensor states, Tensor projection, int drafts) -> (Tensor, Tensor)");
  m.def(
      "choose_tokens(Tensor logits, Tensor positions, int seed, float temperature, int top_k, float top_p) "
      "-> Tensor");
  m.def(
      "tree_attention(Tensor q, Tensor keys, Tensor values, Tensor length, Tensor ancestors, float scale, "
      "int window, float softcap=0.0, Tensor? sinks=None) -> Tensor");
  m.def(
      "write_cache(Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values, Tensor length) -> "
      "()");
  m.def(
      "verify_tree(Tensor draft, Tensor target, Tensor parents, Tensor ancestors, int depth) -> (Tensor, "
      "Tensor)");
  m.def("commit_cache(Tensor(a!) cache, Tensor(b!) length, Tensor path, Tensor accepted) -> ()");
  // CPU only: where torch's own matrix product is fast and row-invariant, it is used instead.
  m.def("linear(Tensor input, Tensor weight, Tensor? bias, bool transposed=False) -> Tensor");
  m.def(
      "grouped_linear(Tensor input, Tensor weight, Tensor? bias, Tensor ends, bool transposed=False) -> "
      "Tensor");
  // CPU only: torch's own kernels compute the last elements of a thread's share by other code than the rest.
  m.def("activation(Tensor input, str kind) -> Tensor");
  // The level of the instruction set that the CPU kernels use: portable, avx2, avx512, avx512_bf16 or
  // amx_bf16.
  m.def("cpu_isa() -> str");
}
