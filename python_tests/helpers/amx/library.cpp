// The products of level amx_bf16 for a test to call, without torch and on two threads.
#include <atomic>
#include <thread>

#include "cpu/kernels.h"

namespace {

void run_on_two(int64_t tasks, cerberus::Parallel::Body body, const void* state) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(state, task);
  };
  std::thread other(work);
  work();
  other.join();
}

}  // namespace

extern "C" void amx_linear(int64_t rows, int64_t in_size, int64_t out_size, int64_t groups, const void* input,
                           const void* weight, const void* bias, const int64_t* ends, void* output,
                           int64_t threads) {
  const cerberus::LinearArgs args{
      cerberus::DType::kBFloat16, rows, in_size, out_size, groups, false, input, weight, bias, ends, output};
  cerberus::amx_bf16::linear(args, {run_on_two, threads});
}
