// Registers what a step on a CPU does besides its forward, each in one call: settling which path was right,
// and drafting what follows, with weights in eight bits.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/cpu.h"
#include "cpu/team.h"

namespace cerberus {
namespace {

Parallel threads() { return team(torch::stable::get_num_threads()); }

int64_t eight_bit_bytes(int64_t rows, int64_t size) {
  Check check("eight_bit_bytes");
  constexpr int64_t kMost = int64_t{1} << 30;
  check.that(rows >= 0 && rows <= kMost, "rows", "0 to 2^30", rows);
  check.that(size >= 0 && size <= kMost, "size", "0 to 2^30", size);
  return eight_bit_bytes_cpu(rows, size);
}

void pack_eight_bits(Tensor weight, Tensor packed) {
  Check check("pack_eight_bits");
  check.floating(weight, "weight", 2, "(O, I)");
  check.on_cpu(weight, "weight");
  check.integer(packed, "packed", 1, "(n,)", ScalarType::Short);
  const int64_t count = eight_bit_bytes_cpu(weight.size(0), weight.size(1)) / 2;
  check.sizes(packed, "packed", "(n,)", {count});
  pack_eight_bits_cpu(
      {check.dtype(), weight.size(0), weight.size(1), weight.const_data_ptr(), packed.mutable_data_ptr()},
      threads());
}

void eight_bit_linear(Tensor input, Tensor weight, Tensor output) {
  Check check("eight_bit_linear");
  check.floating(input, "input", 2, "(M, I)");
  check.on_cpu(input, "input");
  check.floating(output, "output", 2, "(M, O)");
  check.sizes(output, "output", "(M, O)", {input.size(0), output.size(1)});
  check.integer(weight, "weight", 1, "(n,)", ScalarType::Short);
  check.sizes(weight, "weight", "(n,)", {eight_bit_bytes_cpu(output.size(1), input.size(1)) / 2});
  LinearArgs args{};
  args.dtype = check.dtype();
  args.rows = input.size(0);
  args.in_size = input.size(1);
  args.out_size = output.size(1);
  args.groups = 1;
  args.input = input.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.output = output.mutable_data_ptr();
  eight_bit_linear_cpu(args, threads());
}

// Memory of one call, a piece after the other.
class Pieces {
 public:
  template <typename T>
  T* take(int64_t count) {
    pieces_.emplace_back(new char[std::max<int64_t>(1, count * static_cast<int64_t>(sizeof(T)))]);
    return reinterpret_cast<T*>(pieces_.back().get());
  }

