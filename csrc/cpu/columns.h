// Rows times the columns of weights (I, O), outputs side by side in memory: out[m][n] = sum over k of
// x[m][k] w[k][n].
//
// A lane is an output, and every output one chain of fused multiply-adds over k = 0, 1, 2, ...: whatever the
// other rows are, and wherever in a vector the output stands.
#pragma once

#include "cpu/product.h"

namespace cerberus::CERBERUS_ISA {

constexpr int kColumnVectors = 8;                            // side by side at most
constexpr int64_t kColumnsAtOnce = kColumnVectors * kLanes;  // those of a task
constexpr int64_t kRowsAhead = 12;  // k: the rows of weights lie pages apart, so that each is asked for early

#if defined(__AVX512F__)
constexpr int kColumnSums = 24, kColumnRows = 6;
#elif defined(__AVX2__)
constexpr int kColumnSums = 12, kColumnRows = 3;
#else
constexpr int kColumnSums = 8, kColumnRows = 2;
#endif

// The largest power of two of vectors whose sums of so many rows stay in registers.
constexpr int column_vectors(int rows) {
  int vectors = kColumnVectors;
  while (vectors * rows > kColumnSums) vectors /= 2;
  return vectors;
}

template <int kRows, int kVectors, typename W, typename Load>
static inline void column_tile(const float* x, int64_t size, const W* w, int64_t out_size,
                               const Load& load_at, float (&out)[kRows][kVectors * kLanes]) {
  Vec sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < size; ++k, w += out_size) {
    const char* ahead = reinterpret_cast<const char*>(w + kRowsAhead * out_size);
#pragma GCC unroll 8
    for (int64_t line = 0; line < kVectors * kLanes * static_cast<int64_t>(sizeof(W)); line += 64)
      __builtin_prefetch(ahead + line);
    Vec weights[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) weights[v] = load_at(w + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec row = broadcast(x[m * size + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[m][v] = multiply_add(row, weights[v], sums[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(sums[m][v], out[m] + v * kLanes);
}

// A tile of one vector, of which only `kCount` columns exist, in a shape of its own for what takes the tile.
template <int kRows, typename W>
static inline void last_columns(const float* x, int64_t size, const W* w, int64_t out_size, int64_t count,
                                int64_t m, int64_t n, const Output<W>& output) {
  float out[kRows][kLanes];
  column_tile<kRows, 1>(x, size, w, out_size, [count](const W* p) { return load_part(p, count); }, out);
  for (int row = 0; row < kRows; ++row)
    for (int64_t i = 0; i < count; ++i) {
      const float one[1][1] = {{out[row][i]}};
      output.put(m + row, n + i, one);
    }
}

template <int kRows, typename W>
static void tile_of_rows(const float* x, int64_t size, const W* w, int64_t begin, int64_t end,
                         int64_t out_size, int64_t m, const Output<W>& output) {
  constexpr int kVectors = column_vectors(kRows);
  const auto load_all = [](const W* p) { return load(p); };
  int64_t n = begin;
  for (; n + kVectors * kLanes <= end; n += kVectors * kLanes) {
    float out[kRows][kVectors * kLanes];
    column_tile<kRows, kVectors>(x + m * size, size, w + n, out_size, load_all, out);
    output.put(m, n, out);
  }
  for (; n + kLanes <= end; n += kLanes) {
    float out[kRows][kLanes];
    column_tile<kRows, 1>(x + m * size, size, w + n, out_size, load_all, out);
    output.put(m, n, out);
  }
  if (n < end) last_columns<kRows>(x + m * size, size, w + n, out_size, end - n, m, n, output);
}

// Every m in [0, rows) and n in [begin, end). x (rows, size), w (size, out_size).
template <typename W>
static void rows_times_columns(const float* x, int64_t size, int64_t rows, const W* w, int64_t begin,
                               int64_t end, int64_t out_size, const Output<W>& output) {
  int64_t m = 0;
  const auto rest = [&](auto row_count) {
    constexpr int kRows = decltype(row_count)::value;
    if constexpr (kRows < kColumnRows)
      if (rows - m == kRows) tile_of_rows<kRows>(x, size, w, begin, end, out_size, m, output);
  };
  for (; m + kColumnRows <= rows; m += kColumnRows)
    tile_of_rows<kColumnRows>(x, size, w, begin, end, out_size, m, output);
  rest(Count<1>{});
  rest(Count<2>{});
  rest(Count<3>{});
  rest(Count<4>{});
  rest(Count<5>{});
}

}  // namespace cerberus::CERBERUS_ISA
