// The CPU implementation of every op: prepare, then the kernel on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <tuple>

#include "cpu/cpu.h"
#include "prepare.h"

namespace cerberus {
namespace {

// Each thread takes the next task when it is done with one: torch's own parallel_for deals them out
// beforehand, and waits for the slowest thread where another program has taken a core.
void run_on_torch_threads(int64_t tasks, Parallel::Body body, const void* state) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(
      0, std::min<int64_t>(tasks, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(state, task);
      });
}

Parallel torch_threads() { return {run_on_torch_threads, torch::stable::get_num_threads()}; }

Tensor hidden_entropy(const Tensor& hidden) {
  const HiddenEntropyCall call = prepare_hidden_entropy(hidden);
  hidden_entropy_cpu(call.args, torch_threads());
  return call.entropy;
}

Tensor head_stack(const Tensor& hidden, const Tensor& anchor, const Tensor& weight, const Tensor& bias) {
  const HeadStackCall call = prepare_head_stack(hidden, anchor, weight, bias);
  head_stack_cpu(call.args, torch_threads());
  return call.states;
}

std::tuple<Tensor, Tensor> draft_topk(const Tensor& states, const Tensor& projection, int64_t guesses) {
  const int64_t vocab = projection.dim() > 0 ? projection.size(0) : 0;
  const DraftTopkCall call = prepare_draft_topk(states, projection, guesses, draft_topk_parts_cpu(vocab));
  draft_topk_cpu(call.args, torch_threads());
  return {call.ids, call.logprobs};
}

Tensor choose_tokens(const Tensor& logits, const Tensor& positions, int64_t seed, double temperature,
                     int64_t top_k, double top_p) {
  const ChooseTokensCall call = prepare_choose_tokens(logits, positions, seed, temperature, top_k, top_p);
  choose_tokens_cpu(call.args, torch_threads());
  return call.tokens;
}

Tensor tree_attention(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& length,
                      const Tensor& ancestors, double scale, int64_t window, double softcap,
                      const std::optional<Tensor>& sinks) {
  const TreeAttentionCall call =
      prepare_tree_attention(q, keys, values, length, ancestors, scale, window, softcap, sinks,
                             [](const TreeAttentionArgs&) { return 1; });
  tree_attention_cpu(call.args, torch_threads());
  return call.output;
}

void write_cache(const Tensor& keys, const Tensor& values, const Tensor& new_keys, const Tensor& new_values,
                 const Tensor& length) {
  write_cache_cpu(prepare_write_cache(keys, values, new_keys, new_values, length), torch_threads());
}

std::tuple<Tensor, Tensor> verify_tree(const Tensor& draft, const Tensor& target, const Tensor& parents,
                                       const Tensor& ancestors, int64_t depth) {
  const VerifyTreeCall call = prepare_verify_tree(draft, target, parents, ancestors, depth);
  verify_tree_cpu(call.args, torch_threads());
  return {call.path, call.accepted};
}

void commit_cache(const Tensor& cache, const Tensor& length, const Tensor& path, const Tensor& accepted) {
  commit_cache_cpu(prepare_commit_cache(cache, length, path, accepted), torch_threads());
}

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, bool transposed) {
  const LinearCall call = prepare_linear(input, weight, bias, transposed);
  linear_cpu(call.args, torch_threads());
  return call.output;
}

Tensor grouped_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      const Tensor& ends, bool transposed) {
  const LinearCall call = prepare_grouped_linear(input, weight, bias, ends, transposed);
  linear_cpu(call.args, torch_threads());
  return call.output;
}

Tensor activation(const Tensor& input, const std::string& kind) {
  const ActivationCall call = prepare_activation(input, kind);
  activation_cpu(call.args, torch_threads());
  return call.output;
}

}  // namespace
}  // namespace cerberus

STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, CPU, m) {
  m.impl("hidden_entropy", TORCH_BOX(&cerberus::hidden_entropy));
  m.impl("head_stack", TORCH_BOX(&cerberus::head_stack));
  m.impl("draft_topk", TORCH_BOX(&cerberus::draft_topk));
  m.impl("choose_tokens", TORCH_BOX(&cerberus::choose_tokens));
  m.impl("tree_attention", TORCH_BOX(&cerberus::tree_attention));
  m.impl("write_cache", TORCH_BOX(&cerberus::write_cache));
  m.impl("verify_tree", TORCH_BOX(&cerberus::verify_tree));
  m.impl("commit_cache", TORCH_BOX(&cerberus::commit_cache));
  m.impl("linear", TORCH_BOX(&cerberus::linear));
  m.impl("activation", TORCH_BOX(&cerberus::activation));
  m.impl("grouped_linear", TORCH_BOX(&cerberus::grouped_linear));
}

STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cerberus::cpu_isa));
}
