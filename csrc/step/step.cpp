#include "step/step.h"

#include <chrono>

#include "cpu/cpu.h"
#include "step/code.h"

namespace cerberus {
namespace {

int64_t nanoseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

}  // namespace

int64_t packed_elements(DType dtype, Packing packing, int64_t out_size, int64_t in_size) {
  if (packing == Packing::kPacked) return packed_elements_cpu(dtype, out_size, in_size);
  if (packing == Packing::kEightBits)
    return eight_bit_bytes_cpu(out_size, in_size) / (dtype == DType::kFloat32 ? 4 : 2);
  return dtype == DType::kBFloat16 ? block_bytes_cpu(packing, out_size, in_size) / 2 : 0;
}

void Step::time_stages(bool on) {
  timed_ = on;
  times_.assign(stages_.size(), 0);
}

// Room for the nodes, and every address in its place.
void Step::provide(const StepCall& call) {
  const int64_t without_logits = call.nodes - call.logit_rows;
  std::vector<std::pair<void*, int64_t>> caches;
  for (const StepText& text : call.texts) caches.push_back({text.cache, text.capacity});
  bool moved = caches != caches_ || without_logits != without_logits_;
  without_logits_ = without_logits;
  const bool grows = call.nodes > nodes_;
  const int64_t count = static_cast<int64_t>(buffers_.size());
  for (int64_t i = 0; i < count; ++i) {
    Buffer& buffer = buffers_[i];
    void* data = i == hidden_ ? call.hidden : i == logits_ ? call.logits : buffer.data;
    if (i != hidden_ && i != logits_ && grows) {
      constexpr int64_t kLine = 64;
      buffer.memory.resize(call.nodes * buffer.width * element_bytes(buffer.is_float32) + kLine);
      const uintptr_t begin = reinterpret_cast<uintptr_t>(buffer.memory.data());
      data = reinterpret_cast<void*>((begin + kLine - 1) / kLine * kLine);
    }
    moved = moved || data != buffer.data;
    buffer.data = data;
  }
  if (grows) nodes_ = call.nodes;
  if (!moved) return;
  caches_ = std::move(caches);
  resolved_.clear();
  by_text_.assign(call.texts.size(), {});
  for (const Stage& stage : stages_) {
    if (stage.kind != kRowsStage) continue;
    resolve_rows(stage.rows, call.texts[0], resolved_);
    if (stage.rows.slots < 0) continue;
    for (size_t i = 0; i < call.texts.size(); ++i) resolve_rows(stage.rows, call.texts[i], by_text_[i]);
  }
}

void Step::run_grouped(const Grouped& g, int64_t nodes, const Parallel& parallel) {
  const Product& p = g.product;
  const float* chosen = static_cast<const float*>(buffers_[g.chosen].data);
  chosen_.resize(nodes * g.each);
  for (size_t i = 0; i < chosen_.size(); ++i) {
    const bool is_group = chosen[i] >= 0 && chosen[i] < static_cast<float>(g.groups);
    chosen_[i] = is_group ? static_cast<int64_t>(chosen[i]) : -1;
  }
  grouped_linear_cpu(
      {dtype_, nodes, g.each, p.in_size, p.out_size, g.groups, g.shared, g.transposed,
       p.packing == Packing::kPacked, buffers_[p.input].data, constants_[p.weight].data,
       p.bias < 0 ? nullptr : constants_[p.bias].data, chosen_.data(), buffers_[p.output].data},
      parallel);
}

void Step::run_product(const Product& p, int64_t first, int64_t nodes, const Parallel& parallel) const {
  const LinearArgs args{dtype_,
                        nodes - first,
                        p.in_size,
                        p.out_size,
                        1,
                        false,
                        rows_from(p.input, first),
                        constants_[p.weight].data,
                        p.bias < 0 ? nullptr : constants_[p.bias].data,
                        nullptr,
                        rows_from(p.output, first)};
  switch (p.packing) {
    case Packing::kNone:
      return linear_cpu(args, parallel);
    case Packing::kPacked:
      return packed_linear_cpu(args, parallel);
    case Packing::kEightBits:
      return eight_bit_linear_cpu(args, parallel);
    default:
      return block_linear_cpu(args, p.packing, parallel);
  }
}

// What is written to a cache goes to that of the node's text; all else is the same for all texts.
void Step::run_rows(const Rows& r, int64_t first, const StepCall& call, const Parallel& parallel) const {
  const auto run = [&](int64_t begin, int64_t end, const RowInstruction* instructions, int64_t length,
                       const Parallel& threads) {
    rows_cpu({dtype_, begin, end, r.count, r.scratch, instructions, call.positions, call.tokens, length},
             threads);
  };
  if (r.slots < 0) return run(first, call.nodes, resolved_.data() + r.first, 0, parallel);
  const auto run_text = [&](int64_t i, const Parallel& threads) {
    const StepText& text = call.texts[i];
    run(text.first, text.first + text.nodes, by_text_[i].data() + r.slots, *text.length, threads);
  };
  if (call.texts.size() == 1) return run_text(0, parallel);
  // A thread has whole texts: there is too little to do for a second one.
  const auto body = [](const void* state, int64_t i) {
    (*static_cast<const decltype(run_text)*>(state))(i, Parallel{nullptr, 1});
  };
  parallel.run(static_cast<int64_t>(call.texts.size()), body, &run_text);
}

void Step::run_attention(const Attention& a, const StepCall& call, const Parallel& parallel) {
  attentions_.clear();
  for (const StepText& text : call.texts) {
    attentions_.push_back(attention_args(a, text));
    attentions_.back().splits = 1;
  }
  tree_attentions_cpu({dtype_, static_cast<int64_t>(attentions_.size()), attentions_.data()}, parallel);
}

void Step::run(const StepCall& call, const Parallel& parallel) {
  provide(call);
  for (size_t i = 0; i < stages_.size(); ++i) {
    const int64_t begin = timed_ ? nanoseconds() : 0;
    const Stage& stage = stages_[i];
    const int64_t first = static_cast<int64_t>(i) < end_ ? 0 : without_logits_;
    if (stage.kind == kProductStage) run_product(stage.product, first, call.nodes, parallel);
    if (stage.kind == kRowsStage) run_rows(stage.rows, first, call, parallel);
    if (stage.kind == kGroupedStage) run_grouped(stage.grouped, call.nodes, parallel);
    if (stage.kind == kAttentionStage) run_attention(stage.attention, call, parallel);
    if (timed_) times_[i] += nanoseconds() - begin;
  }
}

}  // namespace cerberus
