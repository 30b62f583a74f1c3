// Rows times bfloat16 weights in AMX tiles: weights as they lie in memory are the left operand, 16 outputs x
// 32 k; rows are packed once into pairs of k, 32 k x 16 rows, the right one.
//
// Every sum is taken over k = 0 .. 31, 32 .. 63, ... in the order of the instruction. How many rows and
// outputs are computed side by side plays no part; those that are missing in a tile are zeros.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/product.h"

namespace cerberus::CERBERUS_ISA {

constexpr int64_t kTile = 16;                          // outputs or rows of a tile
constexpr int64_t kTileDepth = 32;                     // k of a tile
constexpr int64_t kTileElements = kTile * kTileDepth;  // of weights or rows

static inline int64_t tile_blocks(int64_t size) { return (size + kTileDepth - 1) / kTileDepth; }
static inline int64_t packed_elements(int64_t rows, int64_t size) {
  return (rows + kTile - 1) / kTile * tile_blocks(size) * kTileElements;
}

// x (rows, size) -> packed (ceil(rows / 16), ceil(size / 32), 16 pairs of k, 16 rows, 2); zeros where there
// is nothing.
static inline void pack_rows(const BFloat16* x, int64_t rows, int64_t size, BFloat16* packed) {
  const int64_t blocks = tile_blocks(size);
  __builtin_memset(packed, 0, static_cast<size_t>(packed_elements(rows, size)) * sizeof(BFloat16));
  for (int64_t m = 0; m < rows; ++m) {
    BFloat16* to = packed + m / kTile * blocks * kTileElements + 2 * (m % kTile);
    for (int64_t k = 0; k < size; ++k) to[k / 2 * 2 * kTile + k % 2] = x[m * size + k];
  }
}

// 16 x 32 weights, zeros where there are fewer of them.
static inline void copy_weights(const BFloat16* w, int64_t outputs, int64_t depth, int64_t size,
                                BFloat16 (&to)[kTileElements]) {
  __builtin_memset(to, 0, sizeof(to));
  for (int64_t n = 0; n < outputs; ++n)
    __builtin_memcpy(to + n * kTileDepth, w + n * size, static_cast<size_t>(depth) * sizeof(BFloat16));
}

// The weights of `outputs` <= 16 outputs at w, of block `block` of k, into tile kIndex of the weights.
template <int kIndex>
static inline void load_weights(const BFloat16* w, int64_t outputs, int64_t block, int64_t size) {
  const int64_t begin = block * kTileDepth, depth = smaller(kTileDepth, size - begin);
  if (outputs == kTile && depth == kTileDepth) {
    tiles::load_weights<kIndex>(w + begin, size * static_cast<int64_t>(sizeof(BFloat16)));
  } else {  // never a read behind the last weight
    alignas(64) BFloat16 whole[kTileElements];
    copy_weights(w + begin, outputs, depth, size, whole);
    tiles::load_weights<kIndex>(whole, kTileDepth * static_cast<int64_t>(sizeof(BFloat16)));
  }
}

// One tile of sums, 16 outputs x 16 rows, to where those that exist go.
template <int kWeights, int kRows>
static inline void put_sums(int64_t m, int64_t rows, int64_t n, int64_t outputs,
                            const Output<BFloat16>& output) {
  alignas(64) float sums[kTile][kTile];
  tiles::store_sums<kWeights, kRows>(sums);
  for (int64_t row = 0; row < rows; ++row) {
    if (outputs == kTile) {
      float dots[1][kTile];
      for (int64_t i = 0; i < kTile; ++i) dots[0][i] = sums[i][row];
      output.put(m + row, n, dots);
    } else {
      for (int64_t i = 0; i < outputs; ++i) {
        const float one[1][1] = {{sums[i][row]}};
        output.put(m + row, n + i, one);
      }
    }
  }
}

// 16 or 32 outputs from number n on and 16 or 32 rows from number m on, of which the last `outputs` and
// `rows`
// <= 16 may be fewer.
template <int kWeights, int kRows>
static void multiply_tiles(const BFloat16* packed, int64_t m, int64_t rows, const BFloat16* w, int64_t n,
                           int64_t outputs, int64_t size, const Output<BFloat16>& output) {
  const int64_t blocks = tile_blocks(size);
  const BFloat16* x = packed + m / kTile * blocks * kTileElements;
  w += n * size;
  tiles::clear_sums();
  for (int64_t block = 0; block < blocks; ++block, x += kTileElements) {
    load_weights<0>(w, kWeights == 1 ? outputs : kTile, block, size);
    tiles::load_rows<0>(x);
    tiles::multiply_add<0, 0>();
    if constexpr (kRows == 2) {
      tiles::load_rows<1>(x + blocks * kTileElements);
      tiles::multiply_add<0, 1>();
    }
    if constexpr (kWeights == 2) {
      load_weights<1>(w + kTile * size, outputs, block, size);
      tiles::multiply_add<1, 0>();
      if constexpr (kRows == 2) tiles::multiply_add<1, 1>();
    }
  }
  put_sums<0, 0>(m, kRows == 1 ? rows : kTile, n, kWeights == 1 ? outputs : kTile, output);
  if constexpr (kRows == 2) put_sums<0, 1>(m + kTile, rows, n, kWeights == 1 ? outputs : kTile, output);
  if constexpr (kWeights == 2) put_sums<1, 0>(m, kRows == 1 ? rows : kTile, n + kTile, outputs, output);
  if constexpr (kWeights == 2 && kRows == 2) put_sums<1, 1>(m + kTile, rows, n + kTile, outputs, output);
}

template <int kWeights>
static void all_packed_rows(const BFloat16* packed, int64_t rows, const BFloat16* w, int64_t n,
                            int64_t outputs, int64_t size, const Output<BFloat16>& output) {
  int64_t m = 0;
  for (; rows - m > kTile; m += 2 * kTile)
    multiply_tiles<kWeights, 2>(packed, m, smaller(kTile, rows - m - kTile), w, n, outputs, size, output);
  if (m < rows) multiply_tiles<kWeights, 1>(packed, m, rows - m, w, n, outputs, size, output);
}

// As rows_times_weights does, with rows that pack_rows has packed.
static inline void tiles_times_packed(const BFloat16* packed, int64_t rows, const BFloat16* w, int64_t begin,
                                      int64_t end, int64_t size, const Output<BFloat16>& output) {
  tiles::begin();
  int64_t n = begin;
  for (; end - n > kTile; n += 2 * kTile)
    all_packed_rows<2>(packed, rows, w, n, smaller(kTile, end - n - kTile), size, output);
  if (n < end) all_packed_rows<1>(packed, rows, w, n, end - n, size, output);
  tiles::end();
}

}  // namespace cerberus::CERBERUS_ISA
