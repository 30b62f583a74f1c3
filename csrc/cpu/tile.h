// Adds the products of a tile of rows and weights: what few rows and many have in common, see gemm.cpp.
#pragma once

#include "cpu/dot.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int64_t kAheadBytes =
    4096;  // beyond the tile's own weights: measured, 1 KiB to 16 KiB differ little

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

}  // namespace
}  // namespace cerberus::CERBERUS_ISA
