// Registers the ops around steps: packing weights, making a step of its code, running it. CPU only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "blocks/device_blocks.h"
#include "check.h"
#include "cpu/cpu.h"
#include "cpu/mapped.h"
#include "cpu/team.h"
#include "packing.h"
#include "step/step.h"

namespace cerberus {
namespace {

Parallel threads() { return team(torch::stable::get_num_threads()); }

// A step, and the tensors whose memory it reads.
struct Held {
  std::vector<Tensor> tensors;
  Step step;
  ScalarType type;
  std::mutex running;
};

// All steps of the process, by number.
class Steps {
 public:
  int64_t add(std::shared_ptr<Held> held) {
    std::lock_guard<std::mutex> lock(mutex_);
    steps_[++last_] = std::move(held);
    return last_;
  }
  std::shared_ptr<Held> find(const char* op, int64_t number) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = steps_.find(number);
    if (found == steps_.end())
      Check(op).fail("step", "one that make_step has returned", std::to_string(number));
    return found->second;
  }
  void remove(int64_t number) {
    std::lock_guard<std::mutex> lock(mutex_);
    steps_.erase(number);
  }

 private:
  std::mutex mutex_;
  int64_t last_ = 0;
  std::unordered_map<int64_t, std::shared_ptr<Held>> steps_;
};

Steps& steps() {
  static Steps* all = new Steps;  // never destroyed: tensors may not outlive torch
  return *all;
}

ScalarType type_of_dtype(DType dtype) {
  return dtype == DType::kBFloat16  ? ScalarType::BFloat16
         : dtype == DType::kFloat16 ? ScalarType::Half
                                    : ScalarType::Float;
}

void plain_on_cpu(const Check& check, const Tensor& tensor, const char* argument) {
  check.plain(tensor, argument);
  check.on_cpu(tensor, argument);
  if (!tensor.is_contiguous()) check.fail(argument, "contiguous", "shape " + shape_text(tensor));
}

int64_t make_step(std::vector<Tensor> tensors, Tensor code) {
  Check check("make_step");
  check.integer(code, "code", 1, "(n,)", ScalarType::Long);
  plain_on_cpu(check, code, "code");
  const int64_t* numbers = static_cast<const int64_t*>(code.const_data_ptr());
  const DType dtype = static_cast<DType>(code.size(0) > 1 ? numbers[1] : 0);
  const ScalarType floating = type_of_dtype(dtype);
  std::vector<StepConstant> constants;
  for (const Tensor& tensor : tensors) {
    plain_on_cpu(check, tensor, "tensors");
    const ScalarType type = dtype_of(tensor);
    const int64_t width = tensor.dim() > 0 ? tensor.size(tensor.dim() - 1) : 1;
    const Packing packing = tensor.dim() == 1 ? packing_of(type) : Packing::kNone;
    const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
    const bool is_float32 = type == ScalarType::Float;
    if (packing == Packing::kNone && type != ScalarType::Float && type != floating)
      check.fail("tensors", "torch.float32, " + dtype_text(floating) + " or packed", dtype_text(type));
    constants.push_back({const_cast<void*>(tensor.const_data_ptr()),
                         packing == Packing::kNone
                             ? tensor.numel()
                             : tensor.numel() * static_cast<int64_t>(tensor.element_size()) / bytes,
                         width, is_float32, packing});
  }
  Step step(std::move(constants), numbers, code.size(0));
  return steps().add(std::shared_ptr<Held>(new Held{std::move(tensors), std::move(step), floating, {}}));
}

const int64_t* integers(const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); }

