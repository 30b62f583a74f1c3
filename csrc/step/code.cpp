// Reads the code of a step, and refuses what a kernel could not run safely.
#include <cmath>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "step/code.h"
#include "step/step.h"

namespace cerberus {
namespace {

// Of any number in a code, of sizes of an instruction, and of axes of weights: no product of them overflows.
constexpr int64_t kMost = int64_t{1} << 36, kMostElements = int64_t{1} << 22, kMostOutputs = int64_t{1} << 26;

bool is_row_op(int64_t op) {
  const int64_t first = static_cast<int64_t>(RowOp::kActivation);
  return (op >= 0 && op <= static_cast<int64_t>(RowOp::kMax)) ||
         (op >= first && op <= first + static_cast<int64_t>(Activation::kSin)) ||
         (op >= static_cast<int64_t>(RowOp::kRelu) && op <= static_cast<int64_t>(RowOp::kPick));
}

bool is_op(int64_t op, RowOp which) { return op == static_cast<int64_t>(which); }

// One result for all elements along n0.
bool reduces(int64_t op) {
  return (op >= static_cast<int64_t>(RowOp::kMean) && op <= static_cast<int64_t>(RowOp::kMax)) ||
         is_op(op, RowOp::kTop) || is_op(op, RowOp::kPick);
}

bool needs_two(int64_t op) {
  return (op >= static_cast<int64_t>(RowOp::kAdd) && op <= static_cast<int64_t>(RowOp::kMinimum)) ||
         is_op(op, RowOp::kPick);
}

}  // namespace

// The numbers of a code in turn, each within bounds.
class Step::Reader {
 public:
  Reader(const int64_t* code, int64_t size) : code_(code), size_(size) {}

