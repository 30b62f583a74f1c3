// Many rows times weights, of gemm.cpp.
//
// A tile of rows stays in the L1 cache while all weights of a task pass by. Of long rows a block of k at a
// time: the sums, of which the lanes are not added yet, wait in memory for the next block. Weights that are
// to be widened are so once, for the first tile of rows.
#pragma once

#include "cpu/tile.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int64_t kTileBytes = 24 << 10;  // of a tile of rows
constexpr int64_t kBlockRows = 128;

// k of a block: as few blocks as possible, of as even sizes as possible.
template <typename X>
int64_t block_size(int64_t size, int64_t tile_rows) {
  constexpr int64_t kStep = Product<X>::kStep;
  const int64_t most = kTileBytes / (tile_rows * static_cast<int64_t>(sizeof(X)) * kStep);
  const int64_t steps = larger(1, (size + kStep - 1) / kStep), blocks = (steps + most - 1) / most;
  return (steps + blocks - 1) / blocks * kStep;
}

// A tile's sums over a block: on from those that `waiting` holds, or from zero; back there, or, the last
// block done, to `dots`. Not inlined: the compiler would keep less of it in registers.
template <int kRows, int kWeights, typename X, typename W>
__attribute__((noinline)) void block_tile(const X* x, int64_t x_stride, const W w, int64_t size, Ahead& ahead,
                                          Vec* waiting, bool begun, float* dots, int64_t dots_stride) {
  Vec sums[kRows][kWeights];
  const auto each = [&](const auto& body) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 12
      for (int n = 0; n < kWeights; ++n) body(sums[m][n], waiting[m * kWeights + n]);
  };
  if (begun) {
    each([](Vec& sum, const Vec& before) { sum = before; });
  } else {
    each([](Vec& sum, const Vec&) { sum = Vec{}; });
  }
  add_tile(x, x_stride, w, size, ahead, sums);
  if (!dots) return each([](const Vec& sum, Vec& after) { after = sum; });
  float out[kRows][kWeights];
  sum_each(sums, out);
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) __builtin_memcpy(dots + m * dots_stride, out[m], sizeof(out[m]));
}

