#include "prepare.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "check.h"

namespace cerberus {
namespace {

constexpr int64_t kMaxDrafts = 32;  // what the kernels keep in registers or on the stack per row

// An uninitialized contiguous tensor on the device of `like`. By the C function, not by
// torch::stable::new_empty, which looks the op up by its name at every call: three times slower, and a
// decoding step makes hundreds of these. `like` is the first argument of the call.
Tensor empty(const Check& check, const Tensor& like, const int64_t* sizes, size_t rank, ScalarType type) {
  int64_t strides[64];  // torch has no more axes
  uint64_t stride = 1;  // of a tensor without elements it may overflow
  for (size_t i = rank; i-- > 0;) {
    strides[i] = static_cast<int64_t>(stride);
    stride *= static_cast<uint64_t>(std::max<int64_t>(sizes[i], 1));
  }
  int32_t dtype = 0;
  switch (type) {
    case ScalarType::Float:
      dtype = aoti_torch_dtype_float32();
      break;
    case ScalarType::BFloat16:
      dtype = aoti_torch_dtype_bfloat16();
      break;
    case ScalarType::Half:
      dtype = aoti_torch_dtype_float16();
      break;
    case ScalarType::Int:
      dtype = aoti_torch_dtype_int32();
      break;
    default:
      dtype = aoti_torch_dtype_int64();
  }
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(rank), sizes, strides, dtype, device_type(like),
                               like.get_device_index(), &handle) != 0)
    check.fail(check.first_argument(),
               "so small that " + tuple_text(sizes, rank) + " elements fit into memory", shape_text(like));
  return Tensor(handle);
}

Tensor empty(const Check& check, const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return empty(check, like, sizes.begin(), sizes.size(), type);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

int64_t words_of(int64_t nodes) { return (nodes + 63) / 64; }

}  // namespace

HiddenEntropyCall prepare_hidden_entropy(const Tensor& hidden) {
  Check check("hidden_entropy");
  check.floating(hidden, "hidden", 2, "(B, D)");
  check.not_empty(hidden, "hidden", "(B, D)", 1, "D");

  const int64_t rows = hidden.size(0);
  HiddenEntropyCall call{{}, empty(check, hidden, {rows}, ScalarType::Float)};
  call.args = {check.dtype(), rows, hidden.size(1), hidden.const_data_ptr(),
               mutable_data<float>(call.entropy)};
  return call;
}

HeadStackCall prepare_head_stack(const Tensor& hidden, const Tensor& anchor, const Tensor& weight,
                                 const Tensor& bias) {
  Check check("head_stack");
  check.floating(hidden, "hidden", 2, "(B, D)");
  check.not_empty(hidden, "hidden", "(B, D)", 1, "D");
  const int64_t rows = hidden.size(0), size = hidden.size(1);
  check.floating(anchor, "anchor", 2, "(B, D)");
  check.sizes(anchor, "anchor", "(B, D)", {rows, size});
  const std::string shapes = "(L, K, D, 2D) or (L, K, D, D) with D = " + std::to_string(size);
  check.floating(weight, "weight", 4, shapes.c_str());
  const int64_t layers = weight.size(0), heads = weight.size(1), columns = weight.size(3);
  if (weight.size(2) != size || (columns != size && columns != 2 * size))
    check.fail("weight", shapes, shape_text(weight));
  check.not_empty(weight, "weight", shapes.c_str(), 0, "L");
  check.not_empty(weight, "weight", shapes.c_str(), 1, "K");
  check.floating(bias, "bias", 3, "(L, K, D)");
  check.sizes(bias, "bias", "(L, K, D)", {layers, heads, size});

  HeadStackCall call{{},
                     empty(check, hidden, {2, rows, heads, size}, check.scalar_type()),
                     empty(check, hidden, {rows, heads, size}, check.scalar_type())};
  HeadStackArgs& args = call.args;
  args.dtype = check.dtype();
  args.rows = rows;
  args.heads = heads;
  args.layers = layers;
  args.size = size;
  args.chained = columns == 2 * size;
  args.hidden = hidden.const_data_ptr();
  args.anchor = anchor.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.bias = bias.const_data_ptr();
  args.scratch = call.scratch.mutable_data_ptr();
  args.states = call.states.mutable_data_ptr();
  return call;
}

