// Products of rows with weights, for the kernels of a level: what gemm.cpp defines, and how it wants its
// rows.
//
// The tile kernels are many and large, so that one file of a level has them, and all of its products are
// theirs.
#pragma once

#include "cpu/parts.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {

// An element of a row in pairs: of every 2 kLanes elements first those of even, then those of odd numbers;
// zeros behind the last.
struct PairedFloat {
  float value;
};

// The type that rows are in beside weights of T: with the processor's bfloat16 instructions as they are; with
// multiply-adds in pairs, as the two halves of a vector of 32-bit words are those of bfloat16 weights.
template <typename T>
struct RowOf {
  using Type = float;
};
#if defined(__AVX512BF16__)
template <>
struct RowOf<BFloat16> {
  using Type = BFloat16;
};
#elif defined(__AVX2__)
template <>
struct RowOf<BFloat16> {
  using Type = PairedFloat;
};
#endif
template <typename T>
using Row = typename RowOf<T>::Type;

// As many at a time as there are: a row of the tile, read again in pieces of another size than it was written
// in, waits for the store to reach the cache, unless its piece was written whole.
template <int kCount, int kAtOnce = kLanes, typename T>
static inline __attribute__((always_inline)) void round_all(const float* x, T* out) {
  constexpr int kDone = kCount / kAtOnce * kAtOnce;
#pragma GCC unroll 8
  for (int i = 0; i < kDone; i += kAtOnce) from_floats<kAtOnce>(x + i, out + i);
  if constexpr (kDone < kCount) round_all<kCount - kDone, kAtOnce / 2>(x + kDone, out + kDone);
}

// A tile of sums, with the bias if there is one, into the output. `to` and `bias` are where the tile begins.
template <typename T, int kRows, int kWeights>
static inline __attribute__((always_inline)) void store_tile(const float (&dots)[kRows][kWeights],
                                                             const T* bias, T* to, int64_t stride) {
  constexpr int kAll = kRows * kWeights;
  const float* all = &dots[0][0];
  float with_bias[kAll];
  if (bias) {
    for (int n = 0; n < kWeights; ++n) {
      const float added = to_float(bias[n]);
      for (int m = 0; m < kRows; ++m) with_bias[m * kWeights + n] = dots[m][n] + added;
    }
    all = with_bias;
  }
  T rounded[kAll];
  round_all<kAll>(all, rounded);
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
    __builtin_memcpy(to + m * stride, rounded + m * kWeights, kWeights * sizeof(T));
}

// Where a product goes: the sum of row m and weight n to place n of row m, rounded after `bias` is added, or
// as it is. Which one is asked once a tile: a type for each would double the tile kernels.
template <typename T>
struct Output {
  T* rounded;      // (rows, stride)
  float* sums;     // not null: here instead, without bias
  int64_t stride;  // from row to row
  const T* bias;   // for each weight, or null

  Output from_row(int64_t row) const {
    return {rounded ? rounded + row * stride : nullptr, sums ? sums + row * stride : nullptr, stride, bias};
  }

  Output from_weight(int64_t weight) const {
    return {rounded ? rounded + weight : nullptr, sums ? sums + weight : nullptr, stride,
            bias ? bias + weight : nullptr};
  }

  // A tile of sums: dots[i][j] is that of row m + i and weight n + j.
  template <int kRows, int kWeights>
  inline __attribute__((always_inline)) void put(int64_t m, int64_t n,
                                                 const float (&dots)[kRows][kWeights]) const {
    if (sums) {
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row)
        __builtin_memcpy(sums + (m + row) * stride + n, dots[row], sizeof(dots[row]));
    } else {
      store_tile(dots, bias ? bias + n : nullptr, rounded + m * stride + n, stride);
    }
  }
};

// Rows x, each of row_elements<T>(size), x_stride apart, times weights w[n] at w + n * size, n from `begin`
// to `end`.
template <typename T>
void rows_times_weights(const Row<T>* x, int64_t x_stride, int64_t rows, const T* w, int64_t begin,
                        int64_t end, int64_t size, const Output<T>& output);

// Weights in tiles of kPackedWeights rows, in a form that packed.cpp knows. make: steps `first` on of a tile,
// as they are multiplied: of every step the parts of one weight row after the other.
template <typename T>
struct PackedTiles {
  const char* tiles;
  int64_t tile_bytes, size;  // size: of k
  void (*make)(const PackedTiles& packed, int64_t tile, int64_t first, int64_t steps, Row<T>* to);
};

// Many rows times weight rows `begin` to `end`; begin is where a tile begins.
template <typename T>
void rows_times_tiles(const Row<T>* x, int64_t x_stride, int64_t rows, const PackedTiles<T>& packed,
                      int64_t begin, int64_t end, const Output<T>& output);

// Rows are read again for every tile of weights: so many bytes of them at a time, from the L2 cache.
constexpr int64_t kBlockBytes = 64 << 10, kMinBlockRows = 16;

static inline int64_t row_blocks(int64_t rows, int64_t row_bytes) {
  const int64_t fitting = larger(kMinBlockRows, kBlockBytes / larger(1, row_bytes));
  return (rows + fitting - 1) / fitting;
}

// How many elements a row of `size` takes beside weights of T.
template <typename T>
constexpr int64_t row_elements(int64_t size) {
  constexpr int64_t kPairs = 2 * kLanes;
  return sizeof(Row<T>) == sizeof(PairedFloat) && sizeof(T) == 2 ? (size + kPairs - 1) / kPairs * kPairs
                                                                 : size;
}

// A row of `size` elements, as products read it.
static inline void lay_row(const BFloat16* from, int64_t size, BFloat16* to) {
  __builtin_memcpy(to, from, static_cast<size_t>(size) * sizeof(BFloat16));
}
template <typename T>
static inline void lay_row(const T* from, int64_t size, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(load(from + i), to + i);
  for (; i < size; ++i) to[i] = to_float(from[i]);
}
static inline void lay_row(const float* from, int64_t size, float* to) {
  __builtin_memcpy(to, from, static_cast<size_t>(size) * sizeof(float));
}
static inline void lay_row(const BFloat16* from, int64_t size, PairedFloat* to) {
  for (int64_t i = 0; i < size; i += 2 * kLanes, to += 2 * kLanes) {
    const Pairs pairs = size - i < 2 * kLanes ? load_pairs(from + i, size - i) : load_pairs(from + i);
    store(pairs.even(), &to->value);
    store(pairs.odd(), &to->value + kLanes);
  }
}

constexpr int64_t kWholeTiles = 24;  // weight rows: tiles of every shape end there

// Weight rows a task, a multiple of `whole`: about 128 KiB of weights, so that handing out a task costs
// little and threads finish together.
static inline int64_t weight_rows_per_task(int64_t size, int64_t element_bytes, int64_t whole = kWholeTiles) {
  const int64_t rows = (128 << 10) / larger(1, size * element_bytes);
  return larger(whole, rows / whole * whole);
}

}  // namespace cerberus::CERBERUS_ISA