// The texts of a call, one behind the other.
std::vector<StepText> texts_of(Check& check, const Held& held, int64_t nodes,
                               const std::vector<Tensor>& length, const std::vector<Tensor>& ancestors,
                               const std::vector<Tensor>& cache) {
  const int64_t count = static_cast<int64_t>(length.size()), planes = 2 * held.step.layers();
  check.that(count >= 1, "length", "one or more tensors", count);
  for (const auto* others : {&ancestors, &cache})
    check.that(static_cast<int64_t>(others->size()) == count, others == &cache ? "cache" : "ancestors",
               "a tensor for each of length, " + std::to_string(count), static_cast<int64_t>(others->size()));
  std::vector<StepText> texts;
  int64_t first = 0;
  for (int64_t i = 0; i < count; ++i) {
    check.integer(length[i], "length", 1, "(1,)", ScalarType::Long);
    check.sizes(length[i], "length", "(1,)", {1});
    const int64_t own = check.nodes_of_text(ancestors[i], nodes - first, "tokens");
    const int64_t words = ancestors[i].size(1);
    check.floating(cache[i], "cache", 5, "(C, 1, Hkv, S, E)");
    check.that(cache[i].scalar_type() == held.type, "cache", dtype_text(held.type) + " like the step",
               dtype_text(cache[i].scalar_type()));
    check.that(cache[i].size(0) >= planes, "cache", "(C, 1, Hkv, S, E) with C >= " + std::to_string(planes),
               cache[i].size(0));
    const int64_t capacity = cache[i].size(3);
    check.sizes(cache[i], "cache", "(C, 1, Hkv, S, E)",
                {cache[i].size(0), 1, held.step.kv_heads(), capacity, held.step.head_size()});
    texts.push_back({first, own, words, capacity, integers(length[i]), integers(ancestors[i]),
                     cache[i].mutable_data_ptr()});
    first += own;
  }
  check.that(first == nodes, "ancestors", "of " + std::to_string(nodes) + " nodes in all, like tokens",
             first);
  return texts;
}

void run_step(int64_t number, Tensor tokens, Tensor positions, std::vector<Tensor> length,
              std::vector<Tensor> ancestors, std::vector<Tensor> cache, Tensor hidden, Tensor logits) {
  const std::shared_ptr<Held> held = steps().find("run_step", number);
  const Step& step = held->step;
  Check check("run_step");
  check.integer(tokens, "tokens", 1, "(N,)", ScalarType::Long);
  plain_on_cpu(check, tokens, "tokens");
  const int64_t nodes = tokens.size(0);
  check.that(nodes >= 1 && nodes <= 1 << 16, "tokens", "(N,) with N from 1 to 65536", nodes);
  check.integer(positions, "positions", 1, "(N,)", ScalarType::Long);
  check.sizes(positions, "positions", "(N,)", {nodes});
  std::vector<StepText> texts = texts_of(check, *held, nodes, length, ancestors, cache);
  check.floating(hidden, "hidden", 2, "(N, D)");
  check.sizes(hidden, "hidden", "(N, D)", {nodes, step.hidden_size()});
  check.floating(logits, "logits", 2, "(R, V)");
  const int64_t logit_rows = logits.size(0), fewest = step.ends_with_logits() ? 1 : nodes;
  check.that(logit_rows >= fewest && logit_rows <= nodes, "logits",
             "(R, V) with R from " + std::to_string(fewest) + " to " + std::to_string(nodes), logit_rows);
  check.sizes(logits, "logits", "(R, V)", {logit_rows, step.vocabulary()});
  std::lock_guard<std::mutex> lock(held->running);
  held->step.run({nodes, integers(tokens), integers(positions), std::move(texts), hidden.mutable_data_ptr(),
                  logits.mutable_data_ptr(), logit_rows},
                 threads());
}

void free_step(int64_t number) { steps().remove(number); }

std::vector<int64_t> step_times(int64_t number, bool on) {
  const std::shared_ptr<Held> held = steps().find("step_times", number);
  std::lock_guard<std::mutex> lock(held->running);
  std::vector<int64_t> times = held->step.stage_times();
  held->step.time_stages(on);
  return times;
}

int64_t bytes_of(DType dtype, Packing packing, int64_t rows, int64_t size) {
  return packed_elements(dtype, packing, rows, size) * (dtype == DType::kFloat32 ? 4 : 2);
}

int64_t bytes_like(const char* op, Packing packing, const Tensor& weight, int64_t rows) {
  Check check(op);
  check.floating(weight, "weight", 2, "(O, I)");
  check.that(rows >= 0 && rows <= int64_t{1} << 32, "rows", "0 to 2^32", rows);
  return bytes_of(check.dtype(), packing, rows, weight.size(1));
}

