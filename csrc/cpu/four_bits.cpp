// Finds d and m of weights that came out of a 4-bit file, and packs them, see four_bits.h.
//
// Such a file has d and m of 32 weights as float16: m itself where q counts from 0 (Q4_1: the least weight
// has q = 0, the largest 15), or d alone where it counts from -8 (Q4_0: the weight of the largest magnitude
// has -8). What rounding to bfloat16 took away is a few bits, so that a few tens of pairs are to be tried.
#include "cpu/four_bits.h"

namespace cerberus::CERBERUS_ISA {
namespace {

// The least and the largest of 32 weights.
struct Weights {
  float least, largest;

  explicit Weights(const BFloat16* p) {
    const Pairs pairs = load_pairs(p);
    const __m512 even = bit_cast<__m512>(pairs.even()), odd = bit_cast<__m512>(pairs.odd());
    least = _mm512_reduce_min_ps(_mm512_min_ps(even, odd));
    largest = _mm512_reduce_max_ps(_mm512_max_ps(even, odd));
  }
};

// All values rounded, or all but the one in the middle.
constexpr __mmask16 kAll = 0xffff, kButTheMiddle = 0xfeff;

// A step of one weight row: its place in a tile that it is packed into, and the weights.
struct Block {
  char* tile;
  int64_t size, step;
  int n;
  const BFloat16* weight;

  // Packs it with d and m. Returns whether what is looked up then has the bits of the weights.
  bool fits(float d, float m) const {
    const float scale[2] = {d, m};
    char* scales = tile + four_bit_code_bytes(size) + step * kFourBitScaleBytes;
    __builtin_memcpy(scales + n * sizeof(scale), scale, sizeof(scale));
    const Pairs pairs = load_pairs(weight);
    const __m512i both = _mm512_or_si512(codes(bit_cast<__m512>(pairs.even()), d, m),
                                         _mm512_slli_epi32(codes(bit_cast<__m512>(pairs.odd()), d, m), 4));
    char bytes[16], *to = tile + four_bit_code_place(step, n);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8(both));
    for (int i = 0; i < 16; ++i) to[4 * i] = bytes[i];
    const FourBitTile all(tile, size);
    const __m512i words = FourBitWeights<Row<BFloat16>>(all, step, n).words();
    return _mm512_cmpneq_epi16_mask(words, _mm512_loadu_si512(weight)) == 0;
  }

  // q of each of 16 weights: the nearest.
  static __m512i codes(__m512 x, float d, float m) {
    const __m512 share = _mm512_set1_ps(d == 0 ? 0.0f : 1 / d);
    const __m512i from_middle = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(x, _mm512_set1_ps(m)), share));
    const __m512i q = _mm512_add_epi32(from_middle, _mm512_set1_epi32(8));
    return _mm512_max_epi32(_mm512_min_epi32(q, _mm512_set1_epi32(15)), _mm512_setzero_si512());
  }
};

// As a file has them where q counts from -8; m is a zero that keeps the sign of the middle.
bool fits_without_least(const Weights& w, const Block& block) {
  const float furthest = -w.least > w.largest ? w.least : w.largest;
  if (furthest == 0) return block.fits(-0.0f, -0.0f);
  return any_near(furthest / -8,
                  [&](float d) { return rounded_to_bfloat16(-8 * d) == furthest && block.fits(d, -0.0f); });
}

// As a file has them where the least weight is one of its numbers.
bool fits_with_least(const Weights& w, const Block& block) {
  if (w.least == w.largest) return block.fits(0, w.least);
  return any_near(w.least, [&](float least) {
    if (rounded_to_bfloat16(least) != w.least) return false;
    return any_near((w.largest - least) / 15, [&](float d) {
      return rounded_to_bfloat16(15 * d + least) == w.largest && block.fits(d, 8 * d + least);
    });
  });
}

// One weight row, with these values rounded; returns whether all of it has its bits then.
bool pack_row(const BFloat16* weight, int64_t size, int64_t row, char* packed, __mmask16 rounded) {
  const int n = static_cast<int>(row % kPackedWeights);
  const int64_t tile_bytes = four_bit_tile_bytes(size);
  char* tile = packed + row / kPackedWeights * tile_bytes;
  __builtin_memcpy(tile + tile_bytes - kFourBitTileEnd + n * sizeof(rounded), &rounded, sizeof(rounded));
  for (int64_t k = 0; k < size; k += kBlock) {
    const Weights w(weight + k);
    const Block block{tile, size, k / kBlock, n, weight + k};
    const bool fits = rounded == kAll ? fits_with_least(w, block) || fits_without_least(w, block)
                                      : fits_without_least(w, block);
    if (!fits) return false;
  }
  return true;
}

}  // namespace

bool pack_in_four_bits(const BFloat16* weight, int64_t size, int64_t row, char* packed) {
  return pack_row(weight, size, row, packed, kAll) || pack_row(weight, size, row, packed, kButTheMiddle);
}

}  // namespace cerberus::CERBERUS_ISA
