// input @ weight^T + bias, row-invariant. Few rows: a task owns a range of weight rows and streams it once
// for all rows. Many rows, those of a prompt: a task owns some of them, and streams all weights.
#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace cerberus::CERBERUS_ISA {
namespace {

// A tile of dot products, with the bias if there is one, into the output. `to` and `bias` are where the tile
// begins.
template <typename T, int kRows, int kWeights>
void store_tile(const float (&dots)[kRows][kWeights], const T* bias, T* to, int64_t stride) {
  constexpr int kAll = kRows * kWeights, kFours = kAll / 4;
  const float* all = &dots[0][0];
  T rounded[kAll];
  if (bias) {
    for (int i = 0; i < kAll; ++i) from_float(all[i] + to_float(bias[i % kWeights]), rounded[i]);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kFours; ++i) from_four(all + 4 * i, rounded + 4 * i);
    for (int i = 4 * kFours; i < kAll; ++i) from_float(all[i], rounded[i]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kWeights; ++n) to[m * stride + n] = rounded[m * kWeights + n];
}

template <typename T>
void run(const LinearArgs& a, const Parallel& parallel) {
  const int64_t size = a.in_size;
  const T* input = static_cast<const T*>(a.input);
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  T* output = static_cast<T*>(a.output);
  // x: `rows` rows from `first` on, as float; for the weights from `begin` to `end`.
  const auto multiply = [&](const float* x, int64_t first, int64_t rows, int64_t begin, int64_t end) {
    rows_times_weights(x, size, rows, weight, begin, end, size, [&](int64_t m, int64_t n, const auto& dots) {
      store_tile(dots, bias ? bias + n : nullptr, output + (first + m) * a.out_size + n, a.out_size);
    });
  };

  const int64_t blocks = row_blocks(a.rows, size);
  if (blocks >= 2 * parallel.threads) {
    const int64_t tasks = (blocks + parallel.threads - 1) / parallel.threads * parallel.threads;
    parallel_tasks(parallel, tasks, [&](int64_t task) {
      const int64_t first = a.rows * task / tasks, count = a.rows * (task + 1) / tasks - first;
      Scratch wide(widened_floats<T>(count * size));
      multiply(widen(input + first * size, count * size, wide.data), first, count, 0, a.out_size);
    });
    return;
  }
  Scratch wide(widened_floats<T>(a.rows * size));
  const float* x = widen(input, a.rows * size, wide.data);
  const int64_t per_task = weight_rows_per_task(size, sizeof(T));
  parallel_tasks(parallel, (a.out_size + per_task - 1) / per_task, [&](int64_t task) {
    multiply(x, 0, a.rows, task * per_task, smaller(a.out_size, (task + 1) * per_task));
  });
}

}  // namespace

void linear(const LinearArgs& a, const Parallel& parallel) {
  if (a.rows == 0) return;
  with_type(a.dtype, [&](auto type) { run<decltype(type)>(a, parallel); });
}

}  // namespace cerberus::CERBERUS_ISA
