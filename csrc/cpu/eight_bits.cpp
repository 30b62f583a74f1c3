#include "cpu/eight_bits.h"

#include "cpu/dot.h"
#include "cpu/kernels.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int kVectors = kEightBitRows / kLanes;                  // of sums of a tile, for each row
constexpr int kMostRows = kSums == 24 ? 8 : kSums == 12 ? 4 : 1;  // at a time, whose sums stay in registers
constexpr int64_t kAheadBytes = 4096;  // of the weights that follow, asked for early

// Of two k and kLanes weight rows the q, in 16 bits, two and two; and their products with two k of a row.
#if defined(__AVX512F__)
typedef __m512i PairVec;
inline PairVec load_integers(const int8_t* q) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)));
}
inline IntVec products(PairVec weights, int32_t pair) {
  return bit_cast<IntVec>(_mm512_madd_epi16(weights, _mm512_set1_epi32(pair)));
}
#elif defined(__AVX2__)
typedef __m256i PairVec;
inline PairVec load_integers(const int8_t* q) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
}
inline IntVec products(PairVec weights, int32_t pair) {
  return bit_cast<IntVec>(_mm256_madd_epi16(weights, _mm256_set1_epi32(pair)));
}
#else
struct PairVec {
  IntVec even, odd;
};
inline PairVec load_integers(const int8_t* q) {
  PairVec pairs;
  for (int i = 0; i < kLanes; ++i) {
    pairs.even[i] = q[2 * i];
    pairs.odd[i] = q[2 * i + 1];
  }
  return pairs;
}
inline IntVec products(PairVec weights, int32_t pair) {
  int16_t two[2];
  __builtin_memcpy(two, &pair, sizeof(two));
  return weights.even * two[0] + weights.odd * two[1];
}
#endif

template <typename T>
Vec load_at(const T* x, int64_t i, int64_t size) {
  return i + kLanes <= size ? load(x + i) : load_part(x + i, size - i);
}

// The largest magnitude, NaN where there is a NaN or an infinity.
template <typename T>
float magnitude(const T* x, int64_t size) {
  Vec most{}, none{};  // none: NaN as soon as there is one
  for (int64_t i = 0; i < size; i += kLanes) {
    const Vec here = load_at(x, i, size);
    most = select(here > most, here, most);
    most = select(-here > most, -here, most);
    none += here * 0.0f;
  }
  return largest(most) + sum(none);
}

// to[i] = x[i] in steps of `scale`, which it returns: at most `most` of them, either way. Zeros up to a whole
// vector behind them; and everywhere, where x has numbers that are not finite.
template <typename T>
float round_row(const T* x, int64_t size, float most, int16_t* to) {
  typedef int16_t ShortVec __attribute__((vector_size(2 * kLanes)));
  const float top = magnitude(x, size);
  const float scale = top / most;
  // Of the smallest numbers there are no such steps: they count as zeros.
  const float steps = scale >= 1e-30f ? 1.0f / scale : 0.0f;
  const Vec round = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds; the low bits hold the integer
  for (int64_t i = 0; i < size; i += kLanes) {
    const Vec here = steps > 0 ? load_at(x, i, size) * steps : Vec{};
    const IntVec integers = bit_cast<IntVec>(here + round) - bit_cast<IntVec>(round);
    const ShortVec shorts = __builtin_convertvector(integers, ShortVec);
    __builtin_memcpy(to + i, &shorts, sizeof(shorts));
  }
  return scale;
}

template <int kRows, typename T>
inline void tile(const EightBitRows& x, int64_t first, const char* packed, int64_t count, int64_t m,
                 int64_t n, const Output<T>& output) {
  const int8_t* q = reinterpret_cast<const int8_t*>(packed + kEightBitRows * sizeof(float));
  const int16_t* rows[kRows];
  for (int row = 0; row < kRows; ++row) rows[row] = x.row(first + m + row);
  IntVec sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < x.size(); k += 2, q += 2 * kEightBitRows) {
    __builtin_prefetch(q + kAheadBytes, 0, 2);
    PairVec weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weights[v] = load_integers(q + 2 * v * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      int32_t pair;
      __builtin_memcpy(&pair, rows[row] + k, sizeof(pair));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[row][v] += products(weights[v], pair);
    }
  }
  float dots[kRows][kEightBitRows];
  const float* scales = reinterpret_cast<const float*>(packed);
  for (int row = 0; row < kRows; ++row)
    for (int v = 0; v < kVectors; ++v)
      store(__builtin_convertvector(sums[row][v], Vec) * load(scales + v * kLanes) * x.scale(first + m + row),
            dots[row] + v * kLanes);
  if (count >= kEightBitRows) return output.put(m, n, dots);
  for (int row = 0; row < kRows; ++row)
    for (int i = 0; i < count; ++i) {
      const float one[1][1] = {{dots[row][i]}};
      output.put(m + row, n + i, one);
    }
}

}  // namespace

