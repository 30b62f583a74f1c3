// Every op with its CUDA kernel under emulation, on CPU tensors: torch.ops.cerberus_simt.<op>, with the
// schema that ops.cpp gives torch.ops.cerberus_ext.<op>: it is compiled here once more, under the other name.
// Then what a test sets: seed(int), device(multiprocessors, blocks_each, ptx_version); and launches(): how
// many there were so far.
#include <torch/csrc/stable/library.h>

#include <mutex>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "bind_device_step.h"
#include "cuda/kernels.h"
#include "emulator.h"

namespace cerberus {
namespace {

struct Emulated {
  static constexpr const char* kName = "cpu";
  static bool is_mine(const Tensor& tensor) { return device_type(tensor) == aoti_torch_device_type_cpu(); }

  explicit Emulated(const Tensor&) {}

  static constexpr Splits kSplits = {[](int64_t) { return draft_topk_parts(simt::device().multiprocessors); },
                                     tree_attention_splits};

  // The kernels of one call, run to their end.
  template <typename Args>
  void run(const char* op, cudaError_t (*kernel)(const Args&, cudaStream_t), const Args& args) const {
    static std::mutex one_call;
    const std::lock_guard<std::mutex> lock(one_call);
    try {
      if (const cudaError_t error = kernel(args, nullptr); error != cudaSuccess)
        throw std::runtime_error(std::string(op) +
                                 ": the kernel could not be launched: " + cudaGetErrorString(error));
      simt::synchronize();
    } catch (...) {
      simt::forget_launches();  // their arguments end with the call
      throw;
    }
  }
};

void seed(int64_t seed) { simt::seed(static_cast<uint64_t>(seed)); }

void device(int64_t multiprocessors, int64_t blocks_each, int64_t ptx_version) {
  simt::set_device(
      {static_cast<int>(multiprocessors), static_cast<int>(blocks_each), static_cast<int>(ptx_version)});
}

int64_t launches() { return simt::launches(); }

}  // namespace
}  // namespace cerberus

STABLE_TORCH_LIBRARY_IMPL(cerberus_simt, CPU, m) {
#define REGISTER(name, Name, schema) \
  cerberus::register_op<cerberus::op::name, cerberus::Emulated, cerberus::name##_cuda>(m);
  CERBERUS_OPS_OF_EVERY_DEVICE(REGISTER)
#undef REGISTER
}

STABLE_TORCH_LIBRARY_FRAGMENT(cerberus_simt, m) {
  cerberus::define_device_steps(m);
  m.def("launches() -> int");
  m.def("seed(int seed) -> ()");
  m.def("device(int multiprocessors, int blocks_each, int ptx_version) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cerberus_simt, CompositeExplicitAutograd, m) {
  cerberus::register_device_steps<cerberus::Emulated>(m);
  m.impl("launches", TORCH_BOX(&cerberus::launches));
  m.impl("seed", TORCH_BOX(&cerberus::seed));
  m.impl("device", TORCH_BOX(&cerberus::device));
}
