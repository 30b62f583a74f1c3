// Vectors of float of this level's width, and the element types that tensors hold.
//
// Built on the vector extension of GCC and Clang, so that one source serves every level; intrinsics only
// where the extension has no word for it (fused multiply-add, float16) or the compiler misses the instruction
// (bfloat16). Every sum across lanes is taken in one fixed order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "args.h"
#include "cpu/parallel.h"

namespace cerberus::CERBERUS_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UIntVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
static inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// --- one element ---

static inline float to_float(float x) { return x; }
static inline float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
static inline float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Exponent and fraction moved to float32's places are the value times 2^-112, subnormals included.
  const float magnitude = bit_cast<float>(rest << 13) * bit_cast<float>(0x77800000u);
  return bit_cast<float>(sign | bit_cast<uint32_t>(magnitude));
}

// Rounding to nearest, ties to even.
static inline void from_float(float x, float& out) { out = x; }
static inline void from_float(float x, BFloat16& out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN stays one
  } else {
    out.bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}
static inline void from_float(float x, Float16& out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out.bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    out.bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // below 2^-14: subnormal; adding 0.5 lets the FPU round at 2^-24
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    out.bits = static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
  } else {
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u);
    out.bits = static_cast<uint16_t>(sign | rounded >> 13);
  }
}

// out[i] = x[i], rounded to the type of `out`, for kCount elements: a power of two, of no more than kLanes.
// To the bits that from_float gives, of a NaN too.
template <int kCount, typename T>
static inline void from_floats(const float* x, T* out) {
  for (int i = 0; i < kCount; ++i) from_float(x[i], out[i]);
}
template <int kCount>
struct Integers {
  typedef uint32_t Words __attribute__((vector_size(4 * kCount)));
  typedef uint16_t Halves __attribute__((vector_size(2 * kCount)));
};
template <int kCount>
static inline typename Integers<kCount>::Words load_words(const float* x) {
  typename Integers<kCount>::Words bits;
  __builtin_memcpy(&bits, x, sizeof(bits));
  return bits;
}
template <int kCount>
static inline void from_floats(const float* x, BFloat16* out) {
  const auto bits = load_words<kCount>(x), upper = bits >> 16;
  const auto rounded = (bits + 0x7fffu + (upper & 1u)) >> 16;
  const auto all = (bits & 0x7fffffffu) > 0x7f800000u ? upper | 0x40u : rounded;
  const auto halves = __builtin_convertvector(all, typename Integers<kCount>::Halves);
  __builtin_memcpy(out, &halves, sizeof(halves));
}
#if defined(__F16C__)
template <int kCount>
static inline void from_floats(const float* x, Float16* out) {
  if constexpr (kCount < 8) {
    for (int i = 0; i < kCount; ++i) from_float(x[i], out[i]);
  } else {
    const auto bits = load_words<kCount>(x);
    const auto number = (bits & 0x7fffffffu) > 0x7f800000u ? (bits & 0x80000000u) | 0x7fc00000u : bits;
#if defined(__AVX512F__)
    if constexpr (kCount == 16) {
      const __m256i halves = _mm512_cvtps_ph(bit_cast<__m512>(number), _MM_FROUND_TO_NEAREST_INT);
      return _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
    }
#endif
    if constexpr (kCount == 8) {
      const __m128i halves = _mm256_cvtps_ph(bit_cast<__m256>(number), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), halves);
    }
  }
}
#endif

// --- one vector ---

static inline Vec broadcast(float x) { return x - Vec{}; }

static inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
static inline Vec load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bit_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(__AVX2__)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bit_cast<Vec>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
  HalfVec half;
  __builtin_memcpy(&half, p, sizeof(half));
  return bit_cast<Vec>(__builtin_convertvector(half, UIntVec) << 16);
#endif
}
static inline Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return bit_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// The first `count` < kLanes elements, zeros in the other lanes. Few instructions: every tile of a product
// has many of these.
#if defined(__AVX512F__)
static inline Vec load_part(const float* p, int64_t count) {
  return bit_cast<Vec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p));
}
static inline __m256i load_half_part(const void* p, int64_t count) {
  return _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
}
static inline Vec load_part(const BFloat16* p, int64_t count) {
  return bit_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half_part(p, count)), 16));
}
static inline Vec load_part(const Float16* p, int64_t count) {
  return bit_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, load_half_part(p, count)));
}
#else
template <typename T>
static inline Vec load_part(const T* p, int64_t count) {
  T part[kLanes] = {};
  __builtin_memcpy(part, p, static_cast<size_t>(count) * sizeof(T));
  return load(part);
}
#endif