template <typename T>
void EightBitRows::lay(int64_t row, const T* from) {
  // One less than what leaves no sum of `size` products outside of 32 bits: a step may round up.
  const int64_t most = smaller(INT16_MAX, INT32_MAX / (kLargestWeight * larger(1, size_))) - 1;
  scales_.data[row] = round_row(from, size_, static_cast<float>(most), integers_.data + row * stride_);
}

template <typename T>
void rows_times_eight_bits(const EightBitRows& x, int64_t first, int64_t rows, const char* packed,
                           int64_t begin, int64_t end, const Output<T>& output) {
  const int64_t tile_bytes = eight_bit_tile_bytes(x.size());
  with_row_tiles<kMostRows>(rows, kMostRows, [&](auto most, int64_t tiles) {
    for (int64_t n = begin; n < end; n += kEightBitRows)
      for_each_row_tile<decltype(most)::value>(rows, tiles, [&](int64_t m, auto row_count) {
        tile<decltype(row_count)::value>(x, first, packed + n / kEightBitRows * tile_bytes, end - n, m,
                                         n - begin, output);
      });
  });
}

void pack_eight_bits(const PackEightBitsArgs& a, const Parallel& parallel) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T* weight = static_cast<const T*>(a.weight);
    const int64_t bytes = eight_bit_tile_bytes(a.size);
    parallel_tasks(parallel, (a.rows + kEightBitRows - 1) / kEightBitRows, [&](int64_t tile) {
      char* packed = static_cast<char*>(a.packed) + tile * bytes;
      __builtin_memset(packed, 0, static_cast<size_t>(bytes));
      float* scales = reinterpret_cast<float*>(packed);
      int8_t* to = reinterpret_cast<int8_t*>(scales + kEightBitRows);
      Buffer<int16_t> q(eight_bit_stride(a.size));
      for (int64_t n = 0; n < smaller(kEightBitRows, a.rows - tile * kEightBitRows); ++n) {
        const T* row = weight + (tile * kEightBitRows + n) * a.size;
        scales[n] = round_row(row, a.size, kLargestWeight, q.data);
        for (int64_t k = 0; k < a.size; ++k)
          to[k / 2 * 2 * kEightBitRows + 2 * n + k % 2] = static_cast<int8_t>(q.data[k]);
      }
    });
  });
}

void eight_bit_linear(const LinearArgs& a, const Parallel& parallel) {
  if (a.rows == 0) return;
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    EightBitBlocks<T> weights(a.weight, a.out_size, a.in_size, a.rows);
    for (int64_t row = 0; row < a.rows; ++row)
      weights.lay(row, static_cast<const T*>(a.input) + row * a.in_size);
    const int64_t per_task = weights.rows_per_task(a.in_size);
    const Output<T> output{static_cast<T*>(a.output), nullptr, a.out_size, static_cast<const T*>(a.bias)};
    parallel_tasks(parallel, (a.out_size + per_task - 1) / per_task, [&](int64_t task) {
      const int64_t begin = task * per_task;
      weights.multiply(0, a.rows, 0, begin, smaller(a.out_size, begin + per_task), output.from_weight(begin));
    });
  });
}

#define CERBERUS_INSTANTIATE(T)                                                                             \
  template void EightBitRows::lay(int64_t, const T*);                                                       \
  template void rows_times_eight_bits(const EightBitRows&, int64_t, int64_t, const char*, int64_t, int64_t, \
                                      const Output<T>&);
CERBERUS_INSTANTIATE(BFloat16)
#if !defined(CERBERUS_BFLOAT16_ONLY)
CERBERUS_INSTANTIATE(float)
CERBERUS_INSTANTIATE(Float16)
#endif

}  // namespace cerberus::CERBERUS_ISA
