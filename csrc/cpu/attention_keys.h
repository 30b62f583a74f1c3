// Keys and values as tree_attention takes them from the cache.
#pragma once

#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int kBlock = 64;  // keys

// How a score is added up: a chain of `steps`, each with 32 bits of the query and of every lane's key.
template <typename T>
struct Products {
  using Element = float;
  static constexpr int64_t kElements = 1;  // a step
  static int64_t steps(int64_t size) { return size; }
  static void pack(const T* q, int64_t size, Element* out) {
    for (int64_t e = 0; e < size; ++e) out[e] = to_float(q[e]);
  }
  static Vec spread(Element x) { return broadcast(x); }
  // Elements of a key from `step` on: kLanes, or those that are left.
  static Vec load_all(const T* key, int64_t step) { return load(key + step); }
  static Vec load_rest(const T* key, int64_t step, int64_t size) {
    return load_part(key + step, size - step);
  }
  static Vec add(Vec q, Vec key, Vec sum) { return multiply_add(q, key, sum); }
};

#if defined(__AVX512BF16__)
// A pair of elements a step: vdpbf16ps.
template <>
struct Products<BFloat16> {
  using Element = int32_t;
  static constexpr int64_t kElements = 2;
  static int64_t steps(int64_t size) { return (size + 1) / 2; }
  static void pack(const BFloat16* q, int64_t size, Element* out) {
    out[steps(size) - 1] = 0;
    __builtin_memcpy(out, q, static_cast<size_t>(size) * sizeof(BFloat16));
  }
  static Vec spread(Element x) { return bit_cast<Vec>(_mm512_set1_epi32(x)); }
  static Vec load_all(const BFloat16* key, int64_t step) {
    return bit_cast<Vec>(_mm512_loadu_si512(key + 2 * step));
  }
  static Vec load_rest(const BFloat16* key, int64_t step, int64_t size) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << (size - 2 * step)) - 1);
    return bit_cast<Vec>(_mm512_maskz_loadu_epi16(mask, key + 2 * step));
  }
  static Vec add(Vec q, Vec key, Vec sum) {
    return bit_cast<Vec>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(q), bit_cast<__m512bh>(key)));
  }
};
#endif

// Values as vectors, as they are or, where that takes fewer instructions, two of them with the elements of
// even and of odd numbers.
template <typename T>
constexpr bool kEvenAndOdd = false;
#if defined(__AVX512F__)
template <>
constexpr bool kEvenAndOdd<BFloat16> = true;

void load_even_and_odd(const BFloat16* p, Vec& even, Vec& odd) {
  const Pairs pairs = load_pairs(p);
  even = pairs.even();
  odd = pairs.odd();
}
// And back, in place.
void merge_even_and_odd(float* both) {
  const __m512 even = bit_cast<__m512>(load(both)), odd = bit_cast<__m512>(load(both + kLanes));
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_storeu_ps(both, _mm512_permutex2var_ps(even, first, odd));
  _mm512_storeu_ps(both + kLanes, _mm512_permutex2var_ps(even, second, odd));
}
#endif

// rows[i][j] and rows[j][i] change places.
void transpose(Vec (&rows)[kLanes]) {
#if defined(__AVX512F__)
  __m512 pairs[16], fours[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(bit_cast<__m512>(rows[i]), bit_cast<__m512>(rows[i + 1]));
    pairs[i + 1] = _mm512_unpackhi_ps(bit_cast<__m512>(rows[i]), bit_cast<__m512>(rows[i + 1]));
  }
  // Quarter n of fours[4 g + c]: column 4 n + c of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512d a = _mm512_castps_pd(pairs[i + half]), b = _mm512_castps_pd(pairs[i + 2 + half]);
      fours[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      fours[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd);
    const __m512 even_below = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
    const __m512 odd_below = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd);
    rows[c] = bit_cast<Vec>(_mm512_shuffle_f32x4(even, even_below, 0x88));
    rows[4 + c] = bit_cast<Vec>(_mm512_shuffle_f32x4(odd, odd_below, 0x88));
    rows[8 + c] = bit_cast<Vec>(_mm512_shuffle_f32x4(even, even_below, 0xdd));
    rows[12 + c] = bit_cast<Vec>(_mm512_shuffle_f32x4(odd, odd_below, 0xdd));
  }
#elif defined(__AVX2__)
  __m256 pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(bit_cast<__m256>(rows[i]), bit_cast<__m256>(rows[i + 1]));
    pairs[i + 1] = _mm256_unpackhi_ps(bit_cast<__m256>(rows[i]), bit_cast<__m256>(rows[i + 1]));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256d a = _mm256_castps_pd(pairs[i + half]), b = _mm256_castps_pd(pairs[i + 2 + half]);
      fours[i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      fours[i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    rows[c] = bit_cast<Vec>(_mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20));
    rows[4 + c] = bit_cast<Vec>(_mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31));
  }
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float swapped = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = swapped;
    }
#endif
}

// columns[step][i] = keys[i][step] for `count` <= kBlock keys, up to a whole vector of them.
template <typename T>
void take_keys(const T* keys, int64_t count, int64_t size, float* columns) {
  const int64_t steps = Products<T>::steps(size), whole = size / Products<T>::kElements;
  for (int64_t first = 0; first < count; first += kLanes) {
    for (int64_t step = 0; step < steps; step += kLanes) {
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* key = keys + smaller(first + i, count - 1) * size;
        rows[i] = step + kLanes <= whole ? Products<T>::load_all(key, step)
                                         : Products<T>::load_rest(key, step, size);
      }
      transpose(rows);
      const int some = static_cast<int>(smaller(kLanes, steps - step));
      for (int i = 0; i < some; ++i) store(rows[i], columns + (step + i) * kBlock + first);
    }
  }
}

#if !defined(__AVX512BF16__)
// The same, two elements of a key at a time until they are in their place.
template <>
void take_keys(const BFloat16* keys, int64_t count, int64_t size, float* columns) {
  constexpr int64_t kStep = 2 * kLanes;
  for (int64_t first = 0; first < count; first += kLanes)
    for (int64_t e = 0; e < size; e += kStep) {
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const BFloat16* key = keys + smaller(first + i, count - 1) * size + e;
        rows[i] = bit_cast<Vec>(e + kStep <= size ? load_pairs(key).words : load_pairs(key, size - e).words);
      }
      transpose(rows);
      float* to = columns + e * kBlock + first;
      const int some = static_cast<int>(smaller(kStep, size - e));
      for (int i = 0; i < some; ++i, to += kBlock) {
        const Pairs pairs{bit_cast<UIntVec>(rows[i / 2])};
        store(i % 2 ? pairs.odd() : pairs.even(), to);
      }
    }
}
#endif

}  // namespace
}  // namespace cerberus::CERBERUS_ISA
