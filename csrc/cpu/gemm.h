// Rows times weights: dot(x[m], w[n]) for every row m and every weight row n, weights streamed from memory once.
//
// Every dot product is one chain of fused multiply-adds per vector lane over k = 0, kLanes, ..., the lanes then added in
// one fixed order. The blocking below decides only which dot products are computed side by side, never the order of
// the operations in one: a row's results have the same bits whatever the other rows are.
#pragma once

#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileWeights = 4;  // 24 accumulators, 4 weights and a row of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 4, kTileWeights = 3;  // 12 accumulators, 3 weights and a row of 16 registers
#else
constexpr int kTileRows = 3, kTileWeights = 3;
#endif
constexpr int kSingleRowWeights = 8;  // for a single row: enough chains to hide the latency of the multiply-add

template <int kRows, int kWeights, typename W>
static inline void dot_tile(const float* x, int64_t x_stride, const W* w, int64_t w_stride, int64_t size,
                            float (&out)[kRows][kWeights]) {
  Vec sums[kRows][kWeights] = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    Vec weights[kWeights];
#pragma GCC unroll 8
    for (int n = 0; n < kWeights; ++n) weights[n] = load(w + n * w_stride + k);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec row = load(x + m * x_stride + k);
#pragma GCC unroll 8
      for (int n = 0; n < kWeights; ++n) sums[m][n] += row * weights[n];
    }
  }
  if (k < size) {
    Vec weights[kWeights];
#pragma GCC unroll 8
    for (int n = 0; n < kWeights; ++n) weights[n] = load_part(w + n * w_stride + k, size - k);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec row = load_part(x + m * x_stride + k, size - k);
#pragma GCC unroll 8
      for (int n = 0; n < kWeights; ++n) sums[m][n] += row * weights[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kWeights; ++n) out[m][n] = sum(sums[m][n]);
}

template <int kRows, int kWeights, typename W, typename Store>
static inline void dot_block(const float* x, int64_t x_stride, int64_t first_row, const W* w, int64_t w_stride,
                             int64_t first_weight, int64_t size, const Store& put) {
  float out[kRows][kWeights];
  dot_tile<kRows, kWeights>(x + first_row * x_stride, x_stride, w, w_stride, size, out);
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kWeights; ++n) put(first_row + m, first_weight + n, out[m][n]);
}

// All rows against kWeights weight rows at w.
template <int kWeights, typename W, typename Store>
static inline void all_rows(const float* x, int64_t x_stride, int64_t rows, const W* w, int64_t w_stride,
                            int64_t first_weight, int64_t size, const Store& put) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows)
    dot_block<kTileRows, kWeights>(x, x_stride, m, w, w_stride, first_weight, size, put);
  for (; m + 2 <= rows; m += 2) dot_block<2, kWeights>(x, x_stride, m, w, w_stride, first_weight, size, put);
  for (; m < rows; ++m) dot_block<1, kWeights>(x, x_stride, m, w, w_stride, first_weight, size, put);
}

// put(m, n, dot(x[m], w[n])) for m in [0, rows) and n in [begin, end). x (rows, size) with row stride x_stride;
// w[n] at w + n * size.
template <typename W, typename Store>
static void rows_times_weights(const float* x, int64_t x_stride, int64_t rows, const W* w, int64_t begin, int64_t end,
                               int64_t size, const Store& put) {
  int64_t n = begin;
  if (rows == 1) {
    for (; n + kSingleRowWeights <= end; n += kSingleRowWeights)
      dot_block<1, kSingleRowWeights>(x, x_stride, 0, w + n * size, size, n, size, put);
  }
  if (sizeof(W) != sizeof(float) && rows > kTileRows) {
    // Several tiles read the same weights: widen them once.
    Scratch wide(kTileWeights * size);
    for (; n + kTileWeights <= end; n += kTileWeights) {
      for (int64_t i = 0; i < kTileWeights; ++i) {
        const W* from = w + (n + i) * size;
        float* to = wide.data + i * size;
        int64_t k = 0;
        for (; k + kLanes <= size; k += kLanes) store(load(from + k), to + k);
        for (; k < size; ++k) to[k] = to_float(from[k]);
      }
      all_rows<kTileWeights>(x, x_stride, rows, wide.data, size, n, size, put);
    }
  } else {
    for (; n + kTileWeights <= end; n += kTileWeights)
      all_rows<kTileWeights>(x, x_stride, rows, w + n * size, size, n, size, put);
  }
  for (; n < end; ++n) all_rows<1>(x, x_stride, rows, w + n * size, size, n, size, put);
}

// x widened to float: the array itself where it is float already.
template <typename T>
static inline const float* widen(const T* x, int64_t count, float* scratch) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(load(x + i), scratch + i);
  for (; i < count; ++i) scratch[i] = to_float(x[i]);
  return scratch;
}
static inline const float* widen(const float* x, int64_t, float*) { return x; }
template <typename T>
constexpr int64_t widened_floats(int64_t count) {
  return sizeof(T) == sizeof(float) ? 0 : count;
}

// Weight rows a task: about 128 KiB of weights, so that handing out a task costs little and threads finish together.
static inline int64_t weight_rows_per_task(int64_t size, int64_t element_bytes) {
  const int64_t rows = (128 << 10) / larger(1, size * element_bytes);
  return larger(kSingleRowWeights * kTileWeights, rows / (kSingleRowWeights * kTileWeights) *
                                                      (kSingleRowWeights * kTileWeights));
}

}  // namespace cerberus::CERBERUS_ISA
