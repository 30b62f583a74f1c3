// What torch calls for an op on a device: prepare_<op>, then the kernel, then the results. For the files that
// register the ops of ops.h, each of which says in a class what its device does:
//
//   explicit Device(const Tensor& first);  // the op's first argument; before prepare_<op>
//   static constexpr Splits kSplits;        // see prepare.h
//   void run(const char* op, kernel, args) const;  // calls or enqueues it
#pragma once

#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "ops.h"
#include "prepare.h"

namespace cerberus {

// The ops of ops.h as types: op::<name>.
namespace op {
#define CERBERUS_DESCRIBE(name, Name, schema)          \
  struct name {                                        \
    static constexpr const char* kName = #name;        \
    static constexpr const char* kSchema = schema;     \
    static constexpr auto* kPrepare = &prepare_##name; \
  };
CERBERUS_OPS(CERBERUS_DESCRIBE)
#undef CERBERUS_DESCRIBE
}  // namespace op

// `call` is the function of an op for torch, with the arguments of prepare_<op>.
template <typename Op, typename Device, auto kKernel, typename Prepare = std::decay_t<decltype(Op::kPrepare)>>
struct Bound;

template <typename Op, typename Device, auto kKernel, typename Call, typename... Others>
struct Bound<Op, Device, kKernel, Call (*)(const Tensor&, Others...)> {
  static auto call(const Tensor& first, Others... others) {
    const Device device(first);
    const Call prepared = Op::kPrepare(first, others...);
    device.run(Op::kName, kKernel, prepared.args);
    return prepared.result();
  }
};

// Of an op whose scratch depends on how the device splits the call.
template <typename Op, typename Device, auto kKernel, typename Call, typename... Others>
struct Bound<Op, Device, kKernel, Call (*)(const Splits&, const Tensor&, Others...)> {
  static auto call(const Tensor& first, Others... others) {
    const Device device(first);
    const Call prepared = Op::kPrepare(Device::kSplits, first, others...);
    device.run(Op::kName, kKernel, prepared.args);
    return prepared.result();
  }
};

template <typename Op, typename Device, auto kKernel>
void register_op(torch::stable::detail::StableLibrary& m) {
  using Function = Bound<Op, Device, kKernel>;
  m.impl(Op::kName, TORCH_BOX(&Function::call));
}

}  // namespace cerberus