 private:
  std::vector<std::unique_ptr<char[]>> pieces_;
};

// Memory of one text that settling reads and writes.
struct Settled {
  int64_t first, nodes;  // of its nodes, and how many
  CommitCacheArgs cache;
  const int64_t* ancestors;
  void* state;
  int64_t* pending;
};

int64_t* integers(const Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); }

void settle(Tensor draft, Tensor target, Tensor parents, std::vector<Tensor> ancestors,
            std::vector<Tensor> cache, std::vector<Tensor> length, Tensor hidden, std::vector<Tensor> state,
            std::vector<Tensor> pending, Tensor path) {
  Check check("settle"), states("settle");  // hidden states have a dtype of their own
  check.integer(draft, "draft", 1, "(N,)", ScalarType::Long);
  check.on_cpu(draft, "draft");
  const int64_t nodes = draft.size(0);
  check.integer(target, "target", 1, "(N,)", ScalarType::Long);
  check.sizes(target, "target", "(N,)", {nodes});
  check.integer(parents, "parents", 1, "(N,)", ScalarType::Long);
  check.sizes(parents, "parents", "(N,)", {nodes});
  states.floating(hidden, "hidden", 2, "(N, D)");
  states.on_cpu(hidden, "hidden");
  states.sizes(hidden, "hidden", "(N, D)", {nodes, hidden.size(1)});
  check.integer(path, "path", 1, "(N,)", ScalarType::Long);
  check.sizes(path, "path", "(N,)", {nodes});
  const size_t count = ancestors.size();
  const std::pair<const char*, const std::vector<Tensor>*> lists[] = {
      {"cache", &cache}, {"length", &length}, {"state", &state}, {"pending", &pending}};
  for (const auto& [argument, list] : lists)
    check.that(list->size() == count, argument, "a tensor for each of ancestors, " + std::to_string(count),
               list->size());
  std::vector<Settled> texts;
  int64_t first = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t own = check.nodes_of_text(ancestors[i], nodes - first, "nodes");
    check.floating(cache[i], "cache", 5, "(C, 1, Hkv, S, E)");
    check.sizes(cache[i], "cache", "(C, 1, Hkv, S, E)", {cache[i].size(0), 1});
    check.integer(length[i], "length", 1, "(1,)", ScalarType::Long);
    check.sizes(length[i], "length", "(1,)", {1});
    states.floating(state[i], "state", 2, "(1, D)");
    states.sizes(state[i], "state", "(1, D)", {1, hidden.size(1)});
    check.integer(pending[i], "pending", 1, "(1,)", ScalarType::Long);
    check.sizes(pending[i], "pending", "(1,)", {1});
    const CommitCacheArgs commit{check.element_bytes(), cache[i].size(0), 1,      cache[i].size(2),
                                 cache[i].size(3),      cache[i].size(4), own,    cache[i].mutable_data_ptr(),
                                 integers(length[i]),   nullptr,          nullptr};
    texts.push_back(
        {first, own, commit, integers(ancestors[i]), state[i].mutable_data_ptr(), integers(pending[i])});
    first += own;
  }
  check.that(first == nodes, "ancestors", "of " + std::to_string(nodes) + " nodes in all, like draft", first);
  const int64_t bytes = hidden.size(1) * states.element_bytes();
  const auto* hidden_states = static_cast<const char*>(hidden.const_data_ptr());
  const Parallel alone{nullptr, 1};  // less than it takes to wake a thread
  std::vector<int32_t> right;        // the path of a text
  for (Settled& text : texts) {
    right.resize(text.nodes);
    int32_t accepted = 0;
    const int64_t* chosen = integers(target) + text.first;
    verify_tree_cpu({1, text.nodes, (text.nodes + 63) / 64, text.nodes - 1, integers(draft) + text.first,
                     chosen, integers(parents) + text.first, text.ancestors, right.data(), &accepted},
                    alone);
    text.cache.path = right.data();
    text.cache.accepted = &accepted;
    commit_cache_cpu(text.cache, alone);
    // Ancestors that are none of parents may leave the path shorter than it counts.
    const int64_t last = std::max(0, right[accepted]);
    std::memcpy(text.state, hidden_states + (text.first + last) * bytes, bytes);
    *text.pending = chosen[last];
    std::copy(right.begin(), right.end(), integers(path) + text.first);
  }
}

HeadStackArgs stack_args(Check& check, const Tensor& hidden, const Tensor& stack, const Tensor& bias) {
  check.floating(hidden, "hidden", 2, "(B, D)");
  check.on_cpu(hidden, "hidden");
  check.not_empty(hidden, "hidden", "(B, D)", 1, "D");
  check.floating(bias, "bias", 3, "(L, K, D)");
  const int64_t size = hidden.size(1), layers = bias.size(0), heads = bias.size(1);
  check.sizes(bias, "bias", "(L, K, D)", {layers, heads, size});
  check.not_empty(bias, "bias", "(L, K, D)", 0, "L");
  check.not_empty(bias, "bias", "(L, K, D)", 1, "K");
  check.integer(stack, "stack", 1, "(n,)", ScalarType::Short);
  const int64_t chained = layers * heads * eight_bit_bytes_cpu(size, 2 * size) / 2;
  if (stack.size(0) != chained)
    check.sizes(stack, "stack", "(n,)", {layers * heads * eight_bit_bytes_cpu(size, size) / 2});
  HeadStackArgs args{};
  args.dtype = check.dtype();
  args.rows = hidden.size(0);
  args.heads = heads;
  args.layers = layers;
  args.size = size;
  args.chained = stack.size(0) == chained;
  args.hidden = args.anchor = hidden.const_data_ptr();
  args.weight = stack.const_data_ptr();
  args.bias = bias.const_data_ptr();
  args.eight_bits = true;
  return args;
}

DraftTopkArgs topk_args(Check& check, const HeadStackArgs& stack, const Tensor& projection, int64_t vocab,
                        const Tensor& ids, const Tensor& logprobs) {
  check.that(vocab >= 1 && vocab <= std::numeric_limits<int32_t>::max(), "vocab", "1 to 2^31 - 1", vocab);
  check.integer(projection, "projection", 1, "(n,)", ScalarType::Short);
  check.sizes(projection, "projection", "(n,)", {eight_bit_bytes_cpu(vocab, stack.size) / 2});
  check.integer(ids, "ids", 3, "(B, K, P)", ScalarType::Long);
  const int64_t drafts = ids.size(2);
  check.that(drafts >= 1 && drafts <= std::min<int64_t>(32, vocab), "ids",
             "(B, K, P) with P from 1 to 32, Vd", drafts);
  check.sizes(ids, "ids", "(B, K, P)", {stack.rows, stack.heads, drafts});
  check.integer(logprobs, "logprobs", 3, "(B, K, P)", ScalarType::Float);
  check.sizes(logprobs, "logprobs", "(B, K, P)", {stack.rows, stack.heads, drafts});
  DraftTopkArgs args{};
  args.dtype = stack.dtype;
  args.rows = stack.rows * stack.heads;
  args.size = stack.size;
  args.vocab = vocab;
  args.drafts = drafts;
  args.projection = projection.const_data_ptr();
  args.parts = draft_topk_parts_cpu(vocab);
  args.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  args.logprobs = static_cast<float*>(logprobs.mutable_data_ptr());
  args.eight_bits = true;
  return args;
}

