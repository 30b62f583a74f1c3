// Finds d of weights that came out of a file in 8 or 6 bits, and packs them, see byte_weights.h.
//
// In 8 bits (Q8_0) the largest magnitude of 32 weights is 127 d, d a float16 number. What rounding to
// bfloat16 took away is a few bits, so that about ten numbers are to be tried. In 6 bits (Q6_K) any d may be.
#include "cpu/byte_weights.h"

namespace cerberus::CERBERUS_ISA {
namespace {

// A step of one weight row: its place in a tile that it is packed into, and the weights.
template <Packing kPacking>
class Block {
  using Made = ByteWeights<Row<BFloat16>, kPacking>;
  static constexpr int kScales = byte_scales(kPacking);

 public:
  Block(char* tile, int64_t size, int64_t step, int n, const BFloat16* weight)
      : tile_(tile), size_(size), step_(step), n_(n), weight_(weight), pairs_(load_pairs(weight)) {}

  // Packs the weights of one of its d. Returns whether what is made of them has their bits.
  bool pack(int part) const {
    const __mmask16 lanes = static_cast<__mmask16>(kScales == 1 ? 0xffff : 0xff << 8 * part);
    const __m512 x = bit_cast<__m512>(pairs_.even()), y = bit_cast<__m512>(pairs_.odd());
    const float largest = _mm512_mask_reduce_max_ps(lanes, _mm512_max_ps(_mm512_abs_ps(x), _mm512_abs_ps(y)));
    if (largest == 0) return fits(part, 0);
    if (kPacking == Packing::kBytes)
      return any_near(largest / 127,
                      [&](float d) { return rounded_to_bfloat16(127 * d) == largest && fits(part, d); });
    const __m512i zero = _mm512_set1_epi32(INT32_MIN);  // which has the sign of d
    const bool is_negative = (lanes & (_mm512_cmpeq_epi32_mask(bit_cast<__m512i>(x), zero) |
                                       _mm512_cmpeq_epi32_mask(bit_cast<__m512i>(y), zero))) != 0;
    return any_divisor(pairs_, lanes, 32, [&](float d) { return fits(part, is_negative ? -d : d); });
  }

 private:
  bool fits(int part, float d) const {
    char* scales = tile_ + byte_code_bytes(size_) + (step_ * kPackedWeights + n_) * kScales * sizeof(d);
    __builtin_memcpy(scales + part * sizeof(d), &d, sizeof(d));
    const __m512 all = scales_of_pairs<kScales>(reinterpret_cast<const float*>(scales));
    __m128i first = codes(bit_cast<__m512>(pairs_.even()), all);
    __m128i second = codes(bit_cast<__m512>(pairs_.odd()), all);
    if (!Made::kInPairs) {
      const __m128i low = _mm_unpacklo_epi8(first, second);
      second = _mm_unpackhi_epi8(first, second);
      first = low;
    }
    char* to = tile_ + (step_ * kPackedWeights + n_) * kBlock;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), first);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kLoad), second);
    const Made made(typename Made::Tile(tile_, size_), step_, n_);
    const __mmask32 others = _mm512_cmpneq_epi16_mask(made.words(), _mm512_loadu_si512(weight_));
    const uint32_t inexact = static_cast<__mmask16>(~made.are_bfloat16());
    return (others & (kScales == 1 ? ~0u : 0xffffu << 16 * part)) == 0 &&
           (inexact & (kScales == 1 ? 0xffffu : 0xffu << 8 * part)) == 0;
  }

  // q of each of 16 weights: the nearest; where d is 0, what gives a zero its sign.
  static __m128i codes(__m512 x, __m512 d) {
    const __mmask16 nothing = _mm512_cmp_ps_mask(d, _mm512_setzero_ps(), _CMP_EQ_OQ);
    const __m512i q = _mm512_cvtps_epi32(_mm512_div_ps(x, d));
    return _mm512_cvtsepi32_epi8(_mm512_mask_srai_epi32(q, nothing, bit_cast<__m512i>(x), 31));
  }

  char* tile_;
  int64_t size_, step_;
  int n_;
  const BFloat16* weight_;
  Pairs pairs_;
};

}  // namespace

template <Packing kPacking>
bool pack_in_bytes(const BFloat16* weight, int64_t size, int64_t row, char* packed) {
  char* tile = packed + row / kPackedWeights * byte_tile_bytes(kPacking, size);
  for (int64_t step = 0; step < size / kBlock; ++step) {
    const Block<kPacking> block(tile, size, step, static_cast<int>(row % kPackedWeights),
                                weight + step * kBlock);
    for (int part = 0; part < byte_scales(kPacking); ++part)
      if (!block.pack(part)) return false;
  }
  return true;
}

template bool pack_in_bytes<Packing::kBytes>(const BFloat16*, int64_t, int64_t, char*);
template bool pack_in_bytes<Packing::kBytesOf16>(const BFloat16*, int64_t, int64_t, char*);

}  // namespace cerberus::CERBERUS_ISA
