// Registers what refuses the calls that no kernel can serve, and names the argument that is the reason.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "bind.h"
#include "check.h"

namespace cerberus {
namespace {

using torch::stable::detail::StableLibrary;

// The names of the arguments that a schema lists: of "(Tensor(a!) keys, int depth=0) -> ()" keys and depth.
std::vector<std::string> argument_names(const std::string& schema) {
  std::vector<std::string> names;
  for (size_t end, begin = 0; begin < schema.find(") ->"); begin = end + 1) {
    end = std::min(schema.find(',', begin), schema.find(") ->"));
    const std::string argument = schema.substr(begin, end - begin);
    const size_t name = argument.rfind(' ') + 1;
    names.push_back(argument.substr(name, argument.find('=') - name));
  }
  return names;
}

bool is_changing(const char* schema) { return std::strchr(schema, '!') != nullptr; }

bool is_view(const char* question, const Tensor& tensor) {
  StableIValue stack[1] = {torch::stable::detail::from(tensor)};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_call_dispatcher(question, "", stack));
  return torch::stable::detail::to<bool>(stack[0]);
}

void refuse_lazy(const char* op, const std::string& name, const Tensor& tensor) {
  if (is_view("aten::is_neg", tensor))
    Check(op).fail(name.c_str(), "a plain tensor", "a negated view: call resolve_neg() before");
  if (is_view("aten::is_conj", tensor))
    Check(op).fail(name.c_str(), "a plain tensor", "a conjugated view: call resolve_conj() before");
}
template <typename Number>
void refuse_lazy(const char*, const std::string&, const Number&) {}

template <typename Op, typename Prepare = std::decay_t<decltype(Op::kPrepare)>>
struct Refusal;
template <typename Op, typename Call, typename... Others>
struct Refusal<Op, Call (*)(const Splits&, const Tensor&, Others...)>
    : Refusal<Op, Call (*)(const Tensor&, Others...)> {};
template <typename Op, typename Call, typename... Others>
struct Refusal<Op, Call (*)(const Tensor&, Others...)> {
  using Result = decltype(std::declval<Call>().result());

  // Where an op has no kernels: on another device, on CUDA without _cuda.so, and where every tensor is None.
  static Result device(const Tensor& first, Others...) {
    const std::string name = argument_names(Op::kSchema)[0];
    if (!first.defined()) Check(Op::kName).fail(name.c_str(), "a tensor", "None");
    Check(Op::kName).fail(name.c_str(), "on a device that the op has kernels for", device_text(first));
  }

  // A view that stands for the negated or conjugated numbers in its memory. torch gives the other ops a copy
  // of it, and cannot do so where an op changes its arguments.
  static Result lazy(const Tensor& first, Others... others) {
    const std::vector<std::string> names = argument_names(Op::kSchema);
    size_t i = 0;
    refuse_lazy(Op::kName, names[i++], first);
    (refuse_lazy(Op::kName, names[i++], others), ...);
    throw std::runtime_error(std::string(Op::kName) + ": no argument may be a negated or conjugated view");
  }
};

template <typename Op>
void register_refusal(StableLibrary& m) {
  m.impl(Op::kName, TORCH_BOX(&Refusal<Op>::device));
}
template <typename Op>
void register_lazy_refusal(StableLibrary& m) {
  if (is_changing(Op::kSchema)) m.impl(Op::kName, TORCH_BOX(&Refusal<Op>::lazy));
}

void register_refusals(StableLibrary& m) {
#define REGISTER(name, Name, schema) register_refusal<op::name>(m);
  CERBERUS_OPS(REGISTER)
#undef REGISTER
}

void register_lazy_refusals(StableLibrary& m) {
#define REGISTER(name, Name, schema) register_lazy_refusal<op::name>(m);
  CERBERUS_OPS(REGISTER)
#undef REGISTER
}

}  // namespace
}  // namespace cerberus

STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, CompositeExplicitAutograd, m) { cerberus::register_refusals(m); }
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, Negative, m) { cerberus::register_lazy_refusals(m); }
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, Conjugate, m) { cerberus::register_lazy_refusals(m); }
