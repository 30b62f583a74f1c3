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

// A tile is rows x weights, a register for each of their sums. The more of them, the more sums are in flight,
// and the less often a weight or a row is loaded; the others hold the weights and a row.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kSums = 24;
#elif defined(__AVX2__)
constexpr int kTileRows = 4, kSums = 12;
#else
constexpr int kTileRows = 3, kSums = 9;
#endif
constexpr int kSingleRowWeights =
    8;  // for a single row: enough chains to hide the latency of the multiply-add

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
  // What there is less of stays in registers, the other comes one by one.
  const auto step = [&](const auto& load_at) {
    if constexpr (kWeights <= kRows) {
      Vec weights[kWeights];
#pragma GCC unroll 12
      for (int n = 0; n < kWeights; ++n) weights[n] = load_at(w + n * size);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const Vec row = load_at(x + m * x_stride);
#pragma GCC unroll 12
        for (int n = 0; n < kWeights; ++n) sums[m][n] = multiply_add(row, weights[n], sums[m][n]);
      }
    } else {
      Vec rows[kRows];
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) rows[m] = load_at(x + m * x_stride);
#pragma GCC unroll 12
      for (int n = 0; n < kWeights; ++n) {
        const Vec weight = load_at(w + n * size);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) sums[m][n] = multiply_add(rows[m], weight, sums[m][n]);
      }
    }
  };
  for (; k + kLanes <= size; k += kLanes) {
    ahead.prefetch();
    step([k](const auto* p) { return load(p + k); });
  }
  if (k < size) step([k, size](const auto* p) { return load_part(p + k, size - k); });
  const Vec* all = &sums[0][0];
  float* each = &out[0][0];
  constexpr int kFours = kRows * kWeights / 4 * 4;
#pragma GCC unroll 8
  for (int i = 0; i < kFours; i += 4) sum_four({all[i], all[i + 1], all[i + 2], all[i + 3]}, each + i);
#pragma GCC unroll 4
  for (int i = kFours; i < kRows * kWeights; ++i) each[i] = sum(all[i]);
}

// All rows against kWeights weight rows at w, the first of which is number first_weight: `tiles` tiles of
// kMostRows rows or one less.
template <int kMostRows, int kWeights, typename W, typename Store>
static inline void all_rows(const float* x, int64_t x_stride, int64_t rows, int64_t tiles, const W* w,
                            int64_t first_weight, int64_t size, const Store& put) {
  // Every tile asks for its share of the next weights.
  const int64_t weight_bytes = kWeights * static_cast<int64_t>(sizeof(W)),
                share = weight_bytes * size / tiles;
  Ahead ahead{reinterpret_cast<const char*>(w + kWeights * size), weight_bytes * kLanes / tiles};
  const auto tile = [&](int64_t m, auto row_count) {
    constexpr int kRows = decltype(row_count)::value;
    float out[kRows][kWeights];
    dot_tile<kRows, kWeights>(x + m * x_stride, x_stride, w, size, ahead, out);
    ahead.p += share;
    put(m, first_weight, out);
  };
  int64_t m = 0;
  for (const int64_t full = rows - tiles * (kMostRows - 1); m < full * kMostRows; m += kMostRows)
    tile(m, Count<kMostRows>{});
  if constexpr (kMostRows > 1)
    for (; m < rows; m += kMostRows - 1) tile(m, Count<kMostRows - 1>{});
}

template <int kMostRows, typename W, typename Store>
static void tiles_times_weights(const float* x, int64_t x_stride, int64_t rows, int64_t tiles, const W* w,
                                int64_t begin, int64_t end, int64_t size, const Store& put) {
  constexpr int kWeights = kMostRows == 1 ? kSingleRowWeights : kSums / kMostRows;
  int64_t n = begin;
  for (; n + kWeights <= end; n += kWeights)
    all_rows<kMostRows, kWeights>(x, x_stride, rows, tiles, w + n * size, n, size, put);
  for (; n < end; ++n) all_rows<kMostRows, 1>(x, x_stride, rows, tiles, w + n * size, n, size, put);
}

template <typename W, typename Store>
static void block_times_weights(const float* x, int64_t x_stride, int64_t rows, const W* w, int64_t begin,
                                int64_t end, int64_t size, const Store& put) {
  // As few tiles as possible, of as even sizes as possible: a tile of few rows takes as long as a larger one.
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, most_rows = (rows + tiles - 1) / tiles;
  const auto run = [&](auto row_count) {
    constexpr int kRows = decltype(row_count)::value;
    if constexpr (kRows <= kTileRows)
      if (most_rows == kRows) tiles_times_weights<kRows>(x, x_stride, rows, tiles, w, begin, end, size, put);
  };
  run(Count<1>{});
  run(Count<2>{});
  run(Count<3>{});
  run(Count<4>{});
  run(Count<5>{});
  run(Count<6>{});
}

// Rows are read again for every tile of weights: so many bytes of them at a time, from the L2 cache.
constexpr int64_t kBlockBytes = 64 << 10, kLeastBlockRows = 16;

static inline int64_t row_blocks(int64_t rows, int64_t size) {
  const int64_t fitting = larger(kLeastBlockRows, kBlockBytes / larger(1, 4 * size));
  return (rows + fitting - 1) / fitting;
}

// Calls put(m, n, dots) for every tile: dots[i][j] = dot(x[m + i], w[n + j]). Together they are all m in
// [0, rows) and n in [begin, end). x (rows, size) with row stride x_stride; w[n] at w + n * size.
template <typename W, typename Store>
static void rows_times_weights(const float* x, int64_t x_stride, int64_t rows, const W* w, int64_t begin,
                               int64_t end, int64_t size, const Store& put) {
  const int64_t blocks = row_blocks(rows, size);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
    block_times_weights(x + first * x_stride, x_stride, count, w, begin, end, size,
                        [&](int64_t m, int64_t n, const auto& dots) { put(first + m, n, dots); });
  }
}

// A tile's dot products one by one: put(m, n, dot(x[m], w[n])).
template <typename Put>
static inline auto one_by_one(const Put& put) {
  return [put](int64_t m, int64_t n, const auto& dots) {
    int64_t row = m;
    for (const auto& of_row : dots) {
      int64_t weight = n;
      for (const float dot : of_row) put(row, weight++, dot);
      ++row;
    }
  };
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

constexpr int64_t kWholeTiles = 24;  // weight rows: tiles of every shape end there

// Weight rows a task: about 128 KiB of weights, so that handing out a task costs little and threads finish
// together.
static inline int64_t weight_rows_per_task(int64_t size, int64_t element_bytes) {
  const int64_t rows = (128 << 10) / larger(1, size * element_bytes);
  return larger(kWholeTiles, rows / kWholeTiles * kWholeTiles);
}

}  // namespace cerberus::CERBERUS_ISA
