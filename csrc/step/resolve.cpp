// Where the operands of row instructions lie, for steps on every device.
#include <cstring>

#include "step/code.h"
#include "step/step.h"

namespace cerberus {

void* Step::plane(const StepCall& call, int64_t index) const {
  const int64_t bytes = kv_heads_ * call.capacity * head_size_ * element_bytes(false);
  return static_cast<char*>(call.cache) + index * bytes;
}

RowOperand Step::resolve(const Operand& o, const StepCall& call) const {
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
      to.data = plane(call, 2 * o.index + (o.space == kValuesSpace));
      to.row_stride = head_size_;
      to.rows = call.capacity;
      to.stride[1] = call.capacity * head_size_;
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

}  // namespace cerberus
