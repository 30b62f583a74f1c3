// What the kinds of weights in blocks have in common: every 32 bfloat16 weights of a row along k are integers
// times one or two float16 numbers, rounded, as a file had them. Tiles of kPackedWeights rows.
//
// A kind has its bytes of a tile, a class of the weights of a step as Product<X> takes them, and a function
// that packs a row and compares every weight with what the kernels will make of it, so that sums are those of
// rows_times_packed, to the same bits. rows_times_blocks in packed.h multiplies.
#pragma once

#include "cpu/packed.h"

namespace cerberus::CERBERUS_ISA {

constexpr int64_t kBlock = 32;  // k that share their scales

// p, so that the compiler reads what is there anew each time: the sums of a tile need the registers.
template <typename T>
static inline const T* from_memory(const T* p) {
  __asm__("" : "+r"(p));
  return p;
}

#if defined(__AVX512F__)
// To bfloat16, to nearest, ties to even. 65537 x is rounded where bfloat16 is, 16 bits further up; without
// 65536 x, which is exact, x is left, rounded. A zero becomes +0, and what is beyond 2^111 no number: which
// of the values are rounded is said in `which`, and packing leaves alone what comes out wrong.
struct RoundingConstants {
  float above = 65537, below = -65536;
};
static inline __m512 round_to_bfloat16(const RoundingConstants& constants, __m512 x, __mmask16 which) {
  const __m512 above = _mm512_mul_ps(x, _mm512_set1_ps(constants.above));
  return _mm512_mask_fmadd_ps(x, which, _mm512_set1_ps(constants.below), above);
}
#endif

#if defined(__AVX512F__)
// 32 weights as Product<X> takes them: get<part>(); and as they are in memory: words(). A kind makes them.
template <typename X>
class BlockWeights;

template <>
class BlockWeights<PairedFloat> {
 public:
  template <int kPart>
  Vec get() const {
    return parts_[kPart];
  }
  __m512i words() const {
    return bit_cast<__m512i>(bit_cast<UIntVec>(parts_[0]) >> 16 | bit_cast<UIntVec>(parts_[1]));
  }
  // Of every pair, whether both are what words() takes them for: subnormal numbers are rounded less far.
  __mmask16 are_bfloat16() const {
    const UIntVec both = bit_cast<UIntVec>(parts_[0]) | bit_cast<UIntVec>(parts_[1]);
    return _mm512_testn_epi32_mask(bit_cast<__m512i>(both), _mm512_set1_epi32(0xffff));
  }

 protected:
  Vec parts_[2];
};

#if defined(__AVX512BF16__)
template <>
class BlockWeights<BFloat16> {
 public:
  template <int>
  __m512bh get() const {
    return bit_cast<__m512bh>(words_);
  }
  __m512i words() const { return words_; }
  __mmask16 are_bfloat16() const { return 0xffff; }

 protected:
  __m512i words_;
};
#endif
#endif

static inline float rounded_to_bfloat16(float x) {
  BFloat16 rounded;
  from_float(x, rounded);
  return to_float(rounded);
}

// Calls body(x) for float16 numbers around x, nearest first, until it returns true; returns whether it did.
template <typename Body>
static inline bool any_near(float x, const Body& body) {
  constexpr int kNear = 10;  // on either side: more than round to one bfloat16
  Float16 nearest;
  from_float(x, nearest);
  for (int i = 0; i <= 2 * kNear; ++i) {
    const int bits = nearest.bits + (i % 2 ? (i + 1) / 2 : -i / 2);
    if (((bits ^ nearest.bits) & 0x8000) || (bits & 0x7c00) == 0x7c00) continue;  // another sign, not finite
    if (body(to_float(Float16{static_cast<uint16_t>(bits)}))) return true;
  }
  return false;
}

#if defined(__AVX512F__)
// Calls body(d) for numbers d of which all weights of these lanes, even and odd ones, are multiples, rounded,
// the largest by `most` times or fewer, until it returns true; returns whether it did. Above 0.
//
// How many times the largest is d says which multiple every weight is, since `most` is no more than 32 and
// rounding takes away less than half of d; and each weight says then between which numbers d lies.
template <typename Body>
static inline bool any_divisor(const Pairs& pairs, __mmask16 lanes, int most, const Body& body) {
  const __m512 x[2] = {_mm512_abs_ps(bit_cast<__m512>(pairs.even())),
                       _mm512_abs_ps(bit_cast<__m512>(pairs.odd()))};
  const float largest = _mm512_mask_reduce_max_ps(lanes, _mm512_max_ps(x[0], x[1]));
  for (int n = most; n > 0; --n) {
    const __m512 share = _mm512_set1_ps(static_cast<float>(n) / largest);
    float low = 0, high = 3e38f;
    for (const __m512& magnitude : x) {
      const __m512 q = _mm512_roundscale_ps(_mm512_mul_ps(magnitude, share),
                                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __mmask16 counted = _mm512_mask_cmp_ps_mask(lanes, q, _mm512_setzero_ps(), _CMP_GT_OQ);
      // What is rounded to a bfloat16 number lies up to halfway to the ones beside it.
      const __m512i bits = bit_cast<__m512i>(magnitude), half = _mm512_set1_epi32(0x8000);
      const __m512 below = bit_cast<__m512>(_mm512_sub_epi32(bits, half));
      const __m512 above = bit_cast<__m512>(_mm512_add_epi32(bits, half));
      const float least = _mm512_mask_reduce_max_ps(counted, _mm512_div_ps(below, q));
      const float greatest = _mm512_mask_reduce_min_ps(counted, _mm512_div_ps(above, q));
      if (least > low) low = least;
      if (greatest < high) high = greatest;
    }
    if (low > 0 && low <= high && body(0.5f * (low + high))) return true;
  }
  return false;
}
#endif

}  // namespace cerberus::CERBERUS_ISA