// Pairs of bfloat16, side by side in 32 bits each: those of even and those of odd numbers are a shift or a
// mask away.
struct Pairs {
  UIntVec words;
  Vec even() const { return bit_cast<Vec>(words << 16); }
  Vec odd() const { return bit_cast<Vec>(words & 0xffff0000u); }
};
static inline Pairs load_pairs(const BFloat16* p) {
#if defined(__AVX512F__)
  return {bit_cast<UIntVec>(_mm512_loadu_si512(p))};
#elif defined(__AVX2__)
  return {bit_cast<UIntVec>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
#else
  Pairs pairs;
  __builtin_memcpy(&pairs, p, sizeof(pairs));
  return pairs;
#endif
}
// The first `count` < 2 kLanes, zeros behind them.
static inline Pairs load_pairs(const BFloat16* p, int64_t count) {
#if defined(__AVX512F__)
  return {bit_cast<UIntVec>(_mm512_maskz_loadu_epi16((1u << count) - 1, p))};
#else
  Pairs pairs{};
  __builtin_memcpy(&pairs, p, static_cast<size_t>(count) * sizeof(BFloat16));
  return pairs;
#endif
}

// v, in a register from here on: else every instruction that uses it may load it anew.
template <typename V>
static inline V in_register(V v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__AVX2__)
  __asm__("" : "+x"(v));
#endif
  return v;
}

static inline void store(Vec v, float* p) { __builtin_memcpy(p, &v, sizeof(v)); }

// a * b + c, rounded once where the level has an instruction for that. Said outright, not left to the
// compiler, which may fuse a product into one sum in one function and into another in the next.
static inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
#elif defined(__FMA__)
  return bit_cast<Vec>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
#elif defined(__ARM_NEON)
  return bit_cast<Vec>(
      vfmaq_f32(bit_cast<float32x4_t>(c), bit_cast<float32x4_t>(a), bit_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}

// The sum of the lanes: of the upper and the lower half, and so on down to one.
static inline float sum(Vec v) {
  float lanes[kLanes];
  store(v, lanes);
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// out[i] = sum(v[i]), to the same bits, in fewer instructions than four sums.
static inline void sum_four(const Vec (&v)[4], float* out) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  struct Halves {
    __m256 low, high;
  };
#endif
  __m128 quarter[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    const Halves halves = bit_cast<Halves>(v[i]);  // the intrinsics for it make GCC 12 warn
    const __m256 half = _mm256_add_ps(halves.low, halves.high);
#else
    const __m256 half = bit_cast<__m256>(v[i]);
#endif
    quarter[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  // Lanes 0 and 2, 1 and 3 of two vectors at a time, then both pairs of all four.
  const __m128 first =
      _mm_add_ps(_mm_unpacklo_ps(quarter[0], quarter[1]), _mm_unpackhi_ps(quarter[0], quarter[1]));
  const __m128 second =
      _mm_add_ps(_mm_unpacklo_ps(quarter[2], quarter[3]), _mm_unpackhi_ps(quarter[2], quarter[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(first, second), _mm_movehl_ps(second, first)));
#else
  for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
#endif
}

#if defined(__AVX512F__)
// Two vectors' quarters 0 and 2, 1 and 3 (kFirst: 0 and 1, 2 and 3), added: half as many quarters of each.
template <bool kFirst>
static inline __m512 add_quarters(__m512 a, __m512 b) {
  constexpr int kOne = kFirst ? 0x44 : 0x88, kOther = kFirst ? 0xee : 0xdd;
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, kOne), _mm512_shuffle_f32x4(a, b, kOther));
}
// The same within every quarter.
template <bool kFirst>
static inline __m512 add_within_quarters(__m512 a, __m512 b) {
  constexpr int kOne = kFirst ? 0x44 : 0x88, kOther = kFirst ? 0xee : 0xdd;
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, kOne), _mm512_shuffle_ps(a, b, kOther));
}
// One vector whose quarter i holds four sums of quarters of v[i * kStride].
template <int kStride>
static inline __attribute__((always_inline)) __m512 quarter_sums(const Vec* v) {
  const auto at = [v](int i) { return bit_cast<__m512>(v[i * kStride]); };
  return add_quarters<false>(add_quarters<true>(at(0), at(1)), add_quarters<true>(at(2), at(3)));
}

// out[i] = sum(v[i]), to the same bits, sixteen or eight at a time: the adding transposes.
static inline __attribute__((always_inline)) void sum_sixteen(const Vec* v, float* out) {
  const __m512 first = add_within_quarters<true>(quarter_sums<4>(v), quarter_sums<4>(v + 1));
  const __m512 second = add_within_quarters<true>(quarter_sums<4>(v + 2), quarter_sums<4>(v + 3));
  _mm512_storeu_ps(out, add_within_quarters<false>(first, second));
}
static inline __attribute__((always_inline)) void sum_eight(const Vec* v, float* out) {
  const __m512 pairs = add_within_quarters<true>(quarter_sums<2>(v), quarter_sums<2>(v + 1));
  const __m512i twice = bit_cast<__m512i>(add_within_quarters<false>(pairs, pairs));
  const __m512i once = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 0, 2, 4, 6), twice);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(once));
}
#endif

