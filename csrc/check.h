// The checks of prepare.cpp. Each one throws std::runtime_error with a message of one form:
// "<op>: <argument> must be <what>, got <what it is>".
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "args.h"

namespace cerberus {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As Python prints a tuple.
inline std::string tuple_text(const int64_t* numbers, size_t count) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < count; ++i) out << (i ? ", " : "") << numbers[i];
  out << (count == 1 ? ",)" : ")");
  return out.str();
}

inline std::string shape_text(const Tensor& tensor) {
  return tuple_text(tensor.sizes().data(), tensor.sizes().size());
}

inline std::string shape_text(std::initializer_list<int64_t> sizes) {
  return tuple_text(sizes.begin(), sizes.size());
}

// torch refuses to name a dtype that its stable API does not know, a quantized one say.
inline ScalarType dtype_of(const Tensor& tensor) {
  try {
    return tensor.scalar_type();
  } catch (const std::exception&) {
    int32_t number = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &number));
    return static_cast<ScalarType>(number);
  }
}

inline std::string dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::UInt16:
      return "torch.uint16";
    case ScalarType::UInt32:
      return "torch.uint32";
    case ScalarType::UInt64:
      return "torch.uint64";
    case ScalarType::ComplexHalf:
      return "torch.complex32";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    case ScalarType::QInt8:
      return "torch.qint8";
    case ScalarType::QUInt8:
      return "torch.quint8";
    case ScalarType::QInt32:
      return "torch.qint32";
    default:
      return "dtype number " + std::to_string(static_cast<int>(type));
  }
}