// `count` sums of row m, those of weights n, n + 1, ..., as Output::put does it with tiles.
template <typename T>
void put_row(const Output<T>& output, int64_t m, int64_t n, const float* dots, int64_t count) {
  if (output.sums) {
    __builtin_memcpy(output.sums + m * output.stride + n, dots, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  T* to = output.rounded + m * output.stride + n;
  const T* bias = output.bias ? output.bias + n : nullptr;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    float all[kLanes];
    store(bias ? load(dots + i) + load(bias + i) : load(dots + i), all);
    from_floats<kLanes>(all, to + i);
  }
  for (; i < count; ++i) from_float(bias ? dots[i] + to_float(bias[i]) : dots[i], to[i]);
}

// What blocks_of_weights multiplies with. open(k, count) comes before a block of k; then, for each tile of
// rows, times(is_first, body) calls body(weights_at), and weights_at(n) is what add_tile takes of the weight
// rows from n on, counted from the first. kept: where it has room for a block of all of them.

// Weight rows in memory, kept for the other tiles of rows as the first one widens them.
template <typename X, typename W, int kWeights>
struct RowsInMemory {
  void open(int64_t from_k, int64_t) { k = from_k; }
  template <typename Body>
  void times(bool is_first, const Body& body) const {
    if (is_first) {
      body([&](int64_t n) {
        return KeptWeights<X, W, kWeights>{{first + n * size + k, size}, kept + n * block};
      });
    } else {
      body([&](int64_t n) { return Weights<X, X, kWeights>{kept + n * block, Product<X>::kStep}; });
    }
  }

  const W* first;
  int64_t size, block, k = 0;
  X* kept = nullptr;
};

// Packed tiles from `tile` on, made ready for all tiles of rows.
template <typename T>
struct TilesMade {
  using X = Row<T>;
  void open(int64_t k, int64_t count) {
    constexpr int64_t kStep = Product<X>::kStep;
    for (int64_t i = 0; i < tiles; ++i)
      packed.make(packed, tile + i, k / kStep, (count + kStep - 1) / kStep,
                  kept + i * kPackedWeights * block);
  }
  template <typename Body>
  void times(bool, const Body& body) const {
    body([&](int64_t n) { return Weights<X, X, kPackedWeights>{kept + n * block, Product<X>::kStep}; });
  }

  const PackedTiles<T>& packed;
  int64_t tile, tiles, block;
  X* kept = nullptr;
};

// `width` weights of the source, of which the first `count` go to the output from weight n on. As
// tiles_of_weights asks for the weights of the next tile, so do these for those of the next task.
template <int kMaxRows, int kWeights, typename X, typename Source, typename T>
void blocks_of_weights(const X* x, int64_t x_stride, int64_t rows, int64_t tiles, Source& source,
                       int64_t width, int64_t count, int64_t size, int64_t block, Ahead ahead, int64_t n,
                       const Output<T>& output) {
  // In one piece: several large ones, freed at once, are more than malloc keeps, and each of their pages
  // would be new to every task.
  constexpr int64_t kVec = sizeof(Vec);
  const int64_t kept = width * block * static_cast<int64_t>(sizeof(X)) / kVec;
  const int64_t waits = block < size ? rows * width : 0;
  Buffer<Vec> memory(kept + waits + kMaxRows * width);  // the last: of a tile of rows, more than they need
  source.kept = reinterpret_cast<X*>(memory.data);
  Vec* const waiting = memory.data + kept;
  float* const dots = reinterpret_cast<float*>(waiting + waits);
  for (int64_t k = 0; k == 0 || k < size; k += block) {
    const int64_t part = smaller(block, size - k);
    const bool last = k + part == size;
    source.open(k, part);
    for_each_row_tile<kMaxRows>(rows, tiles, [&](int64_t m, auto row_count) {
      constexpr int kRows = decltype(row_count)::value;
      source.times(m == 0, [&](const auto& weights_at) {
        for (int64_t i = 0; i < width; i += kWeights)
          block_tile<kRows, kWeights>(x + m * x_stride + k, x_stride, weights_at(i), part, ahead,
                                      waiting + m * width + i * kRows, k > 0, last ? dots + i : nullptr,
                                      width);
      });
      if (!last) return;
      for (int row = 0; row < kRows; ++row) put_row(output, m + row, n, dots + row * width, count);
    });
  }
}

// Weight rows `begin` to `end`, kWeights at a time, as many as there are; returns where they end.
template <int kMaxRows, int kWeights, typename X, typename W>
int64_t blocks_in_memory(const X* x, int64_t x_stride, int64_t rows, int64_t tiles, const W* w, int64_t begin,
                         int64_t end, int64_t size, const Output<W>& output) {
  const int64_t width = (end - begin) / kWeights * kWeights, block = block_size<X>(size, kMaxRows);
  if (width == 0) return begin;
  RowsInMemory<X, W, kWeights> source{w + begin * size, size, block};
  const int64_t step_bytes = kWeights * static_cast<int64_t>(sizeof(W)) * Product<X>::kStep;
  const Ahead ahead{reinterpret_cast<const char*>(w + (begin + width) * size) + kAheadBytes,
                    step_bytes / tiles};
  blocks_of_weights<kMaxRows, kWeights>(x, x_stride, rows, tiles, source, width, width, size, block, ahead,
                                        begin, output);
  return begin + width;
}

template <typename X, typename W>
void blocks_times_weights(const X* x, int64_t x_stride, int64_t rows, const W* w, int64_t begin, int64_t end,
                          int64_t size, const Output<W>& output) {
  constexpr int kMost = Product<X>::kTileRows;
  with_row_tiles<kMost>(rows, kMost, [&](auto largest, int64_t tiles) {
    constexpr int kMaxRows = decltype(largest)::value, kWeights = kSums / kMaxRows;
    if constexpr (kMaxRows > kMost / 2) {  // as many rows as there are give no others
      const int64_t next =
          blocks_in_memory<kMaxRows, kWeights>(x, x_stride, rows, tiles, w, begin, end, size, output);
      blocks_in_memory<kMaxRows, 1>(x, x_stride, rows, tiles, w, next, end, size, output);
    }
  });
}

}  // namespace
}  // namespace cerberus::CERBERUS_ISA
