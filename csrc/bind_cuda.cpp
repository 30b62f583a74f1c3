// The CUDA implementation of every op: prepare, then the kernel on torch's current stream of the tensors'
// device.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "prepare.h"

namespace cerberus {
namespace {

// The device of a call's tensors made the current one, for as long as this lives, and torch's current stream
// on it.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  int32_t index() const { return index_; }
  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) +
                           ": the kernel could not be launched: " + cudaGetErrorString(error));
}

void check_at_most(const char* op, const char* argument, const char* what, int64_t limit, int64_t size) {
  if (size <= limit) return;
  throw std::runtime_error(std::string(op) + ": " + argument + " must have " + what +
                           " <= " + std::to_string(limit) + " on CUDA, got " + std::to_string(size));
}

// Of the current device.
int64_t multiprocessors(const char* op) {
  DeviceLimits limits = {};
  check_launch(op, device_limits(limits));
  return limits.multiprocessors;
}

Tensor hidden_entropy(const Tensor& hidden) {
  const OnDevice device(hidden);
  const HiddenEntropyCall call = prepare_hidden_entropy(hidden);
  check_launch("hidden_entropy", hidden_entropy_cuda(call.args, device.stream()));
  return call.entropy;
}

Tensor head_stack(const Tensor& hidden, const Tensor& anchor, const Tensor& weight, const Tensor& bias) {
  const OnDevice device(hidden);
  const HeadStackCall call = prepare_head_stack(hidden, anchor, weight, bias);
  check_at_most("head_stack", "weight", "K * D", kMaxRowStates, call.args.heads * call.args.size);
  check_launch("head_stack", head_stack_cuda(call.args, device.stream()));
  return call.states;
}

std::tuple<Tensor, Tensor> draft_topk(const Tensor& states, const Tensor& projection, int64_t drafts) {
  const OnDevice device(states);
  const DraftTopkCall call = prepare_draft_topk(
      states, projection, drafts, [](int64_t) { return draft_topk_parts(multiprocessors("draft_topk")); });
  check_at_most("draft_topk", "states", "D", kMaxRowStates, call.args.size);
  check_launch("draft_topk", draft_topk_cuda(call.args, device.stream()));
  return {call.ids, call.logprobs};
}

Tensor choose_tokens(const Tensor& logits, const Tensor& positions, int64_t seed, double temperature,
                     int64_t top_k, double top_p) {
  const OnDevice device(logits);
  const ChooseTokensCall call = prepare_choose_tokens(logits, positions, seed, temperature, top_k, top_p);
  check_at_most("choose_tokens", "logits", "V", kMaxChosenVocab, call.args.vocab);
  check_launch("choose_tokens", choose_tokens_cuda(call.args, device.stream()));
  return call.tokens;
}

Tensor tree_attention(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& length,
                      const Tensor& ancestors, double scale, int64_t window, double softcap,
                      const std::optional<Tensor>& sinks) {
  const OnDevice device(q);
  const TreeAttentionCall call = prepare_tree_attention(
      q, keys, values, length, ancestors, scale, window, softcap, sinks, [](const TreeAttentionArgs& args) {
        return tree_attention_splits(args, multiprocessors("tree_attention"));
      });
  check_at_most("tree_attention", "q", "E", kMaxHeadSize, call.args.head_size);
  check_launch("tree_attention", tree_attention_cuda(call.args, device.stream()));
  return call.output;
}

void write_cache(const Tensor& keys, const Tensor& values, const Tensor& new_keys, const Tensor& new_values,
                 const Tensor& length) {
  const OnDevice device(keys);
  const WriteCacheArgs args = prepare_write_cache(keys, values, new_keys, new_values, length);
  check_launch("write_cache", write_cache_cuda(args, device.stream()));
}

std::tuple<Tensor, Tensor> verify_tree(const Tensor& draft, const Tensor& target, const Tensor& parents,
                                       const Tensor& ancestors, int64_t depth) {
  const OnDevice device(draft);
  const VerifyTreeCall call = prepare_verify_tree(draft, target, parents, ancestors, depth);
  check_at_most("verify_tree", "draft", "N", kMaxVerifyNodes, call.args.nodes);
  check_launch("verify_tree", verify_tree_cuda(call.args, device.stream()));
  return {call.path, call.accepted};
}

void commit_cache(const Tensor& cache, const Tensor& length, const Tensor& path, const Tensor& accepted) {
  const OnDevice device(cache);
  const CommitCacheArgs args = prepare_commit_cache(cache, length, path, accepted);
  check_launch("commit_cache", commit_cache_cuda(args, device.stream()));
}

}  // namespace
}  // namespace cerberus

STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, CUDA, m) {
  m.impl("hidden_entropy", TORCH_BOX(&cerberus::hidden_entropy));
  m.impl("head_stack", TORCH_BOX(&cerberus::head_stack));
  m.impl("draft_topk", TORCH_BOX(&cerberus::draft_topk));
  m.impl("choose_tokens", TORCH_BOX(&cerberus::choose_tokens));
  m.impl("tree_attention", TORCH_BOX(&cerberus::tree_attention));
  m.impl("write_cache", TORCH_BOX(&cerberus::write_cache));
  m.impl("verify_tree", TORCH_BOX(&cerberus::verify_tree));
  m.impl("commit_cache", TORCH_BOX(&cerberus::commit_cache));
}