inline int32_t device_type(const Tensor& tensor) {
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

inline std::string device_text(const Tensor& tensor) {
  const int32_t type = device_type(tensor);
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  const std::string name =
      type == aoti_torch_device_type_cuda() ? "cuda" : "device type " + std::to_string(type);
  return name + ":" + std::to_string(tensor.get_device_index());
}

// How the elements lie: torch.strided, or something that has no plain memory.
inline std::string layout_text(int32_t layout) {
  if (layout == aoti_torch_layout_strided()) return "torch.strided";
  if (layout == aoti_torch_layout_sparse_coo()) return "torch.sparse_coo";
  if (layout == aoti_torch_layout_sparse_csr()) return "torch.sparse_csr";
  if (layout == aoti_torch_layout_sparse_csc()) return "torch.sparse_csc";
  if (layout == aoti_torch_layout_sparse_bsr()) return "torch.sparse_bsr";
  if (layout == aoti_torch_layout_sparse_bsc()) return "torch.sparse_bsc";
  if (layout == aoti_torch_layout__mkldnn()) return "torch._mkldnn";
  if (layout == aoti_torch_layout_jagged()) return "torch.jagged";
  return "layout number " + std::to_string(layout);
}

// The checks of one call. The first tensor that is checked sets the device, the first floating-point one the
// dtype, and the others must agree with it.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  [[noreturn]] void fail(const char* argument, const std::string& must_be, const std::string& got) const {
    throw std::runtime_error(std::string(op_) + ": " + argument + " must be " + must_be + ", got " + got);
  }

  // A tensor with sizes, strides and memory. bind_cpu.cpp gives us sparse, quantized and nested tensors, too,
  // so that the refusal names the argument. Nothing that asks for sizes or strides may come before `plain`.
  void plain(const Tensor& tensor, const char* argument) const {
    if (!tensor.defined()) fail(argument, "a tensor", "None");
    int32_t layout = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
    if (layout != aoti_torch_layout_strided())
      fail(argument, "a tensor of layout torch.strided", layout_text(layout));
    bool has_sizes = true;
    try {
      tensor.sizes();
      tensor.is_contiguous();
    } catch (const std::exception&) {
      has_sizes = false;
    }
    if (!has_sizes)
      fail(argument, "a plain tensor", "one without sizes and strides, such as a nested tensor");
  }

  // A floating-point tensor of `rank` axes, which `letters` names: "(B, D)".
  void floating(const Tensor& tensor, const char* argument, int64_t rank, const char* letters) {
    common(tensor, argument, rank, letters);
    floating_dtype(tensor, argument);
  }
  // Of any shape.
  void floating(const Tensor& tensor, const char* argument) {
    common(tensor, argument, kAnyRank, "");
    floating_dtype(tensor, argument);
  }

  void integer(const Tensor& tensor, const char* argument, int64_t rank, const char* letters,
               ScalarType type) {
    common(tensor, argument, rank, letters);
    if (dtype_of(tensor) != type) fail(argument, dtype_text(type), dtype_text(dtype_of(tensor)));
  }

  void sizes(const Tensor& tensor, const char* argument, const char* letters,
             std::initializer_list<int64_t> expected) const {
    int64_t axis = 0;
    for (const int64_t size : expected)
      if (tensor.size(axis++) != size)
        fail(argument, std::string(letters) + " = " + shape_text(expected), shape_text(tensor));
  }

  void on_cpu(const Tensor& tensor, const char* argument) const {
    if (device_type(tensor) != aoti_torch_device_type_cpu()) fail(argument, "on cpu", device_text(tensor));
  }

  // Ancestors (N, W) of one of several texts, which has some of the nodes that are left; returns how many.
  // noun: what these are called in a message.
  int64_t nodes_of_text(const Tensor& ancestors, int64_t left, const char* noun) {
    integer(ancestors, "ancestors", 2, "(N, W)", ScalarType::Long);
    const int64_t nodes = ancestors.size(0);
    that(nodes >= 1 && nodes <= left, "ancestors",
         "(N, W) with N from 1 to the " + std::to_string(left) + " " + noun + " that are left", nodes);
    sizes(ancestors, "ancestors", "(N, W)", {nodes, (nodes + 63) / 64});
    return nodes;
  }

  // An axis that may not be empty.
  void not_empty(const Tensor& tensor, const char* argument, const char* letters, int64_t axis,
                 const char* letter) const {
    if (tensor.size(axis) < 1)
      fail(argument, std::string(letters) + " with " + letter + " >= 1", shape_text(tensor));
  }

  template <typename Number>
  void that(bool correct, const char* argument, const std::string& must_be, Number got) const {
    if (correct) return;
    std::ostringstream text;
    text << got;
    fail(argument, must_be, text.str());
  }

  const char* op() const { return op_; }
  // The tensor by whose sizes results are allocated, and by whose device.
  const char* first_argument() const { return first_argument_; }

  DType dtype() const {
    switch (type_) {
      case ScalarType::BFloat16:
        return DType::kBFloat16;
      case ScalarType::Half:
        return DType::kFloat16;
      default:
        return DType::kFloat32;
    }
  }
  ScalarType scalar_type() const { return type_; }
  int64_t element_bytes() const { return type_ == ScalarType::Float ? 4 : 2; }

 private:
  static constexpr int64_t kAnyRank = -1;

  void floating_dtype(const Tensor& tensor, const char* argument) {
    const ScalarType type = dtype_of(tensor);
    if (!floating_argument_) {
      if (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half)
        fail(argument, "torch.float32, torch.bfloat16 or torch.float16", dtype_text(type));
      floating_argument_ = argument;
      type_ = type;
    } else if (type != type_) {
      fail(argument, dtype_text(type_) + " like " + floating_argument_, dtype_text(type));
    }
  }

  void common(const Tensor& tensor, const char* argument, int64_t rank, const char* letters) {
    plain(tensor, argument);
    if (rank != kAnyRank && tensor.dim() != rank) fail(argument, letters, shape_text(tensor));
    if (!first_argument_) {
      first_argument_ = argument;
      device_type_ = device_type(tensor);
      device_index_ = tensor.get_device_index();
      device_ = device_text(tensor);
    } else if (device_type(tensor) != device_type_ || tensor.get_device_index() != device_index_) {
      fail(argument, "on " + device_ + " like " + first_argument_, device_text(tensor));
    }
    if (!tensor.is_contiguous())
      fail(argument, "contiguous",
           "shape " + shape_text(tensor) + " with strides " +
               tuple_text(tensor.strides().data(), tensor.dim()));
  }

  const char* op_;
  const char* first_argument_ = nullptr;
  const char* floating_argument_ = nullptr;
  ScalarType type_ = ScalarType::Float;
  int32_t device_type_ = 0, device_index_ = 0;
  std::string device_;
};

}  // namespace cerberus