  int64_t next(const char* what, int64_t low, int64_t high) {
    if (place_ >= size_) fail(what, "there", "the end of the code");
    const int64_t found = code_[place_++];
    if (found < low || found > high) {
      std::ostringstream range;
      range << low << " to " << high;
      fail(what, range.str(), std::to_string(found));
    }
    return found;
  }
  int64_t count(const char* what) { return next(what, 0, kMost); }
  float number(const char* what) {
    const uint32_t bits = static_cast<uint32_t>(next(what, 0, 0xffffffff));
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  bool at_end() const { return place_ == size_; }

  [[noreturn]] void fail(const std::string& what, const std::string& must_be, const std::string& got) const {
    throw std::runtime_error("make_step: code: " + what + " must be " + must_be + ", got " + got +
                             " (number " + std::to_string(place_ - 1) + ")");
  }
  void that(bool holds, const char* what, const std::string& must_be, int64_t got) const {
    if (!holds) fail(what, must_be, std::to_string(got));
  }

 private:
  const int64_t* code_;
  int64_t size_, place_ = 0;
};

Step::Step(std::vector<StepConstant> constants, const int64_t* code, int64_t size)
    : Step(std::move(constants), code, size, kGroupedStage) {}

Step::Step(std::vector<StepConstant> constants, const int64_t* code, int64_t size, int64_t last_kind)
    : constants_(std::move(constants)) {
  Reader reader(code, size);
  reader.next("the version", 1, 1);
  dtype_ = static_cast<DType>(reader.next("dtype", 0, 2));
  layers_ = reader.next("layers", 0, kMostElements);
  kv_heads_ = reader.next("key/value heads", 0, kMostElements);
  head_size_ = reader.next("head size", 0, kMostElements);
  const int64_t buffers = reader.next("the number of buffers", 1, size);
  const int64_t stages = reader.next("the number of stages", 1, size);
  hidden_ = reader.next("the buffer of the hidden states", 0, buffers - 1);
  logits_ = reader.next("the buffer of the logits", 0, buffers - 1);
  for (int64_t i = 0; i < buffers; ++i) {
    const int64_t width = reader.next("a buffer's width", 0, kMostOutputs);
    buffers_.push_back({width, reader.next("a buffer's kind", 0, 1) == 1, {}, nullptr});
  }
  reader.that(hidden_ != logits_, "the buffer of the logits", "another one than that of the hidden states",
              logits_);
  for (const int64_t result : {hidden_, logits_})
    reader.that(!buffers_[result].is_float32, "a result's buffer", "of the model's dtype", 1);
  for (int64_t i = 0; i < stages; ++i) {
    Stage stage{};
    stage.kind = reader.next("a stage's kind", 0, last_kind);
    if (stage.kind == kProductStage || stage.kind == kPartStage)
      read_product(reader, stage.product, stage.kind == kPartStage);
    if (stage.kind == kRowsStage) read_rows(reader, stage.rows);
    if (stage.kind == kAttentionStage) read_attention(reader, stage.attention);
    if (stage.kind == kGroupedStage) read_grouped(reader, stage.grouped);
    stages_.push_back(stage);
  }
  reader.that(reader.at_end(), "the code", "at its end after the last stage", 0);
  find_end();
}

void Step::read_product(Reader& code, Product& p, bool is_part) const {
  read_weight(code, p);
  const Buffer &input = buffers_[p.input], &output = buffers_[p.output];
  code.that(input.width == p.in_size, "the input's width", std::to_string(p.in_size), input.width);
  if (is_part) {
    p.first = code.next("where a part begins", 0, output.width);
    code.that(p.first + p.out_size <= output.width, "where a part ends",
              "at most " + std::to_string(output.width), p.first + p.out_size);
  } else {
    code.that(output.width == p.out_size, "the output's width", std::to_string(p.out_size), output.width);
  }
  check_weight(code, p, 1);
}

void Step::read_grouped(Reader& code, Grouped& g) const {
  Product& p = g.product;
  read_weight(code, p);
  code.that(p.packing <= Packing::kPacked, "packing", "0 or 1 in a grouped product",
            static_cast<int64_t>(p.packing));
  g.transposed = code.next("transposed", 0, p.packing == Packing::kNone ? 1 : 0) == 1;
  g.groups = code.next("groups", 1, kMostElements);
  g.chosen = code.next("the buffer of the groups", 0, static_cast<int64_t>(buffers_.size()) - 1);
  g.each = code.next("the groups of a node", 1, kMostElements);
  g.shared = code.next("shared", 0, 1) == 1;
  const Buffer &input = buffers_[p.input], &output = buffers_[p.output], &chosen = buffers_[g.chosen];
  code.that(chosen.is_float32 || dtype_ == DType::kFloat32, "the buffer of the groups", "of float32", 0);
  code.that(chosen.width == g.each, "the width of the groups", std::to_string(g.each), chosen.width);
  code.that(g.chosen != p.output, "the buffer of the groups", "another one than the output", g.chosen);
  code.that(p.in_size <= kMostOutputs / g.each, "I", "smaller for so many groups", p.in_size);
  const int64_t in_width = g.shared ? p.in_size : g.each * p.in_size, out_width = g.each * p.out_size;
  code.that(input.width == in_width, "the input's width", std::to_string(in_width), input.width);
  code.that(output.width == out_width, "the output's width", std::to_string(out_width), output.width);
  check_weight(code, p, g.groups);
}

// What products and grouped products begin with.
void Step::read_weight(Reader& code, Product& p) const {
  const int64_t buffers = static_cast<int64_t>(buffers_.size()),
                constants = static_cast<int64_t>(constants_.size());
  p.input = code.next("a product's input", 0, buffers - 1);
  p.output = code.next("a product's output", 0, buffers - 1);
  p.weight = code.next("a product's weight", 0, constants - 1);
  p.in_size = code.next("I", 0, kMostOutputs);
  p.out_size = code.next("O", 0, kMostOutputs);
  p.bias = code.next("a product's bias", -1, constants - 1);
  p.packing = static_cast<Packing>(code.next("packing", 0, 6));
  code.that(!buffers_[p.input].is_float32 && !buffers_[p.output].is_float32, "a product's buffers",
            "of the model's dtype", 1);
  code.that(p.input != p.output, "a product's output", "another buffer than its input", p.output);
}

void Step::check_weight(Reader& code, const Product& p, int64_t groups) const {
  const StepConstant& weight = constants_[p.weight];
  code.that(!weight.is_float32 || dtype_ == DType::kFloat32, "a weight", "of the model's dtype", 0);
  const int64_t packing = static_cast<int64_t>(p.packing);
  code.that(weight.packing == p.packing, "packing", "that of the weight", packing);
  const int64_t elements = p.packing == Packing::kNone
                               ? p.out_size * p.in_size
                               : packed_elements(dtype_, p.packing, p.out_size, p.in_size);
  code.that(elements > 0 || packing == 0, "packing", "0, where this processor has no other", packing);
  code.that(weight.elements / groups >= elements, "a weight's elements",
            std::to_string(groups) + " times " + std::to_string(elements), weight.elements);
  if (p.bias < 0) return;
  const StepConstant& bias = constants_[p.bias];
  code.that(bias.packing == Packing::kNone && (!bias.is_float32 || dtype_ == DType::kFloat32), "a bias",
            "of the model's dtype", 0);
  code.that(bias.elements == groups * p.out_size, "a bias's elements", std::to_string(groups * p.out_size),
            bias.elements);
}

void Step::read_rows(Reader& code, Rows& rows) {
  rows.scratch = code.next("scratch", 0, int64_t{1} << 28);
  rows.count = code.count("the number of instructions");
  rows.first = static_cast<int64_t>(instructions_.size());
  rows.slots = -1;
  for (int64_t i = 0; i < rows.count; ++i) {
    Instruction instruction{};
    read_instruction(code, rows.scratch, instruction);
    instructions_.push_back(instruction);
    const int64_t space = instruction.operands[0].space;
    if (space == kKeysSpace || space == kValuesSpace) rows.slots = slots_;
  }
  if (rows.slots >= 0) slots_ += rows.count;
}

void Step::read_instruction(Reader& code, int64_t scratch, Instruction& in) const {
  in.op = code.count("an op");
  code.that(is_row_op(in.op), "an op", "one of RowOp", in.op);
  in.round = code.next("round", 0, 1);
  for (int64_t& size : in.size) size = code.next("a size", 1, kMostElements);
  code.that(in.size[0] * in.size[1] <= kMostElements && in.size[0] * in.size[1] * in.size[2] <= kMost,
            "sizes", "smaller", in.size[0]);
  code.that(!is_op(in.op, RowOp::kTop) || in.size[1] <= in.size[2], "the largest elements",
            "at most as many as there are", in.size[1]);
  for (int i = 0; i < 3; ++i) {
    Operand& o = in.operands[i];
    o.space = code.next("a space", 0, 8);
    o.index = code.count("an index");
    o.offset = code.count("an offset");
    for (int64_t& stride : o.stride) stride = code.count("a stride");
    const bool is_missing = o.space == kNoSpace;
    code.that(!is_missing || (i == 2 && !needs_two(in.op)), "an operand", "there", 0);
    if (is_missing) continue;
    int64_t size[3] = {in.size[0], in.size[1], in.size[2]};
    if (i != 1 && reduces(in.op)) size[2] = 1;
    check_operand(code, o, size, scratch, i == 0);
  }
}

// The elements that an operand may reach, counted from its row's first one.
int64_t Step::operand_size(Reader& code, const Operand& o, int64_t scratch) const {
  const auto in = [&](int64_t count) {
    code.that(o.index < count, "an index", "less than " + std::to_string(count), o.index);
  };
  switch (o.space) {
    case kScratchSpace:
      return scratch;
    case kBufferSpace:
      in(static_cast<int64_t>(buffers_.size()));
      return buffers_[o.index].width;
    case kKeysSpace:
    case kValuesSpace:
      in(layers_);
      return kv_heads_ * head_size_;
    default: {
      in(static_cast<int64_t>(constants_.size()));
      const StepConstant& constant = constants_[o.index];
      code.that(constant.packing == Packing::kNone, "an operand", "a tensor that is not packed", o.index);
      code.that(o.space == kConstantSpace || constant.elements > 0, "a table", "not empty", 0);
      return o.space == kConstantSpace ? constant.elements : constant.width;
    }
  }
}

void Step::check_operand(Reader& code, const Operand& o, const int64_t (&size)[3], int64_t scratch,
                         bool is_written) const {
  if (o.space == kNumberSpace) {
    code.that(!is_written && o.offset <= 0xffffffff, "a number", "an operand that is read", o.offset);
    return;
  }
  const bool is_cache = o.space == kKeysSpace || o.space == kValuesSpace;
  const bool is_writable = is_cache || o.space == kScratchSpace || o.space == kBufferSpace;
  code.that(is_written ? is_writable : !is_cache, "a space", is_written ? "one to write to" : "one to read",
            o.space);
  if (is_cache)  // elements of a head lie side by side, its next one a whole cache apart
    code.that(o.offset == 0 && o.stride[1] == head_size_ && o.stride[2] == 1 && size[0] == 1 &&
                  size[1] == kv_heads_ && size[2] == head_size_,
              "what is written to the cache", "all heads of a node", o.offset);
  const int64_t available = operand_size(code, o, scratch);
  int64_t last = o.offset;
  for (int i = 0; i < 3; ++i) {
    code.that(o.stride[i] <= available, "a stride", "within its row", o.stride[i]);
    last += (size[i] - 1) * o.stride[i];
  }
  code.that(last < available, "an operand's last element", "less than " + std::to_string(available), last);
}

void Step::read_attention(Reader& code, Attention& a) const {
  const int64_t buffers = static_cast<int64_t>(buffers_.size()),
                constants = static_cast<int64_t>(constants_.size());
  a.layer = code.next("a layer", 0, layers_ - 1);
  a.query = code.next("a query's buffer", 0, buffers - 1);
  a.output = code.next("an attention's output", 0, buffers - 1);
  a.query_heads = code.next("query heads", 1, int64_t{1} << 20);
  a.scale = code.number("a scale");
  a.window = code.count("a window");
  a.softcap = code.number("a softcap");
  a.sinks = code.next("sinks", -1, constants - 1);
  code.that(std::isfinite(a.scale) && std::isfinite(a.softcap) && a.softcap >= 0, "scale and softcap",
            "finite", 0);
  code.that(kv_heads_ > 0 && a.query_heads % kv_heads_ == 0, "query heads",
            "a multiple of the key/value heads", a.query_heads);
  for (const int64_t buffer : {a.query, a.output}) {
    code.that(!buffers_[buffer].is_float32, "an attention's buffers", "of the model's dtype", 1);
    code.that(buffers_[buffer].width == a.query_heads * head_size_, "the width of an attention's buffer",
              std::to_string(a.query_heads * head_size_), buffers_[buffer].width);
  }
  code.that(a.query != a.output, "an attention's output", "another buffer than its query", a.output);
  if (a.sinks < 0) return;
  const StepConstant& sinks = constants_[a.sinks];
  code.that(sinks.packing == Packing::kNone && (!sinks.is_float32 || dtype_ == DType::kFloat32) &&
                sinks.elements == a.query_heads,
            "sinks", "one of the model's dtype per query head", sinks.elements);
}

void Step::find_end() {
  const auto keeps = [this](const Stage& stage) {  // something that other nodes or a later step may need
    if (stage.kind == kProductStage || stage.kind == kPartStage) return stage.product.output == hidden_;
    if (stage.kind != kRowsStage) return true;
    for (int64_t i = 0; i < stage.rows.count; ++i) {
      const Operand& to = instructions_[stage.rows.first + i].operands[0];
      const bool is_slot = to.space == kKeysSpace || to.space == kValuesSpace;
      if (is_slot || (to.space == kBufferSpace && to.index == hidden_)) return true;
    }
    return false;
  };
  end_ = static_cast<int64_t>(stages_.size());
  while (end_ > 0 && !keeps(stages_[end_ - 1])) --end_;
  ends_with_logits_ = true;
  for (int64_t i = 0; i < end_; ++i)
    if (is_used(stages_[i], logits_)) ends_with_logits_ = false;
}

bool Step::is_used(const Stage& stage, int64_t buffer) const {
  if (stage.kind == kProductStage || stage.kind == kPartStage)
    return stage.product.input == buffer || stage.product.output == buffer;
  if (stage.kind == kAttentionStage)
    return stage.attention.query == buffer || stage.attention.output == buffer;
  if (stage.kind == kGroupedStage)
    return stage.grouped.product.input == buffer || stage.grouped.product.output == buffer ||
           stage.grouped.chosen == buffer;
  for (int64_t i = 0; i < stage.rows.count; ++i)
    for (const Operand& operand : instructions_[stage.rows.first + i].operands)
      if (operand.space == kBufferSpace && operand.index == buffer) return true;
  return false;
}

}  // namespace cerberus
