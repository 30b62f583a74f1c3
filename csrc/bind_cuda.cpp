// Registers the CUDA implementation of every op: prepare, then the kernel on torch's current stream of the
// tensors' device.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "bind.h"
#include "bind_device_step.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace cerberus {
namespace {

void check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) +
                           ": the kernel could not be launched: " + cudaGetErrorString(error));
}

void check_at_most(const char* op, const char* argument, const char* what, int64_t limit, int64_t size) {
  if (size <= limit) return;
  throw std::runtime_error(std::string(op) + ": " + argument + " must have " + what +
                           " <= " + std::to_string(limit) + " on CUDA, got " + std::to_string(size));
}

// What the kernels are written for, see cuda/kernels.h; an op that is not named here takes every size.
void check_limits(const HeadStackArgs& a) {
  check_at_most("head_stack", "weight", "K * D", kMaxRowStates, a.heads * a.size);
}
void check_limits(const DraftTopkArgs& a) {
  check_at_most("draft_topk", "states", "D", kMaxRowStates, a.size);
}
void check_limits(const ChooseTokensArgs& a) {
  check_at_most("choose_tokens", "logits", "V", kMaxChosenVocab, a.vocab);
}
void check_limits(const TreeAttentionArgs& a) {
  check_at_most("tree_attention", "q", "E", kMaxHeadSize, a.head_size);
}
void check_limits(const VerifyTreeArgs& a) {
  check_at_most("verify_tree", "draft", "N", kMaxVerifyNodes, a.nodes);
}
template <typename Args>
void check_limits(const Args&) {}

// Of the current device.
int64_t multiprocessors(const char* op) {
  DeviceLimits limits = {};
  check_cuda(op, device_limits(limits));
  return limits.multiprocessors;
}

// The device of a call's tensors, which is the current one for as long as this lives.
class Cuda {
 public:
  static constexpr const char* kName = "cuda";
  static bool is_mine(const Tensor& tensor) { return device_type(tensor) == aoti_torch_device_type_cuda(); }

  explicit Cuda(const Tensor& first) : index_(first.get_device_index()), guard_(index_) {}

  static constexpr Splits kSplits = {[](int64_t) { return draft_topk_parts(multiprocessors("draft_topk")); },
                                     tree_attention_splits};

  template <typename Args>
  void run(const char* op, cudaError_t (*kernel)(const Args&, cudaStream_t), const Args& args) const {
    check_limits(args);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    check_cuda(op, kernel(args, static_cast<cudaStream_t>(stream)));
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace
}  // namespace cerberus

STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, CUDA, m) {
#define REGISTER(name, Name, schema) \
  cerberus::register_op<cerberus::op::name, cerberus::Cuda, cerberus::name##_cuda>(m);
  CERBERUS_OPS_OF_EVERY_DEVICE(REGISTER)
#undef REGISTER
}

STABLE_TORCH_LIBRARY_FRAGMENT(cerberus_ext, m) { cerberus::define_device_steps(m); }

STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, CompositeExplicitAutograd, m) {
  cerberus::register_device_steps<cerberus::Cuda>(m);
}
