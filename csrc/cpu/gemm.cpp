// Rows times weights: dot(x[m], w[n]) for every row m and every weight row n, weights streamed from memory
// once.
//
// Every dot product is one chain of fused multiply-adds per vector lane over k = 0, kLanes, ..., the lanes
// then added in one fixed order. The blocking below decides only which dot products are computed side by
// side, never the order of the operations in one: a row's results have the same bits whatever the other rows
// are.
//
// With the processor's bfloat16 instructions a lane takes a pair of k at a time (vdpbf16ps): rows stay
// bfloat16, and an instruction does twice the work. Else rows are widened to float once.
#include "cpu/dot.h"
#include "cpu/product.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int kSingleRowWeights =
    8;  // for a single row: enough chains to hide the latency of the multiply-add

constexpr int64_t kAheadBytes =
    4096;  // beyond the tile's own weights: measured, 1 KiB to 16 KiB differ little

constexpr int64_t kLongRow = 8192;  // bytes

// Where the next weights begin, and how many bytes of them one step of the loop over k is to ask for: the
// processor computes on this tile while memory brings the next one. Its own prefetcher starts anew at every
// 4 KiB page. Into the L2 cache: the L1 cache is full of this tile and its rows.
struct Ahead {
  const char* p;
  int64_t step;

  template <int kWeights>
  void prefetch() {
    constexpr int64_t kLine = 64;
    if (step == 0) return;
    if (step >= kWeights * kLine) {  // one tile of rows: all of the next weights
#pragma GCC unroll 8
      for (int64_t line = 0; line < kWeights; ++line) __builtin_prefetch(p + line * kLine, 0, 2);
    } else {
      __builtin_prefetch(p, 0, 2);
      if (step > kLine) __builtin_prefetch(p + kLine, 0, 2);
      if (step > 2 * kLine) __builtin_prefetch(p + 2 * kLine, 0, 2);
    }
    p += step;
  }
};

template <int kRows, int kWeights, typename X, typename W>
inline void dot_tile(const X* x, int64_t x_stride, const W* w, int64_t size, Ahead ahead,
                     float (&out)[kRows][kWeights]) {
  using Product = Product<X>;
  Vec sums[kRows][kWeights] = {};
  int64_t k = 0;
  // What there is less of stays in registers, the other comes one by one.
  const auto step = [&](const auto& load_at) {
    using Operand = decltype(load_at(w));
    if constexpr (kWeights <= kRows) {
      Operand weights[kWeights];
#pragma GCC unroll 12
      for (int n = 0; n < kWeights; ++n) weights[n] = load_at(w + n * size);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const Operand row = in_register(load_at(x + m * x_stride));
#pragma GCC unroll 12
        for (int n = 0; n < kWeights; ++n) sums[m][n] = Product::add(row, weights[n], sums[m][n]);
      }
    } else {
      Operand rows[kRows];
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) rows[m] = load_at(x + m * x_stride);
#pragma GCC unroll 12
      for (int n = 0; n < kWeights; ++n) {
        const Operand weight = in_register(load_at(w + n * size));
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) sums[m][n] = Product::add(rows[m], weight, sums[m][n]);
      }
    }
  };
  for (; k + Product::kStep <= size; k += Product::kStep) {
    ahead.prefetch<kWeights>();
    for_each_part<Product>([&](auto part) {
      step([k](const auto* p) { return Product::template load_at<decltype(part)::value>(p + k); });
    });
  }
  if (k < size)
    for_each_part<Product>([&](auto part) {
      step([k, size](const auto* p) {
        return Product::template load_part_at<decltype(part)::value>(p + k, size - k);
      });
    });
  sum_each(sums, out);
}

// Tiles of kWeights weight rows from `begin` on, as many as there are before `end`; returns where they end.
template <int kMaxRows, int kWeights, typename X, typename W>
inline int64_t tiles_of_weights(const X* x, int64_t x_stride, int64_t rows, int64_t tiles, const W* w,
                                int64_t begin, int64_t end, int64_t size, const Output<W>& output) {
  // Every tile asks for its share of the next weights, but where a single one reads long rows of them: these
  // the processor's own prefetcher finds, and asking costs more than it brings (measured, rows of 8 KiB).
  const int64_t weight_bytes = kWeights * static_cast<int64_t>(sizeof(W));
  const bool found = tiles == 1 && size * static_cast<int64_t>(sizeof(W)) >= kLongRow;
  for (; begin + kWeights <= end; begin += kWeights) {
    const W* first = w + begin * size;
    Ahead ahead{reinterpret_cast<const char*>(first + kWeights * size) + kAheadBytes,
                found ? 0 : weight_bytes * Product<X>::kStep / tiles};
    for_each_row_tile<kMaxRows>(rows, tiles, [&](int64_t m, auto row_count) {
      constexpr int kRows = decltype(row_count)::value;
      float out[kRows][kWeights];
      dot_tile<kRows, kWeights>(x + m * x_stride, x_stride, first, size, ahead, out);
      ahead.p += weight_bytes * size / tiles;
      output.put(m, begin, out);
    });
  }
  return begin;
}

template <int kMaxRows, typename X, typename W>
void tiles_times_weights(const X* x, int64_t x_stride, int64_t rows, int64_t tiles, const W* w, int64_t begin,
                         int64_t end, int64_t size, const Output<W>& output) {
  constexpr int kWeights = kSums / kMaxRows < kSingleRowWeights ? kSums / kMaxRows : kSingleRowWeights;
  begin = tiles_of_weights<kMaxRows, kWeights>(x, x_stride, rows, tiles, w, begin, end, size, output);
  tiles_of_weights<kMaxRows, 1>(x, x_stride, rows, tiles, w, begin, end, size, output);
}

}  // namespace

template <typename T>
void rows_times_weights(const Row<T>* x, int64_t x_stride, int64_t rows, const T* w, int64_t begin,
                        int64_t end, int64_t size, const Output<T>& output) {
  const int64_t blocks = row_blocks(rows, size * static_cast<int64_t>(sizeof(*x)));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
    constexpr int kTileRows = Product<Row<T>>::kTileRows;
    const int64_t most = count <= kTileRows ? kTileRows : Product<Row<T>>::kManyTileRows;
    with_row_tiles<kTileRows>(count, most, [&](auto largest, int64_t tiles) {
      tiles_times_weights<decltype(largest)::value>(x + first * x_stride, x_stride, count, tiles, w, begin,
                                                    end, size, output.from_row(first));
    });
  }
}

template void rows_times_weights(const Row<BFloat16>*, int64_t, int64_t, const BFloat16*, int64_t, int64_t,
                                 int64_t, const Output<BFloat16>&);
#if !defined(CERBERUS_BFLOAT16_ONLY)
template void rows_times_weights(const float*, int64_t, int64_t, const float*, int64_t, int64_t, int64_t,
                                 const Output<float>&);
template void rows_times_weights(const float*, int64_t, int64_t, const Float16*, int64_t, int64_t, int64_t,
                                 const Output<Float16>&);
#endif

}  // namespace cerberus::CERBERUS_ISA
