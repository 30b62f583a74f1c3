// Where lies what a stage reads and writes, for steps on every device.
#include <cstring>

#include "step/code.h"
#include "step/step.h"

namespace cerberus {

void* Step::plane(const StepText& text, int64_t index) const {
  const int64_t bytes = kv_heads_ * text.capacity * head_size_ * element_bytes(false);
  return static_cast<char*>(text.cache) + index * bytes;
}

// Where a buffer's rows begin, from `node` on.
void* Step::rows_from(int64_t buffer, int64_t node) const {
  const Buffer& b = buffers_[buffer];
  const int64_t row = buffer == logits_ ? node - without_logits_ : node;
  return static_cast<char*>(b.data) + row * b.width * element_bytes(b.is_float32);
}

TreeAttentionArgs Step::attention_args(const Attention& a, const StepText& text) const {
  TreeAttentionArgs args{};
  args.dtype = dtype_;
  args.rows = 1;
  args.nodes = text.nodes;
  args.query_heads = a.query_heads;
  args.kv_heads = kv_heads_;
  args.head_size = head_size_;
  args.capacity = text.capacity;
  args.words = text.words;
  args.scale = a.scale;
  args.softcap = a.softcap;
  args.window = a.window;
  args.query = rows_from(a.query, text.first);
  args.keys = plane(text, 2 * a.layer);
  args.values = plane(text, 2 * a.layer + 1);
  args.length = text.length;
  args.ancestors = text.ancestors;
  args.sinks = a.sinks < 0 ? nullptr : constants_[a.sinks].data;
  args.output = rows_from(a.output, text.first);
  return args;
}

RowOperand Step::resolve(const Operand& o, const StepText& text) const {
  using Kind = RowOperand::Kind;
  using Row = RowOperand::Row;
  RowOperand to{
      Kind::kModel, Row::kConstant, 0, nullptr, o.offset, 0, 1, {o.stride[0], o.stride[1], o.stride[2]}};
  const auto kind = [](bool is_float32) { return is_float32 ? Kind::kFloat32 : Kind::kModel; };
  switch (o.space) {
    case kNoSpace:
      to.kind = Kind::kNone;
      break;
    case kNumberSpace: {
      const uint32_t bits = static_cast<uint32_t>(o.offset);
      to.kind = Kind::kNumber;
      std::memcpy(&to.number, &bits, sizeof(bits));
      break;
    }
    case kScratchSpace:
      to.kind = Kind::kScratch;
      break;
    case kBufferSpace: {
      const Buffer& buffer = buffers_[o.index];
      to.kind = kind(buffer.is_float32);
      to.row = Row::kNode;
      to.data = buffer.data;
      to.row_stride = buffer.width;
      if (o.index == logits_) to.offset -= without_logits_ * buffer.width;
      break;
    }
    case kKeysSpace:
    case kValuesSpace:
      to.row = Row::kSlot;
      to.data = plane(text, 2 * o.index + (o.space == kValuesSpace));
      to.row_stride = head_size_;
      to.rows = text.capacity;
      to.stride[1] = text.capacity * head_size_;
      break;
    default: {
      const StepConstant& constant = constants_[o.index];
      to.kind = kind(constant.is_float32);
      to.data = constant.data;
      if (o.space == kConstantSpace) break;
      to.row = o.space == kPositionSpace ? Row::kPosition : Row::kToken;
      to.row_stride = constant.width;
      to.rows = constant.elements / constant.width;
    }
  }
  return to;
}

// The instructions of a stage with their addresses, behind those that are in `to`.
void Step::resolve_rows(const Rows& rows, const StepText& text, std::vector<RowInstruction>& to) const {
  for (int64_t i = rows.first; i < rows.first + rows.count; ++i) {
    const Instruction& in = instructions_[i];
    to.push_back({static_cast<RowOp>(in.op),
                  in.round == 1,
                  {in.size[0], in.size[1], in.size[2]},
                  resolve(in.operands[0], text),
                  resolve(in.operands[1], text),
                  resolve(in.operands[2], text)});
  }
}

}  // namespace cerberus