int64_t packed_bytes(Tensor weight, int64_t rows) {
  return bytes_like("packed_bytes", Packing::kPacked, weight, rows);
}

// Blocks of so many bits a weight.
Packing packing_of_bits(const char* op, int64_t bits) {
  Check(op).that(bits >= 4 && bits <= 8 && bits != 7, "bits", "4, 5, 6 or 8", bits);
  return bits == 4   ? Packing::kFourBits
         : bits == 5 ? Packing::kFiveBits
         : bits == 6 ? Packing::kBytesOf16
                     : Packing::kBytes;
}

int64_t block_bytes(Tensor weight, int64_t rows, int64_t bits) {
  return bytes_like("block_bytes", packing_of_bits("block_bytes", bits), weight, rows);
}

int64_t device_block_bytes_of(Tensor weight, int64_t bits) {
  Check check("device_block_bytes");
  const Packing packing = packing_of_bits("device_block_bytes", bits);
  check.floating(weight, "weight", 2, "(O, I)");
  if (!packs_device_blocks() || check.dtype() != DType::kBFloat16) return 0;
  return device_block_bytes(packing, weight.size(0), weight.size(1));
}

// What is to be packed: its dtype, how many rows in all, and of which size.
struct ToPack {
  DType dtype;
  int64_t rows, size;
};

// Checks the weights (O, I), and that `packed` has room for them.
ToPack check_packing(const char* op, Packing packing, const std::vector<Tensor>& weights,
                     const Tensor& packed) {
  Check check(op);
  plain_on_cpu(check, packed, "packed");
  int64_t rows = 0;
  for (const Tensor& weight : weights) {
    check.floating(weight, "weights", 2, "(O, I)");
    check.that(weight.size(1) == weights[0].size(1), "weights", "of one I", weight.size(1));
    plain_on_cpu(check, weight, "weights");
    rows += weight.size(0);
  }
  if (rows == 0) return {DType::kFloat32, 0, 0};
  const int64_t size = weights[0].size(1), bytes = bytes_of(check.dtype(), packing, rows, size);
  if (bytes == 0) check.fail("weights", "of a kind that this processor packs so", cpu_isa());
  const int64_t have = packed.numel() * static_cast<int64_t>(packed.element_size());
  if (packing_of(dtype_of(packed)) != packing || have < bytes)
    check.fail("packed",
               (packing == Packing::kPacked ? "torch.uint8"
                                            : "torch.int8, torch.uint16, torch.int32 or torch.int64") +
                   std::string(" with ") + std::to_string(bytes) + " bytes",
               dtype_text(dtype_of(packed)) + " with " + std::to_string(have));
  return {check.dtype(), rows, size};
}

void pack_weights(std::vector<Tensor> weights, Tensor packed) {
  const ToPack all = check_packing("pack_weights", Packing::kPacked, weights, packed);
  int64_t first = 0;
  for (const Tensor& weight : weights) {
    if (all.rows == 0) return;
    pack_weights_cpu({all.dtype, weight.size(0), all.size, first, all.rows, weight.const_data_ptr(),
                      packed.mutable_data_ptr()},
                     threads());
    first += weight.size(0);
  }
}

// In blocks of the kind that the dtype of `packed` names.
bool pack_blocks(std::vector<Tensor> weights, Tensor packed) {
  const Packing named = packing_of(dtype_of(packed));
  const bool is_plain = named == Packing::kNone || named == Packing::kPacked || named == Packing::kEightBits;
  const Packing packing = is_plain ? Packing::kFourBits : named;
  const ToPack all = check_packing("pack_blocks", packing, weights, packed);
  int32_t fits = all.rows > 0;
  int64_t first = 0;
  for (const Tensor& weight : weights) {
    if (fits == 0) break;
    pack_blocks_cpu({packing, weight.size(0), all.size, first, all.rows, weight.const_data_ptr(),
                     packed.mutable_data_ptr(), &fits},
                    threads());
    first += weight.size(0);
  }
  return fits != 0;
}

