// Finds d of weights that came out of an 8-bit file, and packs them, see byte_weights.h.
//
// Such a file has d of 32 weights as a float16: their largest magnitude is 127 d. What rounding to bfloat16
// took away is a few bits, so that about ten numbers are to be tried.
#include "cpu/byte_weights.h"

namespace cerberus::CERBERUS_ISA {
namespace {

// 32 weights, even and odd ones.
struct Weights {
  __m512 even, odd;

  explicit Weights(const BFloat16* p) {
    const Pairs pairs = load_pairs(p);
    even = bit_cast<__m512>(pairs.even());
    odd = bit_cast<__m512>(pairs.odd());
  }
  float largest() const {
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(even), _mm512_abs_ps(odd)));
  }
};

// q of each of 16 weights: the nearest.
inline __m128i codes(__m512 x, float d) {
  return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(d == 0 ? 0.0f : 1 / d))));
}

// Packs a step of weight row n with d. Returns whether what is made of it has the bits of the weights.
bool fits(const BFloat16* weight, const Weights& w, float d, char* tile, int64_t size, int64_t step, int n) {
  using Made = ByteWeights<Row<BFloat16>>;
  const int64_t place = step * kPackedWeights + n;
  __m128i first = codes(w.even, d), second = codes(w.odd, d);
  if (!Made::kInPairs) {
    const __m128i low = _mm_unpacklo_epi8(first, second);
    second = _mm_unpackhi_epi8(first, second);
    first = low;
  }
  char* to = tile + place * kBlock;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), first);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kLoad), second);
  __builtin_memcpy(tile + byte_code_bytes(size) + place * sizeof(d), &d, sizeof(d));
  const __m512i words = Made(ByteTile(tile, size), step, n).words();
  return _mm512_cmpneq_epi16_mask(words, _mm512_loadu_si512(weight)) == 0;
}

}  // namespace

bool pack_in_bytes(const BFloat16* weight, int64_t size, int64_t row, char* packed) {
  const int n = static_cast<int>(row % kPackedWeights);
  char* tile = packed + row / kPackedWeights * byte_tile_bytes(size);
  for (int64_t step = 0; step < size / kBlock; ++step, weight += kBlock) {
    const Weights w(weight);
    const float largest = w.largest();
    const bool found = any_near(largest / 127, [&](float d) {
      return rounded_to_bfloat16(127 * d) == largest && fits(weight, w, d, tile, size, step, n);
    });
    if (!found) return false;
  }
  return true;
}

}  // namespace cerberus::CERBERUS_ISA
