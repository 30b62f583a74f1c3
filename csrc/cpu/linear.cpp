// input @ weight^T + bias, row-invariant. A task owns a range of weight rows and streams it once for all
// rows.
#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace cerberus::CERBERUS_ISA {

void linear(const LinearArgs& a, const Parallel& parallel) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T* weight = static_cast<const T*>(a.weight);
    const T* bias = static_cast<const T*>(a.bias);
    T* output = static_cast<T*>(a.output);
    Scratch wide(widened_floats<T>(a.rows * a.in_size));
    const float* input = widen(static_cast<const T*>(a.input), a.rows * a.in_size, wide.data);
    const int64_t per_task = weight_rows_per_task(a.in_size, sizeof(T));
    parallel_tasks(parallel, a.rows ? (a.out_size + per_task - 1) / per_task : 0, [&](int64_t task) {
      rows_times_weights(input, a.in_size, a.rows, weight, task * per_task,
                         smaller(a.out_size, (task + 1) * per_task), a.in_size,
                         [&](int64_t m, int64_t n, float dot) {
                           from_float(bias ? dot + to_float(bias[n]) : dot, output[m * a.out_size + n]);
                         });
    });
  });
}

}  // namespace cerberus::CERBERUS_ISA
