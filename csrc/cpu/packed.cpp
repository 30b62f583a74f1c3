#include "cpu/packed.h"

#include "cpu/byte_weights.h"
#include "cpu/few_bits.h"
#include "cpu/kernels.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int kPackedRows = kSums / kPackedWeights;
// Of the weights that follow: far enough for memory, near enough to be in the L2 cache still.
constexpr int64_t kAheadBytes = 8192;

// Weights of a step of a tile, as Product<X> takes them: get<part>(). kBytes: of a step. Dense ones lie as
// they are.
template <typename X, typename W>
class DenseWeights {
 public:
  static constexpr int64_t kBytes = kPackedWeights * Product<X>::kStep * static_cast<int64_t>(sizeof(W));
  struct Tile {
    Tile(const char* begin, int64_t) : w(begin) {}
    const char* w;
  };
  DenseWeights() = default;
  DenseWeights(const Tile& tile, int64_t step, int n)
      : w_(reinterpret_cast<const W*>(tile.w + step * kBytes) + n * Product<X>::kStep) {}
  template <int kPart>
  auto get() const {
    return Product<X>::template load_at<kPart>(w_);
  }

 private:
  const W* w_;
};

// Those that another kind has got already, for several tiles of rows: in parts.
template <typename X, typename Weights>
class ReadyWeights {
 public:
  using Part = decltype(Weights().template get<0>());
  static constexpr int kParts = Product<X>::kParts;
  static constexpr int64_t kBytes = kPackedWeights * kParts * static_cast<int64_t>(sizeof(Part));
  using Tile = typename DenseWeights<X, float>::Tile;
  ReadyWeights() = default;
  ReadyWeights(const Tile& tile, int64_t step, int n)
      : parts_(reinterpret_cast<const Part*>(tile.w + step * kBytes) + n * kParts) {}
  template <int kPart>
  Part get() const {
    return parts_[kPart];
  }
  static void make(const Weights& from, char* step, int n) {
    for_each_part<Product<X>>([&](auto part) {
      constexpr int kPart = decltype(part)::value;
      reinterpret_cast<Part*>(step)[n * kParts + kPart] = from.template get<kPart>();
    });
  }

 private:
  const Part* parts_;
};

// Asks for `bytes` of the weights that follow those at `from`.
inline __attribute__((always_inline)) void prefetch_after(const char* from, int64_t bytes) {
#pragma GCC unroll 8
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + kAheadBytes + line, 0, 2);
}

// A step of a tile's sums: weights and rows come once each.
template <typename X, typename Weights, int kRows, typename LoadRow>
inline __attribute__((always_inline)) void add_step(const typename Weights::Tile& tile, int64_t step,
                                                    Vec (&sums)[kRows][kPackedWeights],
                                                    const LoadRow& load_row) {
  Weights all[kPackedWeights];
#pragma GCC unroll 4
  for (int n = 0; n < kPackedWeights; ++n) all[n] = Weights(tile, step, n);
  for_each_part<Product<X>>([&](auto part) {
    constexpr int kPart = decltype(part)::value;
    decltype(all[0].template get<kPart>()) weights[kPackedWeights];
#pragma GCC unroll 4
    for (int n = 0; n < kPackedWeights; ++n) weights[n] = all[n].template get<kPart>();
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const auto row = in_register(load_row(part, m));
#pragma GCC unroll 4
      for (int n = 0; n < kPackedWeights; ++n) sums[m][n] = Product<X>::add(row, weights[n], sums[m][n]);
    }
  });
}

// prefetch(step): asks for what is needed later, at every step.
template <int kRows, typename Weights, typename X, typename Prefetch>
inline __attribute__((always_inline)) void dot_tile(const X* x, int64_t x_stride, const char* w, int64_t size,
                                                    float (&out)[kRows][kPackedWeights],
                                                    const Prefetch& prefetch) {
  using Product = Product<X>;
  Vec sums[kRows][kPackedWeights] = {};
  const typename Weights::Tile tile(w, size);
  const int64_t steps = size / Product::kStep, k = steps * Product::kStep;
  for (int64_t step = 0; step < steps; ++step, x += Product::kStep) {
    prefetch(step);
    add_step<X, Weights>(tile, step, sums, [&](auto part, int m) __attribute__((always_inline)) {
      return Product::template load_at<decltype(part)::value>(x + m * x_stride);
    });
  }
  if (k < size)
    add_step<X, Weights>(tile, steps, sums, [&](auto part, int m) __attribute__((always_inline)) {
      return Product::template load_part_at<decltype(part)::value>(x + m * x_stride, size - k);
    });
  sum_each(sums, out);
}

