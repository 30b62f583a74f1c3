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
#include "cpu/blocks.h"
#include "cpu/many_rows.h"
#include "cpu/tile.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int kSingleRowWeights =
    8;  // for a single row: enough chains to hide the latency of the multiply-add

constexpr int64_t kLongRow = 8192;  // bytes

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
      Vec sums[kRows][kWeights] = {};
      add_tile(x + m * x_stride, x_stride, Weights<X, W>{first, size}, size, ahead, sums);
      float out[kRows][kWeights];
      sum_each(sums, out);
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
  constexpr bool kWidens = sizeof(Row<T>) != sizeof(T);
  const bool is_long = block_size<Row<T>>(size, Product<Row<T>>::kTileRows) < size;
  const bool many = kWidens && rows >= (is_long ? kManyLongRows : kManyRows);
  const int64_t blocks =
      many ? (rows + kBlockRows - 1) / kBlockRows : row_blocks(rows, size * static_cast<int64_t>(sizeof(*x)));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
    const Row<T>* here = x + first * x_stride;
    const Output<T> to = output.from_row(first);
    if constexpr (kWidens)
      if (many) {
        blocks_times_weights(here, x_stride, count, w, begin, end, size, to);
        continue;
      }
    constexpr int kTileRows = Product<Row<T>>::kTileRows;
    const int64_t most = count <= kTileRows ? kTileRows : Product<Row<T>>::kManyTileRows;
    with_row_tiles<kTileRows>(count, most, [&](auto largest, int64_t tiles) {
      tiles_times_weights<decltype(largest)::value>(here, x_stride, count, tiles, w, begin, end, size, to);
    });
  }
}

template <typename T>
void rows_times_tiles(const Row<T>* x, int64_t x_stride, int64_t rows, const PackedTiles<T>& packed,
                      int64_t begin, int64_t end, const Output<T>& output) {
  using X = Row<T>;
  constexpr int kMost = kSums / kPackedWeights;
  const int64_t first_tile = begin / kPackedWeights, size = packed.size;
  const int64_t tiles_here = (end - begin + kPackedWeights - 1) / kPackedWeights;
  const char* next = packed.tiles + (first_tile + tiles_here) * packed.tile_bytes;
  const int64_t step_bytes = packed.tile_bytes * Product<X>::kStep / larger(1, size);
  for (int64_t row = 0; row < rows; row += kBlockRows) {
    const int64_t count = smaller(kBlockRows, rows - row);
    with_row_tiles<kMost>(count, kMost, [&](auto largest, int64_t tiles) {
      constexpr int kMaxRows = decltype(largest)::value;
      const int64_t block = block_size<X>(size, kMaxRows), width = tiles_here * kPackedWeights;
      TilesMade<T> source{packed, first_tile, tiles_here, block};
      blocks_of_weights<kMaxRows, kPackedWeights>(
          x + row * x_stride, x_stride, count, tiles, source, width, end - begin, size, block,
          Ahead{next + kAheadBytes, step_bytes / tiles}, begin, output.from_row(row));
    });
  }
}

template void rows_times_weights(const Row<BFloat16>*, int64_t, int64_t, const BFloat16*, int64_t, int64_t,
                                 int64_t, const Output<BFloat16>&);
#if defined(__AVX512F__)
template void rows_times_tiles(const Row<BFloat16>*, int64_t, int64_t, const PackedTiles<BFloat16>&, int64_t,
                               int64_t, const Output<BFloat16>&);
#endif
#if !defined(CERBERUS_BFLOAT16_ONLY)
template void rows_times_weights(const float*, int64_t, int64_t, const float*, int64_t, int64_t, int64_t,
                                 const Output<float>&);
template void rows_times_weights(const float*, int64_t, int64_t, const Float16*, int64_t, int64_t, int64_t,
                                 const Output<Float16>&);
#endif

}  // namespace cerberus::CERBERUS_ISA
