// What attention on a CPU is made of: scores and weighted values of a few queries side by side, in registers.
#pragma once

#include "cpu/attention_keys.h"

namespace cerberus::CERBERUS_ISA {
namespace {

// Queries that are computed side by side, by kVectors vectors of keys or of a value's elements: their sums,
// one number of each query and one vector fill the registers.
constexpr int kTogether = kLanes == 16 ? 6 : 3;
constexpr int kVectors = 4;
constexpr int64_t kChain = 32;  // steps of a score's sum that are one chain: longer ones would round worse

// e^x of x <= 0 as 2^n 2^r, to 1e-7 of itself; 0 below e^-87, also of -inf; NaN stays. The polynomial is
// fitted to 2^r, |r| <= 1/2, and 1 at 0.
Vec exp_of_negative(Vec x) {
  const Vec round = broadcast(12582912.0f), to_base_2 = broadcast(1.44269504f);  // as in vec.h
  const Vec shifted = multiply_add(x, to_base_2, round);
  const Vec n = shifted - round;
  const Vec r = multiply_add(x, to_base_2, -n);
  Vec y = broadcast(0.00015353362f);
  y = multiply_add(y, r, broadcast(0.00133988739f));
  y = multiply_add(y, r, broadcast(0.00961843692f));
  y = multiply_add(y, r, broadcast(0.0555033237f));
  y = multiply_add(y, r, broadcast(0.240226477f));
  y = multiply_add(y, r, broadcast(0.693147182f));
  y = multiply_add(y, r, broadcast(1.0f));
  const Vec low = broadcast(-87.0f);
#if defined(__AVX512F__)
  const __mmask16 counts = _mm512_cmp_ps_mask(bit_cast<__m512>(x), bit_cast<__m512>(low), _CMP_NLT_UQ);
  return bit_cast<Vec>(_mm512_maskz_scalef_ps(counts, bit_cast<__m512>(y), bit_cast<__m512>(n)));
#else
  const UIntVec power = (bit_cast<UIntVec>(shifted) - bit_cast<UIntVec>(round)) << 23;
  const Vec result = bit_cast<Vec>(bit_cast<UIntVec>(y) + power);
  return select(x < low, Vec{}, select(x == x, result, x));
#endif
}

// Calls body(i, Count<n>) for n queries from i on, kTogether as long as there are so many.
template <typename Body>
void some_together(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kTogether <= end; i += kTogether) body(i, Count<kTogether>{});
  if constexpr (kTogether > 3)
    if (end - i >= 3) {
      body(i, Count<3>{});
      i += 3;
    }
  if (end - i == 2) body(i, Count<2>{});
  if (end - i == 1) body(i, Count<1>{});
}

// out[j][lane] = scale q[j] key[lane] of kCount vectors of keys: `steps` rows of kBlock keys from `column`
// on.
template <typename T, int kQueries, int kCount>
void tile_of_scores(const typename Products<T>::Element* query, int64_t steps, const float* column,
                    float scale, float* out, int64_t stride) {
  const Vec scales = broadcast(scale);
  for (int64_t step = 0; step < steps;) {
    const bool is_first = step == 0;
    const int64_t end = smaller(steps, step + kChain);
    Vec dots[kQueries][kCount] = {};
    for (; step < end; ++step, column += kBlock) {
      Vec element[kQueries];
#pragma GCC unroll 8
      for (int j = 0; j < kQueries; ++j) element[j] = Products<T>::spread(query[j * steps + step]);
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) {
        const Vec key = load(column + v * kLanes);
#pragma GCC unroll 8
        for (int j = 0; j < kQueries; ++j) dots[j][v] = Products<T>::add(element[j], key, dots[j][v]);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kQueries; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) {
        float* to = out + j * stride + v * kLanes;
        store(is_first ? dots[j][v] * scales : multiply_add(dots[j][v], scales, load(to)), to);
      }
  }
}

// sums[j][e] = sums[j][e] * decay[j] + weight[j][key] v[e] over some keys of a block, for kCount vectors from
// `e` on. weights: (kQueries, kBlock). value_at: a key's value. sums: rows of `stride`.
template <typename T, int kQueries, int kCount, typename ValueAt, typename Load>
void tile_of_values(const float* weights, int64_t first, int64_t end, int64_t e, const ValueAt& value_at,
                    const Load& load_at, const float* decay, float* sums, int64_t stride) {
  Vec totals[kQueries][kCount];
#pragma GCC unroll 8
  for (int j = 0; j < kQueries; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v)
      totals[j][v] = load(sums + j * stride + e + v * kLanes) * broadcast(decay[j]);
  for (int64_t key = first; key < end; ++key) {
    const T* value = value_at(key) + e;
    Vec spread[kQueries];
#pragma GCC unroll 8
    for (int j = 0; j < kQueries; ++j) spread[j] = broadcast(weights[j * kBlock + key]);
    const auto add = [&](int v, Vec elements) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int j = 0; j < kQueries; ++j) totals[j][v] = multiply_add(elements, spread[j], totals[j][v]);
    };
    if constexpr (kEvenAndOdd<T> && kCount == kVectors) {
#pragma GCC unroll 2
      for (int v = 0; v < kCount; v += 2) {
        Vec even, odd;
        load_even_and_odd(value + v * kLanes, even, odd);
        add(v, even);
        add(v + 1, odd);
      }
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) add(v, load_at(value + v * kLanes));
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kQueries; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) store(totals[j][v], sums + j * stride + e + v * kLanes);
}

}  // namespace
}  // namespace cerberus::CERBERUS_ISA