// A tile of sums, of which the last may have fewer weights.
template <int kRows, typename W>
inline void put(const float (&dots)[kRows][kPackedWeights], int64_t m, int64_t n, int64_t end,
                const Output<W>& output) {
  if (n + kPackedWeights <= end) return output.put(m, n, dots);
  for (int i = 0; n + i < end; ++i)
    for (int row = 0; row < kRows; ++row) {
      const float one[1][1] = {{dots[row][i]}};
      output.put(m + row, n + i, one);
    }
}

// One tile of rows: weights come from memory as they are used.
template <int kRows, typename Weights, typename X, typename W>
__attribute__((noinline)) void few_rows(const X* x, int64_t x_stride, const char* packed, int64_t tile_bytes,
                                        int64_t begin, int64_t end, int64_t size, const Output<W>& output) {
  const Output<W> to = output;
  for (int64_t n = begin; n < end; n += kPackedWeights) {
    const char* w = packed + n / kPackedWeights * tile_bytes;
    float out[kRows][kPackedWeights];
    dot_tile<kRows, Weights>(x, x_stride, w, size, out, [&](int64_t step) __attribute__((always_inline)) {
      prefetch_after(w + step * Weights::kBytes, Weights::kBytes);
    });
    put(out, 0, n, end, to);
  }
}

// What several tiles of rows read: dense weights, where they lie, since memory is then read while it is
// multiplied; others once they are ready.
template <typename X, typename Weights>
struct ForSeveral {
  using Type = ReadyWeights<X, Weights>;
  static constexpr bool kIsMade = true;
};
template <typename X, typename W>
struct ForSeveral<X, DenseWeights<X, W>> {
  using Type = DenseWeights<X, W>;
  static constexpr bool kIsMade = false;
};

// One of several tiles of rows, which asks for `share` bytes behind `from` at each step. A function of its
// own: inlined into the loops over tiles it takes 4 % longer.
template <int kRows, typename Read, typename X>
__attribute__((noinline)) void one_of_many(const X* x, int64_t x_stride, const char* w, int64_t size,
                                           const char* from, int64_t share,
                                           float (&out)[kRows][kPackedWeights]) {
  dot_tile<kRows, Read>(x, x_stride, w, size, out, [&](int64_t step) __attribute__((always_inline)) {
    prefetch_after(from + step * share, share);
  });
}

// Several tiles of rows. Each asks for its share of the weights that follow.
template <typename Weights, typename X, typename W>
void many_rows(const X* x, int64_t x_stride, int64_t rows, const char* packed, int64_t tile_bytes,
               int64_t begin, int64_t end, int64_t size, const Output<W>& output) {
  using Read = typename ForSeveral<X, Weights>::Type;
  constexpr bool kIsMade = ForSeveral<X, Weights>::kIsMade;
  const int64_t steps = (size + Product<X>::kStep - 1) / Product<X>::kStep;
  Buffer<char> made(kIsMade ? steps * Read::kBytes : 0);
  with_row_tiles<kPackedRows>(rows, kPackedRows, [&](auto most, int64_t tiles) {
    const int64_t share = (Weights::kBytes + tiles - 1) / tiles;
    for (int64_t n = begin; n < end; n += kPackedWeights) {
      const char* w = packed + n / kPackedWeights * tile_bytes;
      if constexpr (kIsMade) {
        const typename Weights::Tile tile(w, size);
        for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 4
          for (int j = 0; j < kPackedWeights; ++j)
            Read::make(Weights(tile, step, j), made.data + step * Read::kBytes, j);
      }
      for_each_row_tile<decltype(most)::value>(rows, tiles, [&](int64_t m, auto row_count) {
        constexpr int kRows = decltype(row_count)::value;
        float out[kRows][kPackedWeights];
        one_of_many<kRows, Read>(x + m * x_stride, x_stride, kIsMade ? made.data : w, size,
                                 w + m * tile_bytes / rows, share, out);
        put(out, m, n, end, output);
      });
    }
  });
}

// From so many rows on it is a tile of them that stays in the L1 cache, not one of weights.
constexpr int64_t kRowsToMakeFor = 48;
template <typename T>
constexpr bool kMakesForMany = false;
#if defined(__AVX512F__)
template <>
constexpr bool kMakesForMany<BFloat16> = true;
#endif

template <typename Weights, typename T>
void make_steps(const PackedTiles<T>& packed, int64_t tile, int64_t first, int64_t steps, Row<T>* to) {
  using Ready = ReadyWeights<Row<T>, Weights>;
  const typename Weights::Tile from(packed.tiles + tile * packed.tile_bytes, packed.size);
  char* made = reinterpret_cast<char*>(to);
  for (int64_t step = first; step < first + steps; ++step, made += Ready::kBytes)
#pragma GCC unroll 4
    for (int n = 0; n < kPackedWeights; ++n) Ready::make(Weights(from, step, n), made, n);
}

