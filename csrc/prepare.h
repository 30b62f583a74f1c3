// check -> allocate -> fill args, once for both devices.
//
// Each prepare_<op> checks shapes, dtypes, devices and contiguity (never values), allocates the outputs and
// the scratch on the inputs' device, and fills the struct that the kernels take. A failed check throws
// std::runtime_error with
// "<op>: <argument> must be <what>, got <what it is>".
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "args.h"
#include "text.h"

namespace cerberus {

using torch::stable::Tensor;

// Into how many pieces a device splits a call: DraftTopkArgs::parts and TreeAttentionArgs::splits.
struct Splits {
  int64_t (*draft_topk)(int64_t vocab);
  int64_t (*tree_attention)(int64_t capacity);
};

// The prepared call: `args` points into the tensors, which keep the memory alive; what the op returns.
struct HiddenEntropyCall {
  HiddenEntropyArgs args;
  Tensor entropy;
  Tensor result() const { return entropy; }
};
struct HeadStackCall {
  HeadStackArgs args;
  Tensor scratch, states;
  Tensor result() const { return states; }
};
struct DraftTopkCall {
  DraftTopkArgs args;
  Tensor scratch_floats, scratch_ids;
  Tensor ids, logprobs;
  std::tuple<Tensor, Tensor> result() const { return {ids, logprobs}; }
};
struct RerankCall {
  RerankArgs args;
  Tensor conditional;
  Tensor result() const { return conditional; }
};
struct ChooseTokensCall {
  ChooseTokensArgs args;
  Tensor tokens;
  Tensor result() const { return tokens; }
};
struct TreeAttentionCall {
  TreeAttentionArgs args;
  std::optional<Tensor> scratch;
  Tensor output;
  Tensor result() const { return output; }
};
struct WriteCacheCall {
  WriteCacheArgs args;
  void result() const {}
};
struct VerifyTreeCall {
  VerifyTreeArgs args;
  Tensor path, accepted;
  std::tuple<Tensor, Tensor> result() const { return {path, accepted}; }
};
struct CommitCacheCall {
  CommitCacheArgs args;
  void result() const {}
};
struct LinearCall {
  LinearArgs args;
  Tensor output;
  Tensor result() const { return output; }
};
struct GroupedLinearCall {
  GroupedLinearArgs args;
  Tensor output;
  Tensor result() const { return output; }
};
struct ActivationCall {
  ActivationArgs args;
  Tensor output;
  Tensor result() const { return output; }
};

HiddenEntropyCall prepare_hidden_entropy(const Tensor& hidden);
HeadStackCall prepare_head_stack(const Tensor& hidden, const Tensor& anchor, const Tensor& weight,
                                 const Tensor& bias);
DraftTopkCall prepare_draft_topk(const Splits& splits, const Tensor& states, const Tensor& projection,
                                 int64_t drafts);
RerankCall prepare_rerank(const Tensor& ids, const Tensor& logprobs, const Tensor& parents,
                          const Tensor& children, const Tensor& slopes, const Tensor& rest);
ChooseTokensCall prepare_choose_tokens(const Tensor& logits, const Tensor& positions, int64_t seed,
                                       double temperature, int64_t top_k, double top_p,
                                       const std::optional<Tensor>& numbers);
TreeAttentionCall prepare_tree_attention(const Splits& splits, const Tensor& q, const Tensor& keys,
                                         const Tensor& values, const Tensor& length, const Tensor& ancestors,
                                         double scale, int64_t window, double softcap,
                                         const std::optional<Tensor>& sinks);
WriteCacheCall prepare_write_cache(const Tensor& keys, const Tensor& values, const Tensor& new_keys,
                                   const Tensor& new_values, const Tensor& length);
VerifyTreeCall prepare_verify_tree(const Tensor& draft, const Tensor& target, const Tensor& parents,
                                   const Tensor& ancestors, int64_t depth);
CommitCacheCall prepare_commit_cache(const Tensor& cache, const Tensor& length, const Tensor& path,
                                     const Tensor& accepted);
LinearCall prepare_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                          bool transposed);
GroupedLinearCall prepare_grouped_linear(const Tensor& input, const Tensor& weight,
                                         const std::optional<Tensor>& bias, const Tensor& chosen,
                                         bool transposed);
ActivationCall prepare_activation(const Tensor& input, const Text& kind);

}  // namespace cerberus