DraftTopkCall prepare_draft_topk(const Splits& splits, const Tensor& states, const Tensor& projection,
                                 int64_t drafts) {
  Check check("draft_topk");
  check.floating(states, "states", 3, "(B, K, D)");
  check.not_empty(states, "states", "(B, K, D)", 2, "D");
  const int64_t rows = states.size(0) * states.size(1), size = states.size(2);
  check.floating(projection, "projection", 2, "(Vd, D)");
  const int64_t vocab = projection.size(0);
  check.sizes(projection, "projection", "(Vd, D)", {vocab, size});
  check.that(drafts >= 1 && drafts <= kMaxDrafts, "drafts", "1 to " + std::to_string(kMaxDrafts), drafts);
  check.that(drafts <= vocab, "drafts", "at most Vd = " + std::to_string(vocab), drafts);
  if (vocab > std::numeric_limits<int32_t>::max())
    check.fail("projection", "(Vd, D) with Vd < 2^31", shape_text(projection));

  const int64_t parts = splits.draft_topk(vocab);
  DraftTopkCall call{{},
                     empty(check, states, {rows, parts, drafts + 2}, ScalarType::Float),
                     empty(check, states, {rows, parts, drafts}, ScalarType::Int),
                     empty(check, states, {states.size(0), states.size(1), drafts}, ScalarType::Long),
                     empty(check, states, {states.size(0), states.size(1), drafts}, ScalarType::Float)};
  DraftTopkArgs& args = call.args;
  args.dtype = check.dtype();
  args.rows = rows;
  args.size = size;
  args.vocab = vocab;
  args.drafts = drafts;
  args.states = states.const_data_ptr();
  args.projection = projection.const_data_ptr();
  args.parts = parts;
  args.part_max = mutable_data<float>(call.scratch_floats);
  args.part_sum = args.part_max + rows * parts;
  args.part_logits = args.part_sum + rows * parts;
  args.part_ids = mutable_data<int32_t>(call.scratch_ids);
  args.ids = mutable_data<int64_t>(call.ids);
  args.logprobs = mutable_data<float>(call.logprobs);
  return call;
}

RerankCall prepare_rerank(const Tensor& ids, const Tensor& logprobs, const Tensor& parents,
                          const Tensor& children, const Tensor& slopes, const Tensor& rest) {
  Check check("rerank");
  check.integer(ids, "ids", 3, "(B, K, P)", ScalarType::Long);
  check.not_empty(ids, "ids", "(B, K, P)", 1, "K");
  const int64_t rows = ids.size(0), heads = ids.size(1), drafts = ids.size(2);
  check.that(drafts >= 1 && drafts <= kMaxDrafts, "ids",
             "(B, K, P) with P from 1 to " + std::to_string(kMaxDrafts), drafts);
  check.integer(logprobs, "logprobs", 3, "(B, K, P)", ScalarType::Float);
  check.sizes(logprobs, "logprobs", "(B, K, P)", {rows, heads, drafts});
  check.floating(parents, "parents", 3, "(K - 1, Vd, r)");
  check.not_empty(parents, "parents", "(K - 1, Vd, r)", 2, "r");
  const int64_t vocab = parents.size(1), rank = parents.size(2);
  check.sizes(parents, "parents", "(K - 1, Vd, r)", {heads - 1, vocab, rank});
  check.floating(children, "children", 2, "(Vd, r)");
  check.sizes(children, "children", "(Vd, r)", {vocab, rank});
  check.integer(slopes, "slopes", 1, "(K - 1,)", ScalarType::Float);
  check.sizes(slopes, "slopes", "(K - 1,)", {heads - 1});
  check.integer(rest, "rest", 1, "(K - 1,)", ScalarType::Float);
  check.sizes(rest, "rest", "(K - 1,)", {heads - 1});

  RerankCall call{{}, empty(check, ids, {rows, heads - 1, drafts, drafts}, ScalarType::Float)};
  call.args = {check.dtype(),
               rows,
               heads,
               drafts,
               vocab,
               rank,
               data<int64_t>(ids),
               data<float>(logprobs),
               parents.const_data_ptr(),
               children.const_data_ptr(),
               data<float>(slopes),
               data<float>(rest),
               mutable_data<float>(call.conditional)};
  return call;
}

