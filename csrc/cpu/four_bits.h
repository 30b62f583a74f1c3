// Weights of bfloat16 in four bits each, where every 32 of a row along k are d (q - 8) + m, rounded, for some
// d and m and q from 0 to 15: those that came out of a 4-bit file (Q4_0, Q4_1, Q4_K).
//
//   packed (tiles): the codes of all blocks of 32 k, then d and m (float32) of each step's weight rows, then
//   for each row which of the 16 values are rounded, a bit each, see below
//
// 16 bytes of codes belong to a step of one weight row: byte i is q of element 2 i, above it that of 2 i + 1.
// Four of these lie in one another, a byte in each 32-bit word, since the look-up sees the lowest bits of a
// word alone: whatever stands above them, a load from a byte further on is all that it takes.
//
// What is looked up has the bits of the weights: pack_in_four_bits compares all of them.
#pragma once

#include "cpu/pack_blocks.h"

namespace cerberus::CERBERUS_ISA {

// Bytes of the scales of a step; of a tile's codes, four times 16 at once, of its end, and in all.
constexpr int64_t kFourBitScaleBytes = kPackedWeights * 2 * 4, kFourBitTileEnd = 8;
static inline int64_t four_bit_code_bytes(int64_t size) {
  return (size / kBlock * kPackedWeights + 3) / 4 * 64;
}
static inline int64_t four_bit_tile_bytes(int64_t size) {
  return four_bit_code_bytes(size) + size / kBlock * kFourBitScaleBytes + kFourBitTileEnd;
}

// Where the first of the codes of a step's weight row n is, and then every fourth byte.
static inline int64_t four_bit_code_place(int64_t step, int n) {
  const int64_t place = step * kPackedWeights + n;
  return place / 4 * 64 + place % 4;
}

#if defined(__AVX512F__)
// What looking up takes besides; in memory, since the sums of a tile need the registers.
struct FourBitConstants {
  alignas(64) float levels[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  RoundingConstants rounding;
};
static constexpr FourBitConstants kFourBitConstants;

// A tile, and which values of its rows are rounded: all, or all but the one in the middle, which is a zero of
// either sign then, as in a file that counts q from -8.
struct FourBitTile {
  FourBitTile(const char* tile, int64_t size) : codes_(tile), scales_(tile + four_bit_code_bytes(size)) {
    __builtin_memcpy(rounded, tile + four_bit_tile_bytes(size) - kFourBitTileEnd, sizeof(rounded));
  }
  // In the lowest bits of each lane q of an even element, above it that of the odd one; then of others.
  __m512i codes(int64_t step, int n) const {
    return _mm512_loadu_si512(codes_ + four_bit_code_place(step, n));
  }
  // The 16 values of a step's weight row n, not rounded yet.
  __m512 values(const FourBitConstants* constants, int64_t step, int n) const {
    const float* scale = reinterpret_cast<const float*>(scales_ + step * kFourBitScaleBytes) + 2 * n;
    return _mm512_fmadd_ps(_mm512_set1_ps(scale[0]), _mm512_load_ps(constants->levels),
                           _mm512_set1_ps(scale[1]));
  }
  __mmask16 rounded[kPackedWeights];

 private:
  const char *codes_, *scales_;
};

template <typename X>
class FourBitWeights;

template <>
class FourBitWeights<PairedFloat> : public BlockWeights<PairedFloat> {
 public:
  static constexpr int64_t kBytes = kPackedWeights * 16 + kFourBitScaleBytes;
  using Tile = FourBitTile;
  FourBitWeights() = default;
  FourBitWeights(const Tile& tile, int64_t step, int n) {
    const __m512i codes = tile.codes(step, n);
    const FourBitConstants* constants = from_memory(&kFourBitConstants);
    const __m512 values =
        round_to_bfloat16(constants->rounding, tile.values(constants, step, n), tile.rounded[n]);
    parts_[0] = bit_cast<Vec>(_mm512_permutexvar_ps(codes, values));
    parts_[1] = bit_cast<Vec>(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values));
  }
};

#if defined(__AVX512BF16__)
template <>
class FourBitWeights<BFloat16> : public BlockWeights<BFloat16> {
 public:
  static constexpr int64_t kBytes = kPackedWeights * 16 + kFourBitScaleBytes;
  using Tile = FourBitTile;
  FourBitWeights() = default;
  FourBitWeights(const Tile& tile, int64_t step, int n) {
    const __m512i even = tile.codes(step, n);
    // vpermw reads five bits of each word: twice the same 16 values, so that the fifth does not matter.
    const __m256i values =
        bit_cast<__m256i>(_mm512_cvtneps_pbh(tile.values(from_memory(&kFourBitConstants), step, n)));
    const __m512i codes = _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(even, 12));
    words_ = _mm512_permutexvar_epi16(codes, _mm512_broadcast_i64x4(values));
  }
};
#endif

// Packs one weight row, row `row` of all; returns whether what is looked up has its bits.
bool pack_in_four_bits(const BFloat16* weight, int64_t size, int64_t row, char* packed);
#endif

}  // namespace cerberus::CERBERUS_ISA
