// The CPU implementation of every op: prepare, then the kernel on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/cpu.h"
#include "prepare.h"

namespace cerberus {
namespace {

// Every thread has consecutive tasks of its own, since a task asks memory for what the next one reads; when
// they are done, it takes the others'. torch's own parallel_for waits for the slowest thread where another
// program has taken a core.
void run_on_torch_threads(int64_t tasks, Parallel::Body body, const void* state) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next = tasks * i / threads;
    shares[i].end = tasks * (i + 1) / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares[(first + i) % threads];
      for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
        body(state, task);
    }
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
  const DraftTopkCall call = prepare_draft_topk(states, projection, guesses, draft_topk_parts_cpu);
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
  // Without outputs there may be any number of rows.
  if (call.args.out_size > 0) linear_cpu(call.args, torch_threads());
  return call.output;
}

Tensor grouped_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      const Tensor& ends, bool transposed) {
  const LinearCall call = prepare_grouped_linear(input, weight, bias, ends, transposed);
  if (call.args.out_size > 0) linear_cpu(call.args, torch_threads());
  return call.output;
}

Tensor activation(const Tensor& input, const std::string& kind) {
  const ActivationCall call = prepare_activation(input, kind);
  activation_cpu(call.args, torch_threads());
  return call.output;
}

bool is_view(const char* question, const Tensor& tensor) {
  StableIValue stack[1] = {torch::stable::detail::from(tensor)};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_call_dispatcher(question, "", stack));
  return torch::stable::detail::to<bool>(stack[0]);
}

// A view that stands for the negated or conjugated numbers in its memory. torch gives the other ops a copy of
// it, and cannot do so where an op changes its arguments.
void refuse_lazy(const char* op, std::initializer_list<std::pair<const char*, const Tensor*>> arguments) {
  for (const auto& [name, tensor] : arguments) {
    if (is_view("aten::is_neg", *tensor))
      Check(op).fail(name, "a plain tensor", "a negated view: call resolve_neg() before");
    if (is_view("aten::is_conj", *tensor))
      Check(op).fail(name, "a plain tensor", "a conjugated view: call resolve_conj() before");
  }
  throw std::runtime_error(std::string(op) + ": no argument may be a negated or conjugated view");
}

void write_cache_lazy(const Tensor& keys, const Tensor& values, const Tensor& new_keys,
                      const Tensor& new_values, const Tensor& length) {
  refuse_lazy("write_cache", {{"keys", &keys},
                              {"values", &values},
                              {"new_keys", &new_keys},
                              {"new_values", &new_values},
                              {"length", &length}});
}

void commit_cache_lazy(const Tensor& cache, const Tensor& length, const Tensor& path,
                       const Tensor& accepted) {
  refuse_lazy("commit_cache",
              {{"cache", &cache}, {"length", &length}, {"path", &path}, {"accepted", &accepted}});
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("hidden_entropy", TORCH_BOX(&hidden_entropy));
  m.impl("head_stack", TORCH_BOX(&head_stack));
  m.impl("draft_topk", TORCH_BOX(&draft_topk));
  m.impl("choose_tokens", TORCH_BOX(&choose_tokens));
  m.impl("tree_attention", TORCH_BOX(&tree_attention));
  m.impl("write_cache", TORCH_BOX(&write_cache));
  m.impl("verify_tree", TORCH_BOX(&verify_tree));
  m.impl("commit_cache", TORCH_BOX(&commit_cache));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("activation", TORCH_BOX(&activation));
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
}

// Where an op has no kernels: on another device, on CUDA without _cuda.so, and where every tensor is None.
// Refused by the first argument.
struct OpWithoutKernel {
  const char *op, *first_argument;
};
constexpr OpWithoutKernel kOps[] = {
    {"hidden_entropy", "hidden"}, {"head_stack", "hidden"},   {"draft_topk", "states"},
    {"choose_tokens", "logits"},  {"tree_attention", "q"},    {"write_cache", "keys"},
    {"verify_tree", "draft"},     {"commit_cache", "cache"},  {"linear", "input"},
    {"activation", "input"},      {"grouped_linear", "input"}};

[[noreturn]] void refuse(const OpWithoutKernel& op, const Tensor& first) {
  if (!first.defined()) Check(op.op).fail(op.first_argument, "a tensor", "None");
  Check(op.op).fail(op.first_argument, "on a device that the op has kernels for", device_text(first));
}

template <typename Function>
struct Refusal;
template <typename Result, typename... Others>
struct Refusal<Result(const Tensor&, Others...)> {
  template <int kOp>
  static Result call(const Tensor& first, Others...) {
    refuse(kOps[kOp], first);
  }
};

template <int kOp, typename Function>
void register_refusal(torch::stable::detail::StableLibrary& m, Function*) {
  m.impl(kOps[kOp].op, TORCH_BOX(&Refusal<Function>::template call<kOp>));
}

void register_refusals(torch::stable::detail::StableLibrary& m) {
  register_refusal<0>(m, hidden_entropy);
  register_refusal<1>(m, head_stack);
  register_refusal<2>(m, draft_topk);
  register_refusal<3>(m, choose_tokens);
  register_refusal<4>(m, tree_attention);
  register_refusal<5>(m, write_cache);
  register_refusal<6>(m, verify_tree);
  register_refusal<7>(m, commit_cache);
  register_refusal<8>(m, linear);
  register_refusal<9>(m, activation);
  register_refusal<10>(m, grouped_linear);
}

}  // namespace
}  // namespace cerberus

STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, CPU, m) { cerberus::register_ops(m); }

// Tensors that no op takes: torch sends them here instead of refusing them itself, without naming an
// argument.
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, SparseCPU, m) { cerberus::register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, SparseCsrCPU, m) { cerberus::register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, MkldnnCPU, m) { cerberus::register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, QuantizedCPU, m) { cerberus::register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, NestedTensorCPU, m) { cerberus::register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, AutogradNestedTensor, m) { cerberus::register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, Negative, m) {
  m.impl("write_cache", TORCH_BOX(&cerberus::write_cache_lazy));
  m.impl("commit_cache", TORCH_BOX(&cerberus::commit_cache_lazy));
}
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, Conjugate, m) {
  m.impl("write_cache", TORCH_BOX(&cerberus::write_cache_lazy));
  m.impl("commit_cache", TORCH_BOX(&cerberus::commit_cache_lazy));
}

STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cerberus::cpu_isa));
  cerberus::register_refusals(m);
}
