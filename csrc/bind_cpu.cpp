// Registers the CPU implementation of every op: prepare, then the kernel on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "bind.h"
#include "cpu/cpu.h"

namespace cerberus {
namespace {

// Each thread takes the next task when it is done with one: torch's own parallel_for deals them out
// beforehand, and waits for the slowest thread where another program has taken a core.
void run_on_torch_threads(int64_t tasks, Parallel::Body body, const void* state) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(
      0, std::min<int64_t>(tasks, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(state, task);
      });
}

Parallel torch_threads() { return {run_on_torch_threads, torch::stable::get_num_threads()}; }

struct Cpu {
  explicit Cpu(const Tensor&) {}

  static constexpr Splits kSplits = {draft_topk_parts_cpu,
                                     [](const TreeAttentionArgs&) -> int64_t { return 1; }};

  template <typename Args>
  void run(const char*, void (*kernel)(const Args&, const Parallel&), const Args& args) const {
    kernel(args, torch_threads());
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
