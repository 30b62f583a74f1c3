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
  return dtype == DType::kBFloat16 ? four_bit_bytes_cpu(out_size, in_size) / 2 : 0;
}

void Step::time_stages(bool on) {
  timed_ = on;
  times_.assign(stages_.size(), 0);
}

// Where a buffer's rows begin, from `node` on.
void* Step::rows_from(int64_t buffer, int64_t node) const {
  const Buffer& b = buffers_[buffer];
  const int64_t row = buffer == logits_ ? node - without_logits_ : node;
  return static_cast<char*>(b.data) + row * b.width * element_bytes(b.is_float32);
}

// Room for the nodes, and every address in its place.
void Step::provide(const StepCall& call) {
  const int64_t without_logits = call.nodes - call.logit_rows;
  bool moved = call.cache != cache_ || call.capacity != capacity_ || without_logits != without_logits_ ||
               resolved_.empty();
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
  cache_ = call.cache;
  capacity_ = call.capacity;
  resolved_.clear();
  for (const Instruction& in : instructions_)
    resolved_.push_back({static_cast<RowOp>(in.op),
                         in.round == 1,
                         {in.size[0], in.size[1], in.size[2]},
                         resolve(in.operands[0], call),
                         resolve(in.operands[1], call),
                         resolve(in.operands[2], call)});
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

void Step::run(const StepCall& call, const Parallel& parallel) {
  provide(call);
  for (size_t i = 0; i < stages_.size(); ++i) {
    const int64_t begin = timed_ ? nanoseconds() : 0;
    const Stage& stage = stages_[i];
    const int64_t first = static_cast<int64_t>(i) < end_ ? 0 : without_logits_;
    if (stage.kind == kProductStage) {
      const Product& p = stage.product;
      const LinearArgs args{dtype_,
                            call.nodes - first,
                            p.in_size,
                            p.out_size,
                            1,
                            false,
                            rows_from(p.input, first),
                            constants_[p.weight].data,
                            p.bias < 0 ? nullptr : constants_[p.bias].data,
                            nullptr,
                            rows_from(p.output, first)};
      (p.packing == Packing::kNone     ? linear_cpu
       : p.packing == Packing::kPacked ? packed_linear_cpu
                                       : four_bit_linear_cpu)(args, parallel);
    } else if (stage.kind == kRowsStage) {
      const Rows& r = stage.rows;
      rows_cpu({dtype_, first, call.nodes, r.count, r.scratch, resolved_.data() + r.first, call.positions,
                call.tokens, *call.length},
               parallel);
    } else if (stage.kind == kGroupedStage) {
      run_grouped(stage.grouped, call.nodes, parallel);
    } else {
      const Attention& a = stage.attention;
      TreeAttentionArgs args{};
      args.dtype = dtype_;
      args.rows = 1;
      args.nodes = call.nodes;
      args.query_heads = a.query_heads;
      args.kv_heads = kv_heads_;
      args.head_size = head_size_;
      args.capacity = call.capacity;
      args.words = call.words;
      args.scale = a.scale;
      args.softcap = a.softcap;
      args.window = a.window;
      args.query = buffers_[a.query].data;
      args.keys = plane(call, 2 * a.layer);
      args.values = plane(call, 2 * a.layer + 1);
      args.length = call.length;
      args.ancestors = call.ancestors;
      args.sinks = a.sinks < 0 ? nullptr : constants_[a.sinks].data;
      args.output = buffers_[a.output].data;
      args.splits = 1;
      tree_attention_cpu(args, parallel);
    }
    if (timed_) times_[i] += nanoseconds() - begin;
  }
}

}  // namespace cerberus
