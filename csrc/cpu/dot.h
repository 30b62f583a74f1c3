// One step of the dot products of rows and weights, and how many of them a tile computes side by side.
#pragma once

#include "cpu/product.h"

namespace cerberus::CERBERUS_ISA {

// A tile is rows x weights, a register for each of their sums. The more of them, the more sums are in flight,
// and the less often a weight or a row is loaded; the others hold the weights and a row.
#if defined(__AVX512F__)
constexpr int kSums = 24;
#elif defined(__AVX2__)
constexpr int kSums = 12;
#else
constexpr int kSums = 9;
#endif
// How rows of X and weights are multiplied: kStep of k at a time, in kParts parts.
template <typename X>
struct Product {
  static constexpr int kStep = kLanes, kParts = 1, kTileRows = kSums == 24 ? 6 : kSums == 12 ? 4 : 3;
  static constexpr int kManyTileRows = kTileRows;
  template <int, typename T>
  static Vec load_at(const T* p) {
    return load(p);
  }
  template <int, typename T>
  static Vec load_part_at(const T* p, int64_t count) {
    return load_part(p, count);
  }
  static Vec add(Vec row, Vec weight, Vec sum) { return multiply_add(row, weight, sum); }
};
#if defined(__AVX2__)
// The weights of even numbers, then those of odd ones: an instruction each for a vector of them.
template <>
struct Product<PairedFloat> {
  static constexpr int kStep = 2 * kLanes, kParts = 2, kTileRows = kSums == 24 ? 8 : 4;
  static constexpr int kManyTileRows = kTileRows;
  template <int kPart>
  static Vec load_at(const PairedFloat* p) {
    return load(&p->value + kPart * kLanes);
  }
  template <int kPart>
  static Vec load_part_at(const PairedFloat* p, int64_t) {
    return load_at<kPart>(p);
  }
  template <int kPart>
  static Vec load_at(const BFloat16* p) {
    return kPart == 0 ? load_pairs(p).even() : load_pairs(p).odd();
  }
  template <int kPart>
  static Vec load_part_at(const BFloat16* p, int64_t count) {
    return kPart == 0 ? load_pairs(p, count).even() : load_pairs(p, count).odd();
  }
  static Vec add(Vec row, Vec weight, Vec sum) { return multiply_add(row, weight, sum); }
};
#endif
#if defined(__AVX512BF16__)
template <>
struct Product<BFloat16> {
  static constexpr int kStep = 2 * kLanes, kParts = 1, kTileRows = 6;
  static constexpr int kManyTileRows =
      4;  // 4 x 6: faster than 6 x 4 or 8 x 3 where weights come from the L1 cache
  template <int>
  static __m512bh load_at(const BFloat16* p) {
    return bit_cast<__m512bh>(_mm512_loadu_si512(p));
  }
  template <int>
  static __m512bh load_part_at(const BFloat16* p, int64_t count) {
    return bit_cast<__m512bh>(_mm512_maskz_loadu_epi16((1u << count) - 1, p));
  }
  static Vec add(__m512bh row, __m512bh weight, Vec sum) {
    return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), row, weight));
  }
};
#endif

// Calls body(Count<part>{}) for the parts of a step.
template <typename Product, typename Body>
static inline __attribute__((always_inline)) void for_each_part(const Body& body) {
  body(Count<0>{});
  if constexpr (Product::kParts == 2) body(Count<1>{});
}

// Tiles of rows: as few as possible, of as even sizes as possible, since one of few rows takes as long as a
// larger one. Calls run(Count<k>{}, tiles) for tiles of k rows or one less, k <= most.
template <int kMost, typename Run>
static inline void with_row_tiles(int64_t rows, int64_t most, const Run& run) {
  const int64_t tiles = (rows + most - 1) / most, largest = (rows + tiles - 1) / tiles;
  const auto one = [&](auto count) {
    if constexpr (decltype(count)::value <= kMost)
      if (largest == decltype(count)::value) run(count, tiles);
  };
  one(Count<1>{});
  one(Count<2>{});
  one(Count<3>{});
  one(Count<4>{});
  one(Count<5>{});
  one(Count<6>{});
  one(Count<7>{});
  one(Count<8>{});
}

// Calls tile(m, Count<k>{}) for each of them, which begins at row m.
template <int kLargest, typename Tile>
static inline void for_each_row_tile(int64_t rows, int64_t tiles, const Tile& tile) {
  int64_t m = 0;
  for (const int64_t full = rows - tiles * (kLargest - 1); m < full * kLargest; m += kLargest)
    tile(m, Count<kLargest>{});
  if constexpr (kLargest > 1)
    for (; m < rows; m += kLargest - 1) tile(m, Count<kLargest - 1>{});
}

}  // namespace cerberus::CERBERUS_ISA