// out[i][j] = sum(v[i][j]). Constant indices all along, so that the vectors may stay in registers.
template <int kRows, int kColumns>
static inline __attribute__((always_inline)) void sum_each(const Vec (&v)[kRows][kColumns],
                                                           float (&out)[kRows][kColumns]) {
  constexpr int kAll = kRows * kColumns;
  const Vec* all = &v[0][0];
  float* each = &out[0][0];
#if defined(__AVX512F__)
  constexpr int kSixteen = kAll >= 16 ? 16 : 0, kDone = kSixteen + (kAll - kSixteen >= 8 ? 8 : 0);
  if constexpr (kSixteen > 0) sum_sixteen(all, each);
  if constexpr (kDone > kSixteen) sum_eight(all + kSixteen, each + kSixteen);
#else
  constexpr int kDone = 0;
#endif
  constexpr int kFours = kDone + (kAll - kDone) / 4 * 4;
#pragma GCC unroll 8
  for (int i = kDone; i < kFours; i += 4) sum_four({all[i], all[i + 1], all[i + 2], all[i + 3]}, each + i);
  if constexpr (kFours + 1 == kAll) each[kFours] = sum(all[kFours]);
  if constexpr (kFours + 1 < kAll) {
    Vec last[4] = {};
    float sums[4];
#pragma GCC unroll 4
    for (int i = kFours; i < kAll; ++i) last[i - kFours] = all[i];
    sum_four(last, sums);
#pragma GCC unroll 4
    for (int i = kFours; i < kAll; ++i) each[i] = sums[i - kFours];
  }
}

static inline Vec select(IntVec condition, Vec yes, Vec no) { return condition ? yes : no; }

// Is the condition true in any lane?
static inline bool any(IntVec condition) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bit_cast<__m512i>(condition), bit_cast<__m512i>(condition)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(bit_cast<__m256i>(condition), bit_cast<__m256i>(condition));
#else
  int32_t all = 0;
  for (int lane = 0; lane < kLanes; ++lane) all |= condition[lane];
  return all != 0;
#endif
}

// The largest lane; none is NaN.
static inline float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(bit_cast<__m512>(v));
#else
  float top = v[0];
  for (int lane = 1; lane < kLanes; ++lane)
    if (v[lane] > top) top = v[lane];
  return top;
#endif
}

// e^x to about 1 ulp; 0 below -87, infinite above 88; NaN stays. 2^n e^r with |r| <= ln(2) / 2 and the Taylor
// polynomial of degree 7.
static inline Vec exp(Vec x) {
  const Vec round = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds; the low bits hold the integer
  const Vec low = broadcast(-87.0f);
  const Vec high = broadcast(88.0f), infinite = broadcast(__builtin_inff());
  const IntVec vanishes = x < low;
  const IntVec overflows = x > high;
  const IntVec number = x == x;
  const Vec shifted =
      multiply_add(select(vanishes, low, select(overflows, high, x)), broadcast(1.44269504f), round);
  const Vec n = shifted - round;
  // ln(2) in two parts, the first exact in the product
  const Vec r = multiply_add(n, broadcast(2.12194440e-4f), multiply_add(n, broadcast(-0.693359375f), x));
  Vec y = broadcast(1.0f / 5040.0f);
  y = multiply_add(y, r, broadcast(1.0f / 720.0f));
  y = multiply_add(y, r, broadcast(1.0f / 120.0f));
  y = multiply_add(y, r, broadcast(1.0f / 24.0f));
  y = multiply_add(y, r, broadcast(1.0f / 6.0f));
  y = multiply_add(y, r, broadcast(0.5f));
  y = multiply_add(y, r, broadcast(1.0f));
  y = multiply_add(y, r, broadcast(1.0f));
  // unsigned: of huge numbers and NaN the sums wrap around, and are not taken
  const UIntVec power = (bit_cast<UIntVec>(shifted) - bit_cast<UIntVec>(round)) << 23;
  const Vec power_of_e = bit_cast<Vec>(bit_cast<UIntVec>(y) + power);
  return select(number, select(vanishes, Vec{}, select(overflows, infinite, power_of_e)), x);
}

static inline float exp(float x) { return exp(broadcast(x))[0]; }

// A number as a type, for what is to be unrolled.
template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// Calls body(T{}) with the C++ type of a dtype. The levels that exist for bfloat16 see no other:
// dispatch.cpp.
template <typename Body>
static inline void with_type([[maybe_unused]] DType dtype, const Body& body) {
#if defined(CERBERUS_BFLOAT16_ONLY)
  body(BFloat16{});
#else
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
  }
#endif
}

// Calls body(task) for every task, through the C interface of Parallel.
template <typename Body>
static inline void parallel_tasks(const Parallel& parallel, int64_t tasks, const Body& body) {
  if (tasks <= 0) return;
  if (tasks == 1 || parallel.threads == 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  parallel.run(
      tasks, [](const void* state, int64_t task) { (*static_cast<const Body*>(state))(task); }, &body);
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Memory of one call or task, from the beginning of a cache line on: a vector that lies across two of them
// takes twice as long to load. Not new: nothing of the C++ library may be instantiated per level.
template <typename T>
struct Buffer {
  explicit Buffer(int64_t count)
      : data(static_cast<T*>(aligned_alloc(64, (sizeof(T) * static_cast<size_t>(count) / 64 + 1) * 64))) {
    if (!data) __builtin_abort();
  }
  ~Buffer() { __builtin_free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data;
};
using Scratch = Buffer<float>;

}  // namespace cerberus::CERBERUS_ISA