ChooseTokensCall prepare_choose_tokens(const Tensor& logits, const Tensor& positions, int64_t seed,
                                       double temperature, int64_t top_k, double top_p,
                                       const std::optional<Tensor>& numbers) {
  Check check("choose_tokens");
  check.floating(logits, "logits", 2, "(M, V)");
  check.not_empty(logits, "logits", "(M, V)", 1, "V");
  if (logits.size(1) > std::numeric_limits<int32_t>::max())
    check.fail("logits", "(M, V) with V < 2^31", shape_text(logits));
  const int64_t rows = logits.size(0);
  check.integer(positions, "positions", 1, "(M,)", ScalarType::Long);
  check.sizes(positions, "positions", "(M,)", {rows});
  check.that(std::isfinite(temperature) && temperature >= 0, "temperature", "finite and >= 0", temperature);
  check.that(top_k >= 0, "top_k", ">= 0", top_k);
  check.that(top_p > 0 && top_p <= 1, "top_p", "> 0 and <= 1", top_p);
  if (numbers) {
    check.integer(*numbers, "numbers", 1, "(3,)", ScalarType::Long);
    check.sizes(*numbers, "numbers", "(3,)", {3});
  }

  ChooseTokensCall call{{}, empty(check, logits, {rows}, ScalarType::Long)};
  call.args = {check.dtype(),
               rows,
               logits.size(1),
               logits.const_data_ptr(),
               data<int64_t>(positions),
               static_cast<uint64_t>(seed),
               static_cast<float>(temperature),
               top_k,
               static_cast<float>(top_p),
               numbers ? data<int64_t>(*numbers) : nullptr,
               mutable_data<int64_t>(call.tokens)};
  return call;
}

TreeAttentionCall prepare_tree_attention(const Splits& splits, const Tensor& q, const Tensor& keys,
                                         const Tensor& values, const Tensor& length, const Tensor& ancestors,
                                         double scale, int64_t window, double softcap,
                                         const std::optional<Tensor>& sinks) {
  Check check("tree_attention");
  check.floating(q, "q", 4, "(B, N, Hq, E)");
  check.not_empty(q, "q", "(B, N, Hq, E)", 3, "E");
  const int64_t rows = q.size(0), nodes = q.size(1), query_heads = q.size(2), head_size = q.size(3);
  check.floating(keys, "keys", 4, "(B, Hkv, S, E)");
  check.not_empty(keys, "keys", "(B, Hkv, S, E)", 1, "Hkv");
  const int64_t kv_heads = keys.size(1), capacity = keys.size(2);
  check.sizes(keys, "keys", "(B, Hkv, S, E)", {rows, kv_heads, capacity, head_size});
  check.floating(values, "values", 4, "(B, Hkv, S, E)");
  check.sizes(values, "values", "(B, Hkv, S, E)", {rows, kv_heads, capacity, head_size});
  if (query_heads % kv_heads != 0)
    check.fail("q", "(B, N, Hq, E) with Hq a multiple of Hkv = " + std::to_string(kv_heads), shape_text(q));
  check.integer(length, "length", 1, "(B,)", ScalarType::Long);
  check.sizes(length, "length", "(B,)", {rows});
  check.integer(ancestors, "ancestors", 2, "(N, W)", ScalarType::Long);
  check.sizes(ancestors, "ancestors", "(N, W) with W = ceil(N / 64)", {nodes, words_of(nodes)});
  check.that(std::isfinite(static_cast<float>(scale)), "scale", "finite in float32", scale);
  // In float32, too: a tiny one would become 0, which means none.
  check.that(std::isfinite(static_cast<float>(softcap)) && (softcap == 0 || static_cast<float>(softcap) > 0),
             "softcap", "finite and >= 0 in float32", softcap);
  if (sinks) {
    check.floating(*sinks, "sinks", 1, "(Hq,)");
    check.sizes(*sinks, "sinks", "(Hq,)", {query_heads});
  }

  TreeAttentionCall call{{}, {}, empty(check, q, {rows, nodes, query_heads, head_size}, check.scalar_type())};
  TreeAttentionArgs& args = call.args;
  args.dtype = check.dtype();
  args.rows = rows;
  args.nodes = nodes;
  args.query_heads = query_heads;
  args.kv_heads = kv_heads;
  args.head_size = head_size;
  args.capacity = capacity;
  args.words = words_of(nodes);
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.window = std::max<int64_t>(window, 0);
  args.query = q.const_data_ptr();
  args.keys = keys.const_data_ptr();
  args.values = values.const_data_ptr();
  args.length = data<int64_t>(length);
  args.ancestors = data<int64_t>(ancestors);
  args.sinks = sinks ? sinks->const_data_ptr() : nullptr;
  args.output = call.output.mutable_data_ptr();
  args.splits = splits.tree_attention(capacity);
  args.part_max = args.part_sum = args.part_output = nullptr;
  if (args.splits > 1) {
    const int64_t parts = rows * nodes * query_heads * args.splits;
    call.scratch = empty(check, q, {parts, head_size + 2}, ScalarType::Float);
    args.part_output = mutable_data<float>(*call.scratch);  // the first: its rows are read 16 bytes at a time
    args.part_max = args.part_output + parts * head_size;
    args.part_sum = args.part_max + parts;
  }
  return call;
}

