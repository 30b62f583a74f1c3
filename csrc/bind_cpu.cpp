// Registers the CPU implementation of every op: prepare, then the kernel on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "bind.h"
#include "cpu/cpu.h"

namespace cerberus {
namespace {

// Every thread has consecutive tasks of its own, since a task asks memory for what the next one reads; when
// they are done, it takes the others'. torch's own parallel_for waits for the slowest thread where another
// program has taken a core.
void run_on_torch_threads(int64_t tasks, Parallel::Body body, const void* state) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next = tasks * i / threads;
    shares[i].end = tasks * (i + 1) / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares[(first + i) % threads];
      for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
        body(state, task);
    }
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