// Tiles of `tile_bytes`, read as `Weights`.
template <typename Weights, typename X, typename W>
void times_tiles(const X* x, int64_t x_stride, int64_t rows, const char* packed, int64_t tile_bytes,
                 int64_t begin, int64_t end, int64_t size, const Output<W>& output) {
  if constexpr (kMakesForMany<W>)
    if (rows >= kRowsToMakeFor) {
      const PackedTiles<W> tiles{packed, tile_bytes, size, make_steps<Weights, W>};
      return rows_times_tiles(x, x_stride, rows, tiles, begin, end, output);
    }
  const int64_t blocks = row_blocks(rows, size * static_cast<int64_t>(sizeof(*x)));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
    const X* from = x + first * x_stride;
    const Output<W> to = output.from_row(first);
    if (count > kPackedRows) {
      many_rows<Weights>(from, x_stride, count, packed, tile_bytes, begin, end, size, to);
    } else {
      with_row_tiles<kPackedRows>(count, kPackedRows, [&](auto all, int64_t) {
        few_rows<decltype(all)::value, Weights>(from, x_stride, packed, tile_bytes, begin, end, size, to);
      });
    }
  }
}

template <typename T>
void pack_row(const T* weight, int64_t size, int64_t row, T* packed) {
  constexpr int kStep = Product<Row<T>>::kStep;
  T* to = packed + row / kPackedWeights * packed_tile<T>(size) + row % kPackedWeights * kStep;
  for (int64_t k = 0; k < size; k += kStep, to += kPackedWeights * kStep) {
    const int64_t count = smaller(kStep, size - k);
    __builtin_memset(to, 0, kStep * sizeof(T));
    __builtin_memcpy(to, weight + k, static_cast<size_t>(count) * sizeof(T));
  }
}

}  // namespace

template <typename T>
void rows_times_packed(const Row<T>* x, int64_t x_stride, int64_t rows, const T* packed, int64_t begin,
                       int64_t end, int64_t size, const Output<T>& output) {
  times_tiles<DenseWeights<Row<T>, T>>(x, x_stride, rows, reinterpret_cast<const char*>(packed),
                                       packed_tile<T>(size) * static_cast<int64_t>(sizeof(T)), begin, end,
                                       size, output);
}

template void rows_times_packed(const Row<BFloat16>*, int64_t, int64_t, const BFloat16*, int64_t, int64_t,
                                int64_t, const Output<BFloat16>&);
#if !defined(CERBERUS_BFLOAT16_ONLY)
template void rows_times_packed(const float*, int64_t, int64_t, const float*, int64_t, int64_t, int64_t,
                                const Output<float>&);
template void rows_times_packed(const float*, int64_t, int64_t, const Float16*, int64_t, int64_t, int64_t,
                                const Output<Float16>&);
#endif

#if defined(__AVX512F__)
void rows_times_blocks(Packing packing, const Row<BFloat16>* x, int64_t x_stride, int64_t rows,
                       const char* packed, int64_t begin, int64_t end, int64_t size,
                       const Output<BFloat16>& output) {
  using X = Row<BFloat16>;
  if (const int bits = few_bits(packing)) {
    const auto product = bits == 4 ? times_tiles<FewBitWeights<X, 4>, X, BFloat16>
                                   : times_tiles<FewBitWeights<X, 5>, X, BFloat16>;
    return product(x, x_stride, rows, packed, few_bit_tile_bytes(bits, size), begin, end, size, output);
  }
  with_row_tiles<kMostRowsOfBytes>(rows, kMostRowsOfBytes, [&](auto all, int64_t) {
    constexpr int kRows = decltype(all)::value;
    const auto product = packing == Packing::kBytes
                             ? few_rows<kRows, ByteWeights<X, Packing::kBytes>, X, BFloat16>
                             : few_rows<kRows, ByteWeights<X, Packing::kBytesOf16>, X, BFloat16>;
    product(x, x_stride, packed, byte_tile_bytes(packing, size), begin, end, size, output);
  });
}
#endif

int64_t packed_elements(DType dtype, int64_t rows, int64_t size) {
  int64_t elements = 0;
  with_type(dtype, [&](auto type) {
    elements = (rows + kPackedWeights - 1) / kPackedWeights * packed_tile<decltype(type)>(size);
  });
  return elements;
}

void pack_weights(const PackWeightsArgs& a, const Parallel& parallel) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T* weight = static_cast<const T*>(a.weight);
    T* packed = static_cast<T*>(a.packed);
    const int64_t tile = packed_tile<T>(a.size);
    if (a.first == 0)  // the last tile may have rows that nothing is copied to
      __builtin_memset(packed + (a.all - 1) / kPackedWeights * tile, 0,
                       static_cast<size_t>(tile) * sizeof(T));
    parallel_tasks(parallel, a.rows,
                   [&](int64_t row) { pack_row(weight + row * a.size, a.size, a.first + row, packed); });
  });
}

}  // namespace cerberus::CERBERUS_ISA
