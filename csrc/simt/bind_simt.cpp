// Every op with its CUDA kernel under emulation, on CPU tensors: torch.ops.cerberus_simt.<op>, with the
// schema that ops.cpp gives torch.ops.cerberus_ext.<op>: it is compiled here once more, under the other name.
// Then what a test sets: seed(int), device(multiprocessors, blocks_each).
#include <torch/csrc/stable/library.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/kernels.h"
#include "prepare.h"
#include "simt/emulator.h"

namespace cerberus {
namespace {

// The kernels of one call, run to their end.
template <typename Enqueue>
void run(const char* op, Enqueue enqueue) {
  static std::mutex one_call;
  const std::lock_guard<std::mutex> lock(one_call);
  try {
    if (const cudaError_t error = enqueue(nullptr); error != cudaSuccess)
      throw std::runtime_error(std::string(op) +
                               ": the kernel could not be launched: " + cudaGetErrorString(error));
    simt::synchronize();
  } catch (...) {
    simt::forget_launches();  // their arguments end with the call
    throw;
  }
}

Tensor hidden_entropy(const Tensor& hidden) {
  const HiddenEntropyCall call = prepare_hidden_entropy(hidden);
  run("hidden_entropy", [&](cudaStream_t stream) { return hidden_entropy_cuda(call.args, stream); });
  return call.entropy;
}

Tensor head_stack(const Tensor& hidden, const Tensor& anchor, const Tensor& weight, const Tensor& bias) {
  const HeadStackCall call = prepare_head_stack(hidden, anchor, weight, bias);
  run("head_stack", [&](cudaStream_t stream) { return head_stack_cuda(call.args, stream); });
  return call.states;
}

std::tuple<Tensor, Tensor> draft_topk(const Tensor& states, const Tensor& projection, int64_t drafts) {
  const DraftTopkCall call = prepare_draft_topk(
      states, projection, drafts, [](int64_t) { return draft_topk_parts(simt::device().multiprocessors); });
  run("draft_topk", [&](cudaStream_t stream) { return draft_topk_cuda(call.args, stream); });
  return {call.ids, call.logprobs};
}

Tensor choose_tokens(const Tensor& logits, const Tensor& positions, int64_t seed, double temperature,
                     int64_t top_k, double top_p) {
  const ChooseTokensCall call = prepare_choose_tokens(logits, positions, seed, temperature, top_k, top_p);
  run("choose_tokens", [&](cudaStream_t stream) { return choose_tokens_cuda(call.args, stream); });
  return call.tokens;
}

Tensor tree_attention(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& length,
                      const Tensor& ancestors, double scale, int64_t window, double softcap,
                      const std::optional<Tensor>& sinks) {
  const TreeAttentionCall call = prepare_tree_attention(
      q, keys, values, length, ancestors, scale, window, softcap, sinks, [](const TreeAttentionArgs& args) {
        return tree_attention_splits(args, simt::device().multiprocessors);
      });
  run("tree_attention", [&](cudaStream_t stream) { return tree_attention_cuda(call.args, stream); });
  return call.output;
}

void write_cache(const Tensor& keys, const Tensor& values, const Tensor& new_keys, const Tensor& new_values,
                 const Tensor& length) {
  const WriteCacheArgs args = prepare_write_cache(keys, values, new_keys, new_values, length);
  run("write_cache", [&](cudaStream_t stream) { return write_cache_cuda(args, stream); });
}

std::tuple<Tensor, Tensor> verify_tree(const Tensor& draft, const Tensor& target, const Tensor& parents,
                                       const Tensor& ancestors, int64_t depth) {
  const VerifyTreeCall call = prepare_verify_tree(draft, target, parents, ancestors, depth);
  run("verify_tree", [&](cudaStream_t stream) { return verify_tree_cuda(call.args, stream); });
  return {call.path, call.accepted};
}

void commit_cache(const Tensor& cache, const Tensor& length, const Tensor& path, const Tensor& accepted) {
  const CommitCacheArgs args = prepare_commit_cache(cache, length, path, accepted);
  run("commit_cache", [&](cudaStream_t stream) { return commit_cache_cuda(args, stream); });
}

void seed(int64_t seed) { simt::seed(static_cast<uint64_t>(seed)); }

void device(int64_t multiprocessors, int64_t blocks_each) {
  simt::set_device({static_cast<int>(multiprocessors), static_cast<int>(blocks_each)});
}

}  // namespace
}  // namespace cerberus

STABLE_TORCH_LIBRARY_IMPL(cerberus_simt, CPU, m) {
  m.impl("hidden_entropy", TORCH_BOX(&cerberus::hidden_entropy));
  m.impl("head_stack", TORCH_BOX(&cerberus::head_stack));
  m.impl("draft_topk", TORCH_BOX(&cerberus::draft_topk));
  m.impl("choose_tokens", TORCH_BOX(&cerberus::choose_tokens));
  m.impl("tree_attention", TORCH_BOX(&cerberus::tree_attention));
  m.impl("write_cache", TORCH_BOX(&cerberus::write_cache));
  m.impl("verify_tree", TORCH_BOX(&cerberus::verify_tree));
  m.impl("commit_cache", TORCH_BOX(&cerberus::commit_cache));
}

STABLE_TORCH_LIBRARY_FRAGMENT(cerberus_simt, m) {
  m.def("seed(int seed) -> ()");
  m.def("device(int multiprocessors, int blocks_each) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cerberus_simt, CompositeExplicitAutograd, m) {
  m.impl("seed", TORCH_BOX(&cerberus::seed));
  m.impl("device", TORCH_BOX(&cerberus::device));
}