void draft(Tensor hidden, Tensor pending, Tensor embeddings, std::optional<Tensor> anchor_scale, Tensor stack,
           Tensor bias, Tensor projection, int64_t vocab, std::optional<Tensor> vocabulary, Tensor ids,
           Tensor logprobs) {
  Check check("draft");
  DraftArgs args{};
  args.stack = stack_args(check, hidden, stack, bias);
  args.topk = topk_args(check, args.stack, projection, vocab, ids, logprobs);
  HeadStackArgs& heads = args.stack;
  DraftTopkArgs& topk = args.topk;
  check.integer(pending, "pending", 1, "(B,)", ScalarType::Long);
  check.sizes(pending, "pending", "(B,)", {heads.rows});
  args.pending = static_cast<const int64_t*>(pending.const_data_ptr());
  if (vocabulary) {
    check.integer(*vocabulary, "vocabulary", 1, "(Vd,)", ScalarType::Long);
    check.sizes(*vocabulary, "vocabulary", "(Vd,)", {vocab});
    args.vocabulary = static_cast<const int64_t*>(vocabulary->const_data_ptr());
  }
  const int64_t element = check.element_bytes();
  Pieces pieces;
  if (anchor_scale) {
    check.floating(*anchor_scale, "anchor_scale", 0, "()");
    check.floating(embeddings, "embeddings", 2, "(V, D)");
    check.not_empty(embeddings, "embeddings", "(V, D)", 0, "V");
    check.sizes(embeddings, "embeddings", "(V, D)", {embeddings.size(0), heads.size});
    args.anchor_scale = anchor_scale->const_data_ptr();
    args.embeddings = embeddings.const_data_ptr();
    args.tokens = embeddings.size(0);
    heads.anchor = pieces.take<char>(heads.rows * heads.size * element);
  }
  heads.scratch = pieces.take<char>(2 * topk.rows * heads.size * element);
  topk.states = heads.states = pieces.take<char>(topk.rows * heads.size * element);
  topk.part_max = pieces.take<float>(topk.rows * topk.parts);
  topk.part_sum = pieces.take<float>(topk.rows * topk.parts);
  topk.part_logits = pieces.take<float>(topk.rows * topk.parts * topk.drafts);
  topk.part_ids = pieces.take<int32_t>(topk.rows * topk.parts * topk.drafts);
  draft_cpu(args, threads());
}

}  // namespace
}  // namespace cerberus

STABLE_TORCH_LIBRARY_FRAGMENT(cerberus_ext, m) {
  m.def(
      "settle(Tensor draft, Tensor target, Tensor parents, Tensor[] ancestors, Tensor(a!)[] cache, "
      "Tensor(b!)[] length, Tensor hidden, Tensor(c!)[] state, Tensor(d!)[] pending, Tensor(e!) path) -> ()");
  m.def("eight_bit_bytes(int rows, int size) -> int");
  m.def("pack_eight_bits(Tensor weight, Tensor(a!) packed) -> ()");
  m.def("eight_bit_linear(Tensor input, Tensor weight, Tensor(a!) output) -> ()");
  m.def(
      "draft(Tensor hidden, Tensor pending, Tensor embeddings, Tensor? anchor_scale, Tensor stack, Tensor "
      "bias, Tensor projection, int vocab, Tensor? vocabulary, Tensor(a!) ids, Tensor(b!) logprobs) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, CompositeExplicitAutograd, m) {
  m.impl("settle", TORCH_BOX(&cerberus::settle));
  m.impl("eight_bit_bytes", TORCH_BOX(&cerberus::eight_bit_bytes));
  m.impl("pack_eight_bits", TORCH_BOX(&cerberus::pack_eight_bits));
  m.impl("eight_bit_linear", TORCH_BOX(&cerberus::eight_bit_linear));
  m.impl("draft", TORCH_BOX(&cerberus::draft));
}
