// Rows times weights: dot(x[m], w[n]) for every row m and every weight row n, weights streamed from memory
// once.
//
// Every dot product is one chain of fused multiply-adds per vector lane over k = 0, kLanes, ..., the lanes
// then added in one fixed order. The blocking below decides only which dot products are computed side by
// side, never the order of the operations in one: a row's results have the same bits whatever the other rows
// are.
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
constexpr int kSingleRowWeights =
    8;  // for a single row: enough chains to hide the latency of the multiply-add

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// Where the weights of the next tile begin, and how many bytes of them one step of the loop over k is to ask
// for: the processor computes on this tile while memory brings the next one. Its own prefetcher starts anew
// at every 4 KiB page.
struct Ahead {
  const char* p;
  int64_t step;

  void prefetch() {
    if (step > 2 * kLine) return;  // a single row of float32: memory is the limit, and its order is plain
    __builtin_prefetch(p);
    if (step > kLine) __builtin_prefetch(p + kLine);
    p += step;
  }
  static constexpr int64_t kLine = 64;
};

template <int kRows, int kWeights, typename W>
static inline void dot_tile(const float* x, int64_t x_stride, const W* w, int64_t size, Ahead ahead,
                            float (&out)[kRows][kWeights]) {
  Vec sums[kRows][kWeights] = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    ahead.prefetch();
    Vec weights[kWeights];
#pragma GCC unroll 8
    for (int n = 0; n < kWeights; ++n) weights[n] = load(w + n * size + k);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec row = load(x + m * x_stride + k);
#pragma GCC unroll 8
      for (int n = 0; n < kWeights; ++n) sums[m][n] = multiply_add(row, weights[n], sums[m][n]);
    }
  }
  if (k < size) {
    Vec weights[kWeights];
#pragma GCC unroll 8
    for (int n = 0; n < kWeights; ++n) weights[n] = load_part(w + n * size + k, size - k);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec row = load_part(x + m * x_stride + k, size - k);
#pragma GCC unroll 8
      for (int n = 0; n < kWeights; ++n) sums[m][n] = multiply_add(row, weights[n], sums[m][n]);
    }
  }
  if constexpr (kWeights % 4 == 0) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < kWeights; n += 4)
        sum_four({sums[m][n], sums[m][n + 1], sums[m][n + 2], sums[m][n + 3]}, out[m] + n);
  } else if constexpr (kRows == 4) {
#pragma GCC unroll 8
    for (int n = 0; n < kWeights; ++n) {
      float column[4];
      sum_four({sums[0][n], sums[1][n], sums[2][n], sums[3][n]}, column);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) out[m][n] = column[m];
    }
  } else {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < kWeights; ++n) out[m][n] = sum(sums[m][n]);
  }
}

// All rows against kWeights weight rows at w, the first of which is number first_weight.
template <int kMostRows, int kWeights, typename W, typename Store>
static inline void all_rows(const float* x, int64_t x_stride, int64_t rows, const W* w, int64_t first_weight,
                            int64_t size, const Store& put) {
  // Every tile of rows asks for its share of the next weights.
  const int64_t tiles = (rows + kMostRows - 1) / kMostRows,
                weight_bytes = kWeights * static_cast<int64_t>(sizeof(W));
  Ahead ahead{reinterpret_cast<const char*>(w + kWeights * size), weight_bytes * kLanes / tiles};
  const auto tile = [&](int64_t m, auto row_count) {
    constexpr int kRows = decltype(row_count)::value;
    float out[kRows][kWeights];
    dot_tile<kRows, kWeights>(x + m * x_stride, x_stride, w, size, ahead, out);
    ahead.p += weight_bytes * size / tiles;
    for (int i = 0; i < kRows; ++i)
      for (int n = 0; n < kWeights; ++n) put(m + i, first_weight + n, out[i][n]);
  };
  int64_t m = 0;
  for (; m + kMostRows <= rows; m += kMostRows) tile(m, Count<kMostRows>{});
  if constexpr (kMostRows > 2)
    for (; m + 2 <= rows; m += 2) tile(m, Count<2>{});
  for (; m < rows; ++m) tile(m, Count<1>{});
}

// put(m, n, dot(x[m], w[n])) for m in [0, rows) and n in [begin, end). x (rows, size) with row stride
// x_stride; w[n] at w + n * size.
template <typename W, typename Store>
static void rows_times_weights(const float* x, int64_t x_stride, int64_t rows, const W* w, int64_t begin,
                               int64_t end, int64_t size, const Store& put) {
  int64_t n = begin;
  if (rows == 1)
    for (; n + kSingleRowWeights <= end; n += kSingleRowWeights)
      all_rows<1, kSingleRowWeights>(x, x_stride, rows, w + n * size, n, size, put);
  for (; n + kTileWeights <= end; n += kTileWeights)
    all_rows<kTileRows, kTileWeights>(x, x_stride, rows, w + n * size, n, size, put);
  for (; n < end; ++n) all_rows<kTileRows, 1>(x, x_stride, rows, w + n * size, n, size, put);
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

// Weight rows a task: about 128 KiB of weights, so that handing out a task costs little and threads finish
// together.
static inline int64_t weight_rows_per_task(int64_t size, int64_t element_bytes) {
  const int64_t rows = (128 << 10) / larger(1, size * element_bytes);
  return larger(kSingleRowWeights * kTileWeights,
                rows / (kSingleRowWeights * kTileWeights) * (kSingleRowWeights * kTileWeights));
}

}  // namespace cerberus::CERBERUS_ISA
