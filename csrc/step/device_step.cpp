#include "step/device_step.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "blocks/device_blocks.h"
#include "cuda/kernels.h"
#include "step/code.h"

namespace cerberus {

int64_t packed_elements(DType dtype, Packing packing, int64_t out_size, int64_t in_size) {
  return dtype == DType::kBFloat16 ? device_block_bytes(packing, out_size, in_size) / 2 : 0;
}

// Hands out pieces of a plan's memory.
class DeviceStep::Memory {
 public:
  explicit Memory(void* begin) : begin_(static_cast<char*>(begin)) {}
  void* take(int64_t bytes) {
    constexpr int64_t kLine = 64;
    // Null while it is only counted: kernels choose their loads by whether addresses are multiples of 16.
    void* const piece = begin_ ? begin_ + used_ : nullptr;
    used_ += (bytes + kLine - 1) / kLine * kLine;
    return piece;
  }
  template <typename T>
  T* take_elements(int64_t count) {
    return static_cast<T*>(take(count * static_cast<int64_t>(sizeof(T))));
  }
  int64_t used() const { return used_; }

 private:
  char* begin_;
  int64_t used_ = 0;
};

DeviceStep::DeviceStep(std::vector<StepConstant> constants, const int64_t* code, int64_t size)
    : Step(std::move(constants), code, size, kPartStage) {
  check_limits();
}

void DeviceStep::check_limits() const {
  const auto at_most = [](const char* what, int64_t limit, int64_t got) {
    if (got > limit)
      throw std::runtime_error("make_device_step: code: " + std::string(what) + " must be at most " +
                               std::to_string(limit) + " on CUDA, got " + std::to_string(got));
  };
  for (const Stage& stage : stages_) {
    const bool is_product = stage.kind == kProductStage || stage.kind == kPartStage;
    const Product& product = stage.kind == kGroupedStage ? stage.grouped.product : stage.product;
    if (is_product || stage.kind == kGroupedStage) {
      at_most("I", kMaxProductSize, product.in_size);
      if (product.in_size < 1)
        throw std::runtime_error("make_device_step: code: I must be at least 1 on CUDA");
    }
    if (stage.kind == kGroupedStage && stage.grouped.transposed)
      throw std::runtime_error("make_device_step: code: groups must not be transposed on CUDA");
    if (stage.kind == kAttentionStage) at_most("the head size", kMaxHeadSize, head_size_);
  }
  for (const Instruction& in : instructions_) {
    at_most("an instruction's elements", INT32_MAX, in.size[0] * in.size[1] * in.size[2]);
    if (in.op == static_cast<int64_t>(RowOp::kTop))
      at_most("elements to be ranked", kMaxRankedSize, in.size[2]);
  }
}

// Of `stage`, and of the parts behind it that read and write the same buffers: it is the last of them then. A
// launch for each kind of weights; which kinds there are changes no bit.
void DeviceStep::products(size_t& stage, int64_t nodes, std::vector<DeviceLaunch>& to) const {
  const Product& p = stages_[stage].product;
  size_t end = stage + 1;
  const auto is_next = [&](const Stage& next) {
    return next.kind == kPartStage && next.product.input == p.input && next.product.output == p.output;
  };
  if (stages_[stage].kind == kPartStage)
    while (end < stages_.size() && end - stage < kMaxProductParts && is_next(stages_[end])) ++end;
  int64_t tiles = 0;
  for (size_t i = stage; i < end; ++i) tiles += product_tiles(stages_[i].product.out_size);
  const size_t first = to.size();
  for (; stage < end; ++stage) {
    const Product& part = stages_[stage].product;
    size_t place = first;
    while (place < to.size() && to[place].product.packing != part.packing) ++place;
    if (place == to.size()) {
      DeviceLaunch launch{};
      launch.kind = kProductStage;
      launch.product = {dtype_,
                        part.packing,
                        tiles,
                        nodes,
                        p.in_size,
                        buffers_[p.output].width,
                        buffers_[p.input].data,
                        buffers_[p.output].data,
                        0,
                        {}};
      to.push_back(launch);
    }
    StepProductArgs& args = to[place].product;
    args.parts[args.count++] = {constants_[part.weight].data,
                                part.bias < 0 ? nullptr : constants_[part.bias].data, part.out_size,
                                part.first};
  }
  --stage;
}

DeviceLaunch DeviceStep::grouped(const Grouped& g, int64_t nodes) const {
  const Product& p = g.product;
  DeviceLaunch launch{};
  launch.kind = kGroupedStage;
  launch.grouped = {dtype_,
                    nodes,
                    g.each,
                    p.in_size,
                    p.out_size,
                    g.groups,
                    g.shared,
                    buffers_[p.input].data,
                    constants_[p.weight].data,
                    p.bias < 0 ? nullptr : constants_[p.bias].data,
                    static_cast<const float*>(buffers_[g.chosen].data),
                    buffers_[p.output].data};
  return launch;
}

DevicePlan DeviceStep::plan(const StepCall& call, void* memory, const RowInstruction* instructions) {
  const StepText& text = call.texts[0];
  Memory pieces(memory);
  without_logits_ = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(buffers_.size()); ++i) {
    Buffer& buffer = buffers_[i];
    buffer.data = i == hidden_   ? call.hidden
                  : i == logits_ ? call.logits
                                 : pieces.take(call.nodes * buffer.width * element_bytes(buffer.is_float32));
  }
  DevicePlan plan{};
  for (const Stage& stage : stages_)
    if (stage.kind == kRowsStage) resolve_rows(stage.rows, text, plan.instructions);
  // Launches come one after the other, and take turns with what they need beside the buffers.
  int64_t partial_rows = 0, scratch = 0;
  for (size_t i = 0; i < stages_.size(); ++i) {
    const Stage& stage = stages_[i];
    if (stage.kind == kProductStage || stage.kind == kPartStage) {
      products(i, call.nodes, plan.launches);
    } else if (stage.kind == kGroupedStage) {
      plan.launches.push_back(grouped(stage.grouped, call.nodes));
    } else if (stage.kind == kAttentionStage) {
      DeviceLaunch launch{};
      launch.kind = kAttentionStage;
      launch.attention = attention_args(stage.attention, text);
      TreeAttentionArgs& args = launch.attention;
      args.splits = tree_attention_splits(args.capacity);
      if (args.splits > 1) partial_rows = std::max(partial_rows, call.nodes * args.query_heads * args.splits);
      plan.launches.push_back(launch);
    } else if (stage.rows.count > 0) {
      DeviceLaunch launch{};
      launch.kind = kRowsStage;
      launch.rows.dtype = dtype_;
      launch.rows.nodes = call.nodes;
      launch.rows.count = stage.rows.count;
      launch.rows.scratch = stage.rows.scratch;
      launch.rows.instructions = instructions + stage.rows.first;
      if (stage.rows.scratch > kMaxSharedScratch / static_cast<int64_t>(sizeof(float)))
        scratch = std::max(scratch, call.nodes * stage.rows.scratch);
      plan.launches.push_back(launch);
    }
  }
  float* const part_max = pieces.take_elements<float>(partial_rows);
  float* const part_sum = pieces.take_elements<float>(partial_rows);
  float* const part_output = pieces.take_elements<float>(partial_rows * head_size_);
  float* const rows_memory = pieces.take_elements<float>(scratch);
  for (DeviceLaunch& launch : plan.launches) {
    if (launch.kind == kAttentionStage && launch.attention.splits > 1) {
      launch.attention.part_max = part_max;
      launch.attention.part_sum = part_sum;
      launch.attention.part_output = part_output;
    }
    if (launch.kind == kRowsStage &&
        launch.rows.scratch > kMaxSharedScratch / static_cast<int64_t>(sizeof(float)))
      launch.rows.memory = rows_memory;
  }
  plan.memory_bytes = pieces.used();
  return plan;
}

cudaError_t run_device_step(const DeviceRun& run, cudaStream_t stream) {
  for (const DeviceLaunch& launch : run.plan->launches) {
    cudaError_t error = cudaSuccess;
    if (launch.kind == kProductStage) {
      error = step_product_cuda(launch.product, stream);
    } else if (launch.kind == kGroupedStage) {
      error = step_grouped_cuda(launch.grouped, stream);
    } else if (launch.kind == kRowsStage) {
      StepRowsArgs args = launch.rows;
      args.tokens = run.tokens;
      args.positions = run.positions;
      args.length = run.length;
      error = step_rows_cuda(args, stream);
    } else {
      TreeAttentionArgs args = launch.attention;
      args.length = run.length;
      args.ancestors = run.ancestors;
      error = tree_attention_cuda(args, stream);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace cerberus