// The same for the CUDA kernels, of one weight, into zeros.
bool pack_device_blocks(Tensor weight, Tensor packed) {
  Check check("pack_device_blocks");
  check.floating(weight, "weight", 2, "(O, I)");
  plain_on_cpu(check, weight, "weight");
  plain_on_cpu(check, packed, "packed");
  const Packing packing = packing_of(dtype_of(packed));
  const int64_t rows = weight.size(0), size = weight.size(1), bytes = device_block_bytes(packing, rows, size);
  const int64_t have = packed.numel() * static_cast<int64_t>(packed.element_size());
  if (!packs_device_blocks() || check.dtype() != DType::kBFloat16 || bytes == 0)
    check.fail("weight", "of a kind that this processor packs so", shape_text(weight));
  if (have < bytes) check.fail("packed", "of " + std::to_string(bytes) + " bytes", std::to_string(have));
  int32_t fits = 1;
  pack_device_blocks_cpu(
      {packing, rows, size, 0, rows, weight.const_data_ptr(), packed.mutable_data_ptr(), &fits}, threads());
  return fits != 0;
}

void prefer_large_pages(Tensor memory) {
  Check check("prefer_large_pages");
  plain_on_cpu(check, memory, "memory");
  prefer_large_pages_cpu(memory.mutable_data_ptr(), memory.numel() * memory.element_size());
}

int64_t release_mapped(Tensor memory) {
  Check check("release_mapped");
  plain_on_cpu(check, memory, "memory");
  const int64_t bytes = memory.numel() * static_cast<int64_t>(memory.element_size());
  return release_mapped_cpu(const_cast<void*>(memory.const_data_ptr()), bytes);
}

void trim_heap() { trim_heap_cpu(); }

}  // namespace
}  // namespace cerberus

STABLE_TORCH_LIBRARY_FRAGMENT(cerberus_ext, m) {
  m.def("make_step(Tensor[] tensors, Tensor code) -> int");
  m.def(
      "run_step(int step, Tensor tokens, Tensor positions, Tensor[] length, Tensor[] ancestors, Tensor(a!)[] "
      "cache, "
      "Tensor(b!) hidden, Tensor(c!) logits) -> ()");
  m.def("free_step(int step) -> ()");
  m.def("step_times(int step, bool on) -> int[]");
  m.def("packed_bytes(Tensor weight, int rows) -> int");
  m.def("pack_weights(Tensor[] weights, Tensor(a!) packed) -> ()");
  m.def("block_bytes(Tensor weight, int rows, int bits) -> int");
  m.def("pack_blocks(Tensor[] weights, Tensor(a!) packed) -> bool");
  m.def("device_block_bytes(Tensor weight, int bits) -> int");
  m.def("pack_device_blocks(Tensor weight, Tensor(a!) packed) -> bool");
  m.def("prefer_large_pages(Tensor(a!) memory) -> ()");
  m.def("release_mapped(Tensor memory) -> int");
  m.def("trim_heap() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, CompositeExplicitAutograd, m) {
  m.impl("make_step", TORCH_BOX(&cerberus::make_step));
  m.impl("run_step", TORCH_BOX(&cerberus::run_step));
  m.impl("free_step", TORCH_BOX(&cerberus::free_step));
  m.impl("step_times", TORCH_BOX(&cerberus::step_times));
  m.impl("packed_bytes", TORCH_BOX(&cerberus::packed_bytes));
  m.impl("pack_weights", TORCH_BOX(&cerberus::pack_weights));
  m.impl("block_bytes", TORCH_BOX(&cerberus::block_bytes));
  m.impl("pack_blocks", TORCH_BOX(&cerberus::pack_blocks));
  m.impl("device_block_bytes", TORCH_BOX(&cerberus::device_block_bytes_of));
  m.impl("pack_device_blocks", TORCH_BOX(&cerberus::pack_device_blocks));
  m.impl("prefer_large_pages", TORCH_BOX(&cerberus::prefer_large_pages));
  m.impl("release_mapped", TORCH_BOX(&cerberus::release_mapped));
  m.impl("trim_heap", TORCH_BOX(&cerberus::trim_heap));
}
