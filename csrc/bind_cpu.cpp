// Registers the CPU implementation of every op: prepare, then the kernel, on as many threads as torch has.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bind.h"
#include "cpu/cpu.h"
#include "cpu/team.h"

namespace cerberus {
namespace {

struct Cpu {
  explicit Cpu(const Tensor&) {}

  static constexpr Splits kSplits = {draft_topk_parts_cpu, [](int64_t) -> int64_t { return 1; }};

  template <typename Args>
  void run(const char*, void (*kernel)(const Args&, const Parallel&), const Args& args) const {
    kernel(args, team(torch::stable::get_num_threads()));
  }
};

void register_kernels(torch::stable::detail::StableLibrary& m) {
#define REGISTER(name, Name, schema) register_op<op::name, Cpu, name##_cpu>(m);
  CERBERUS_OPS(REGISTER)
#undef REGISTER
}

}  // namespace
}  // namespace cerberus

STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, CPU, m) { cerberus::register_kernels(m); }

// Tensors that no op takes: torch sends them here instead of refusing them itself, without naming an
// argument.
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, SparseCPU, m) { cerberus::register_kernels(m); }
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, SparseCsrCPU, m) { cerberus::register_kernels(m); }
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, MkldnnCPU, m) { cerberus::register_kernels(m); }
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, QuantizedCPU, m) { cerberus::register_kernels(m); }
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, NestedTensorCPU, m) { cerberus::register_kernels(m); }
STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, AutogradNestedTensor, m) { cerberus::register_kernels(m); }

STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cerberus::cpu_isa));
}