WriteCacheCall prepare_write_cache(const Tensor& keys, const Tensor& values, const Tensor& new_keys,
                                   const Tensor& new_values, const Tensor& length) {
  Check check("write_cache");
  check.floating(keys, "keys", 4, "(B, Hkv, S, E)");
  const int64_t rows = keys.size(0), kv_heads = keys.size(1), capacity = keys.size(2),
                head_size = keys.size(3);
  check.floating(values, "values", 4, "(B, Hkv, S, E)");
  check.sizes(values, "values", "(B, Hkv, S, E)", {rows, kv_heads, capacity, head_size});
  check.floating(new_keys, "new_keys", 4, "(B, N, Hkv, E)");
  const int64_t nodes = new_keys.size(1);
  check.sizes(new_keys, "new_keys", "(B, N, Hkv, E)", {rows, nodes, kv_heads, head_size});
  check.floating(new_values, "new_values", 4, "(B, N, Hkv, E)");
  check.sizes(new_values, "new_values", "(B, N, Hkv, E)", {rows, nodes, kv_heads, head_size});
  check.integer(length, "length", 1, "(B,)", ScalarType::Long);
  check.sizes(length, "length", "(B,)", {rows});

  WriteCacheCall call;
  WriteCacheArgs& args = call.args;
  args.element_bytes = check.element_bytes();
  args.rows = rows;
  args.nodes = nodes;
  args.kv_heads = kv_heads;
  args.head_size = head_size;
  args.capacity = capacity;
  args.keys = keys.mutable_data_ptr();
  args.values = values.mutable_data_ptr();
  args.new_keys = new_keys.const_data_ptr();
  args.new_values = new_values.const_data_ptr();
  args.length = data<int64_t>(length);
  return call;
}

VerifyTreeCall prepare_verify_tree(const Tensor& draft, const Tensor& target, const Tensor& parents,
                                   const Tensor& ancestors, int64_t depth) {
  Check check("verify_tree");
  check.integer(draft, "draft", 2, "(B, N)", ScalarType::Long);
  check.not_empty(draft, "draft", "(B, N)", 1, "N");
  const int64_t rows = draft.size(0), nodes = draft.size(1);
  check.integer(target, "target", 2, "(B, N)", ScalarType::Long);
  check.sizes(target, "target", "(B, N)", {rows, nodes});
  check.integer(parents, "parents", 1, "(N,)", ScalarType::Long);
  check.sizes(parents, "parents", "(N,)", {nodes});
  check.integer(ancestors, "ancestors", 2, "(N, W)", ScalarType::Long);
  check.sizes(ancestors, "ancestors", "(N, W) with W = ceil(N / 64)", {nodes, words_of(nodes)});
  check.that(depth >= 0 && depth < nodes, "depth", "0 to N - 1 = " + std::to_string(nodes - 1), depth);

  VerifyTreeCall call{{},
                      empty(check, draft, {rows, depth + 1}, ScalarType::Int),
                      empty(check, draft, {rows}, ScalarType::Int)};
  call.args = {rows,
               nodes,
               words_of(nodes),
               depth,
               data<int64_t>(draft),
               data<int64_t>(target),
               data<int64_t>(parents),
               data<int64_t>(ancestors),
               mutable_data<int32_t>(call.path),
               mutable_data<int32_t>(call.accepted)};
  return call;
}

CommitCacheCall prepare_commit_cache(const Tensor& cache, const Tensor& length, const Tensor& path,
                                     const Tensor& accepted) {
  Check check("commit_cache");
  check.floating(cache, "cache", 5, "(C, B, Hkv, S, E)");
  const int64_t rows = cache.size(1);
  check.integer(length, "length", 1, "(B,)", ScalarType::Long);
  check.sizes(length, "length", "(B,)", {rows});
  check.integer(path, "path", 2, "(B, depth + 1)", ScalarType::Int);
  check.sizes(path, "path", "(B, depth + 1)", {rows, path.size(1)});
  check.not_empty(path, "path", "(B, depth + 1)", 1, "depth + 1");
  check.integer(accepted, "accepted", 1, "(B,)", ScalarType::Int);
  check.sizes(accepted, "accepted", "(B,)", {rows});

  CommitCacheCall call;
  CommitCacheArgs& args = call.args;
  args.element_bytes = check.element_bytes();
  args.planes = cache.size(0);
  args.rows = rows;
  args.kv_heads = cache.size(2);
  args.capacity = cache.size(3);
  args.head_size = cache.size(4);
  args.path_nodes = path.size(1);
  args.cache = cache.mutable_data_ptr();
  args.length = mutable_data<int64_t>(length);
  args.path = data<int32_t>(path);
  args.accepted = data<int32_t>(accepted);
  return call;
}

