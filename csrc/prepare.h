// check -> allocate -> fill args, once for both devices.
//
// Each prepare_<op> checks shapes, dtypes, devices and contiguity (never values), allocates the outputs and
// the scratch on the inputs' device, and fills the struct that the kernels take. A failed check throws
// std::runtime_error with
// "<op>: <argument> must be <what>, got <what it is>".
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <optional>
#include <string>

#include "args.h"

namespace cerberus {

using torch::stable::Tensor;

// The prepared call: `args` points into the tensors, which keep the memory alive.
struct HiddenEntropyCall {
  HiddenEntropyArgs args;
  Tensor entropy;
};
struct HeadStackCall {
  HeadStackArgs args;
  Tensor scratch, states;
};
struct DraftTopkCall {
  DraftTopkArgs args;
  Tensor scratch_floats, scratch_ids;
  Tensor ids, logprobs;
};
struct ChooseTokensCall {
  ChooseTokensArgs args;
  Tensor tokens;
};
struct TreeAttentionCall {
  TreeAttentionArgs args;
  std::optional<Tensor> scratch;
  Tensor output;
};
struct VerifyTreeCall {
  VerifyTreeArgs args;
  Tensor path, accepted;
};
struct ActivationCall {
  ActivationArgs args;
  Tensor output;
};
struct LinearCall {
  LinearArgs args;
  Tensor output;
};

HiddenEntropyCall prepare_hidden_entropy(const Tensor& hidden);
HeadStackCall prepare_head_stack(const Tensor& hidden, const Tensor& anchor, const Tensor& weight,
                                 const Tensor& bias);
// parts: into how many pieces the device splits a vocabulary of that size.
DraftTopkCall prepare_draft_topk(const Tensor& states, const Tensor& projection, int64_t drafts,
                                 const std::function<int64_t(int64_t vocab)>& parts);
ChooseTokensCall prepare_choose_tokens(const Tensor& logits, const Tensor& positions, int64_t seed,
                                       double temperature, int64_t top_k, double top_p);
// splits: into how many pieces the device splits the slots of such a call, by the sizes in the arguments.
TreeAttentionCall prepare_tree_attention(const Tensor& q, const Tensor& keys, const Tensor& values,
                                         const Tensor& length, const Tensor& ancestors, double scale,
                                         int64_t window, double softcap, const std::optional<Tensor>& sinks,
                                         const std::function<int64_t(const TreeAttentionArgs&)>& splits);
WriteCacheArgs prepare_write_cache(const Tensor& keys, const Tensor& values, const Tensor& new_keys,
                                   const Tensor& new_values, const Tensor& length);
VerifyTreeCall prepare_verify_tree(const Tensor& draft, const Tensor& target, const Tensor& parents,
                                   const Tensor& ancestors, int64_t depth);
CommitCacheArgs prepare_commit_cache(const Tensor& cache, const Tensor& length, const Tensor& path,
                                     const Tensor& accepted);
ActivationCall prepare_activation(const Tensor& input, const std::string& kind);
LinearCall prepare_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                          bool transposed);
LinearCall prepare_grouped_linear(const Tensor& input, const Tensor& weight,
                                  const std::optional<Tensor>& bias, const Tensor& ends, bool transposed);

}  // namespace cerberus
