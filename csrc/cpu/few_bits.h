// Weights of bfloat16 in four or five bits each, where every 32 of a row along k are d (q - middle) + m,
// rounded, for some d and m and q from 0 to 15 or 31, the middle being 8 or 16: those that came out of a file
// in as many bits (Q4_0, Q4_1, Q4_K; Q5_0, Q5_1, Q5_K).
//
//   packed (tiles): the codes of all blocks of 32 k, then d and m (float32) of each step's weight rows, then
//   for each row which of 16 values are rounded, a bit each, see below
//
// In four bits, 16 bytes of codes belong to a step of one weight row: byte i is q of element 2 i, above it
// that of 2 i + 1. Four of these lie in one another, a byte in each 32-bit word, since the look-up sees the
// lowest bits of a word alone: whatever stands above them, a load from a byte further on is all that it
// takes. In five bits word i of a step has them for all weight rows of the tile, ten bits each.
//
// What is looked up has the bits of the weights: pack_in_few_bits compares all of them.
//
// Measured on Emerald Rapids with 49152 x 576 weights, beside bfloat16: 0.62 of the time of one row in four
// bits, 0.7 in five; of four rows 0.74 and 0.83; of eight 1.0 and 1.1.
#pragma once

#include "cpu/pack_blocks.h"

namespace cerberus::CERBERUS_ISA {

// 0: none of so few.
constexpr int few_bits(Packing packing) {
  return packing == Packing::kFourBits ? 4 : packing == Packing::kFiveBits ? 5 : 0;
}

// Bytes of the scales of a step; of a tile's codes, of its end, and in all.
constexpr int64_t kFewBitScaleBytes = kPackedWeights * 2 * 4, kFewBitTileEnd = 8;
static inline int64_t few_bit_code_bytes(int bits, int64_t size) {
  return bits == 5 ? size / kBlock * 64 : (size / kBlock * kPackedWeights + 3) / 4 * 64;
}
static inline int64_t few_bit_tile_bytes(int bits, int64_t size) {
  const int64_t bytes = few_bit_code_bytes(bits, size) + size / kBlock * kFewBitScaleBytes + kFewBitTileEnd;
  return bits == 5 ? (bytes + 63) / 64 * 64 : bytes;
}

// Where the first of the codes of a step's weight row n is, and then every fourth byte.
static inline int64_t four_bit_code_place(int64_t step, int n) {
  const int64_t place = step * kPackedWeights + n;
  return place / 4 * 64 + place % 4;
}

#if defined(__AVX512F__)
// What looking up takes besides; in memory, since the sums of a tile need the registers.
struct FewBitConstants {
  alignas(64) float levels[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  float lower[16] = {-16, -15, -14, -13, -12, -11, -10, -9, -8, -7, -6, -5, -4, -3, -2, -1};
  float upper[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  RoundingConstants rounding;
};
static constexpr FewBitConstants kFewBitConstants;

// A tile, and which of the 16 values of its rows, in five bits the upper ones, are rounded: all, or all but
// the one in the middle, which is a zero of either sign then, as in a file that counts q from -8 or -16.
template <int kBits>
struct FewBitTile {
  FewBitTile(const char* tile, int64_t size) : codes_(tile), scales_(tile + few_bit_code_bytes(kBits, size)) {
    __builtin_memcpy(rounded, tile + few_bit_tile_bytes(kBits, size) - kFewBitTileEnd, sizeof(rounded));
  }
  // In the lowest bits of each lane q of an even element, above it that of the odd one; then of others.
  UIntVec codes(int64_t step, int n) const {
    static_assert(kPackedWeights * 10 <= 32, "a word has two codes of every weight row");
    if (kBits == 5) return bit_cast<UIntVec>(_mm512_loadu_si512(codes_ + step * 64)) >> 10 * n;
    return bit_cast<UIntVec>(_mm512_loadu_si512(codes_ + four_bit_code_place(step, n)));
  }
  // 16 of the values of a step's weight row n, those of `levels`, not rounded yet.
  __m512 values(const float* levels, int64_t step, int n) const {
    const float* scale = reinterpret_cast<const float*>(scales_ + step * kFewBitScaleBytes) + 2 * n;
    return _mm512_fmadd_ps(_mm512_set1_ps(scale[0]), _mm512_load_ps(levels), _mm512_set1_ps(scale[1]));
  }
  __mmask16 rounded[kPackedWeights];

 private:
  const char *codes_, *scales_;
};

template <typename X, int kBits>
class FewBitWeights;

template <int kBits>
class FewBitWeights<PairedFloat, kBits> : public BlockWeights<PairedFloat> {
 public:
  static constexpr int64_t kBytes = (kBits == 5 ? 64 : kPackedWeights * 16) + kFewBitScaleBytes;
  using Tile = FewBitTile<kBits>;
  FewBitWeights() = default;
  FewBitWeights(const Tile& tile, int64_t step, int n) {
    const UIntVec codes = tile.codes(step, n);
    const __m512i even = bit_cast<__m512i>(codes), odd = bit_cast<__m512i>(codes >> kBits);
    const FewBitConstants& constants = *from_memory(&kFewBitConstants);
    const float* levels = kBits == 5 ? constants.upper : constants.levels;
    const __m512 values =
        round_to_bfloat16(constants.rounding, tile.values(levels, step, n), tile.rounded[n]);
    if constexpr (kBits == 5) {
      const __m512 lower =
          round_to_bfloat16(constants.rounding, tile.values(constants.lower, step, n), 0xffff);
      parts_[0] = bit_cast<Vec>(_mm512_permutex2var_ps(lower, even, values));
      parts_[1] = bit_cast<Vec>(_mm512_permutex2var_ps(lower, odd, values));
    } else {
      parts_[0] = bit_cast<Vec>(_mm512_permutexvar_ps(even, values));
      parts_[1] = bit_cast<Vec>(_mm512_permutexvar_ps(odd, values));
    }
  }
};

#if defined(__AVX512BF16__)
template <int kBits>
class FewBitWeights<BFloat16, kBits> : public BlockWeights<BFloat16> {
 public:
  static constexpr int64_t kBytes = (kBits == 5 ? 64 : kPackedWeights * 16) + kFewBitScaleBytes;
  using Tile = FewBitTile<kBits>;
  FewBitWeights() = default;
  FewBitWeights(const Tile& tile, int64_t step, int n) {
    const UIntVec even = tile.codes(step, n);
    const FewBitConstants& constants = *from_memory(&kFewBitConstants);
    const __m512i codes =
        _mm512_mask_blend_epi16(0xaaaaaaaa, bit_cast<__m512i>(even), bit_cast<__m512i>(even << (16 - kBits)));
    __m512i values;
    if constexpr (kBits == 5) {
      values = bit_cast<__m512i>(
          _mm512_cvtne2ps_pbh(tile.values(constants.upper, step, n), tile.values(constants.lower, step, n)));
    } else {
      // vpermw reads five bits of each word: twice the same 16 values, so that the fifth does not matter.
      values = _mm512_broadcast_i64x4(
          bit_cast<__m256i>(_mm512_cvtneps_pbh(tile.values(constants.levels, step, n))));
    }
    words_ = _mm512_permutexvar_epi16(codes, values);
  }
};
#endif

// Packs one weight row, row `row` of all; returns whether what is looked up has its bits.
template <int kBits>
bool pack_in_few_bits(const BFloat16* weight, int64_t size, int64_t row, char* packed);
#endif

}  // namespace cerberus::CERBERUS_ISA