LinearCall prepare_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                          bool transposed) {
  Check check("linear");
  check.floating(input, "input", 2, "(M, I)");
  const char* letters = transposed ? "(I, O)" : "(O, I)";
  check.floating(weight, "weight", 2, letters);
  const int64_t in_size = input.size(1), out_size = weight.size(transposed ? 1 : 0);
  if (transposed) {
    check.sizes(weight, "weight", letters, {in_size, out_size});
  } else {
    check.sizes(weight, "weight", letters, {out_size, in_size});
  }
  if (bias) {
    check.floating(*bias, "bias", 1, "(O,)");
    check.sizes(*bias, "bias", "(O,)", {out_size});
  }
  const int64_t rows = input.size(0);
  LinearCall call{{}, empty(check, input, {rows, out_size}, check.scalar_type())};
  call.args = {check.dtype(),
               rows,
               in_size,
               out_size,
               1,
               transposed,
               input.const_data_ptr(),
               weight.const_data_ptr(),
               bias ? bias->const_data_ptr() : nullptr,
               nullptr,
               call.output.mutable_data_ptr()};
  return call;
}

GroupedLinearCall prepare_grouped_linear(const Tensor& input, const Tensor& weight,
                                         const std::optional<Tensor>& bias, const Tensor& chosen,
                                         bool transposed) {
  Check check("grouped_linear");
  check.floating(input, "input", 3, "(M, J, I) or (M, 1, I)");
  const char* letters = transposed ? "(G, I, O)" : "(G, O, I)";
  check.floating(weight, "weight", 3, letters);
  const int64_t rows = input.size(0), in_size = input.size(2), groups = weight.size(0),
                out_size = weight.size(transposed ? 2 : 1);
  if (transposed) {
    check.sizes(weight, "weight", letters, {groups, in_size, out_size});
  } else {
    check.sizes(weight, "weight", letters, {groups, out_size, in_size});
  }
  if (bias) {
    check.floating(*bias, "bias", 2, "(G, O)");
    check.sizes(*bias, "bias", "(G, O)", {groups, out_size});
  }
  check.integer(chosen, "chosen", 2, "(M, J)", ScalarType::Long);
  const int64_t each = input.size(1) == 1 ? chosen.size(1) : input.size(1);
  check.sizes(chosen, "chosen", "(M, J)", {rows, each});
  GroupedLinearCall call{{}, empty(check, input, {rows, each, out_size}, check.scalar_type())};
  call.args = {check.dtype(),
               rows,
               each,
               in_size,
               out_size,
               groups,
               input.size(1) == 1,
               transposed,
               false,
               input.const_data_ptr(),
               weight.const_data_ptr(),
               bias ? bias->const_data_ptr() : nullptr,
               data<int64_t>(chosen),
               call.output.mutable_data_ptr()};
  return call;
}

ActivationCall prepare_activation(const Tensor& input, const Text& kind) {
  constexpr const char* kKinds[] = {"silu", "gelu", "gelu_tanh", "tanh", "sigmoid",
                                    "exp",  "erf",  "softplus",  "cos",  "sin"};  // as in `Activation`
  Check check("activation");
  check.floating(input, "input");
  const auto found = std::find(std::begin(kKinds), std::end(kKinds), kind.text);
  if (found == std::end(kKinds)) {
    std::string all;
    for (const char* known : kKinds) all += (all.empty() ? "" : ", ") + std::string(known);
    check.fail("kind", "one of " + all, kind.text);
  }

  const auto sizes = input.sizes();
  ActivationCall call{{}, empty(check, input, sizes.data(), sizes.size(), check.scalar_type())};
  call.args = {check.dtype(), static_cast<Activation>(found - std::begin(kKinds)), input.numel(),
               input.const_data_ptr(), call.output.mutable_data_ptr()};
  return call;
}

}  // namespace cerberus
