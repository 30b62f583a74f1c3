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

// Weights in memory: row n from first + n * apart on, every step followed by those of kBeside - 1 others.
template <typename X, typename W, int kBeside = 1>
struct Weights {
  const W* first;
  int64_t apart;

  template <int kPart>
  auto load(int n, int64_t k) const {
    const W* p = first + n * apart + k * kBeside;
    // Read anew for the second part: the compiler would keep the words of the first, for which there is no
    // register left.
    if constexpr (kPart > 0 && kLanes == 16) __asm__("" : "+r"(p));
    return Product<X>::template load_at<kPart>(p);
  }
  template <int kPart>
  auto load_part(int n, int64_t k, int64_t count) const {
    return Product<X>::template load_part_at<kPart>(first + n * apart + k * kBeside, count);
  }
};

// The same, kept as rows are: who reads them again need not widen them.
template <typename X, typename W, int kBeside>
struct KeptWeights : Weights<X, W> {
  X* kept;

  template <int kPart>
  Vec load(int n, int64_t k) const {
    return keep<kPart>(n, k, Weights<X, W>::template load<kPart>(n, k));
  }
  template <int kPart>
  Vec load_part(int n, int64_t k, int64_t count) const {
    return keep<kPart>(n, k, Weights<X, W>::template load_part<kPart>(n, k, count));
  }

 private:
  template <int kPart>
  Vec keep(int n, int64_t k, Vec weight) const {
    store(weight, reinterpret_cast<float*>(kept + n * Product<X>::kStep + k * kBeside) + kPart * kLanes);
    return in_register(weight);
  }
};

// Adds the products of `size` k to the sums. W by value: what is kept could otherwise change where it is read
// from, for all that the compiler knows.
template <int kRows, int kWeights, typename X, typename W>
inline __attribute__((always_inline)) void add_tile(const X* x, int64_t x_stride, const W w, int64_t size,
                                                    Ahead& asked, Vec (&sums)[kRows][kWeights]) {
  using Product = Product<X>;
  int64_t k = 0;
  // What there is less of stays in registers, the other comes one by one.
  const auto step = [&](const auto& row, const auto& weight) {
    using Operand = decltype(weight(0));
    if constexpr (kWeights <= kRows) {
      Operand weights[kWeights];
#pragma GCC unroll 12
      for (int n = 0; n < kWeights; ++n) weights[n] = in_register(weight(n));
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const Operand one = in_register(row(m));
#pragma GCC unroll 12
        for (int n = 0; n < kWeights; ++n) sums[m][n] = Product::add(one, weights[n], sums[m][n]);
      }
    } else {
      Operand rows[kRows];
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) rows[m] = row(m);
#pragma GCC unroll 12
      for (int n = 0; n < kWeights; ++n) {
        const Operand one = in_register(weight(n));
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) sums[m][n] = Product::add(rows[m], one, sums[m][n]);
      }
    }
  };
  Ahead ahead = asked;  // in registers
  for (; k + Product::kStep <= size; k += Product::kStep) {
    ahead.prefetch<kWeights>();
    for_each_part<Product>([&](auto part) {
      constexpr int kPart = decltype(part)::value;
      step([&](int m) { return Product::template load_at<kPart>(x + m * x_stride + k); },
           [&](int n) { return w.template load<kPart>(n, k); });
    });
  }
  asked = ahead;
  if (k < size)
    for_each_part<Product>([&](auto part) {
      constexpr int kPart = decltype(part)::value;
      step([&](int m) { return Product::template load_part_at<kPart>(x + m * x_stride + k, size - k); },
           [&](int n) { return w.template load_part<kPart>(n, k, size - k); });
    });
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

// --- many rows ---
//
// A tile of rows stays in the L1 cache while all weights of a task pass by. Of long rows a block of k at a
// time: the sums, of which the lanes are not added yet, wait in memory for the next block. Weights that are
// to be widened are so once, for the first tile of rows.

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
