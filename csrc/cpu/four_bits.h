// Weights of bfloat16 in four bits each, where every 32 of a row along k are d (q - 8) + m, rounded, for some
// d and m and q from 0 to 15: those that came out of a 4-bit file.
//
//   packed (tiles): the codes of all steps of 32 k, then d and m (float32) of each step's weight rows, then
//   for each row which of the 16 values are rounded, a bit each, see below
//
// 16 bytes of codes belong to a step of one weight row: byte i is q of element 2 i, above it that of 2 i + 1.
// Four of these lie in one another, a byte in each 32-bit word, since the look-up sees the lowest bits of a
// word alone: whatever stands above them, a load from a byte further on is all that it takes.
//
// What is looked up has the bits of the weights: pack_four_bits compares all of them, so that sums are those
// of rows_times_packed, to the same bits.
#pragma once

#include "cpu/packed.h"

namespace cerberus::CERBERUS_ISA {

// Where the first of the codes of a step's weight row n is, and then every fourth byte.
static inline int64_t four_bit_code_place(int64_t step, int n) {
  const int64_t place = step * kPackedWeights + n;
  return place / 4 * 64 + place % 4;
}

#if defined(__AVX512F__)
// What looking up takes besides; in memory, since the sums of a tile need the registers.
struct FourBitConstants {
  alignas(64) float levels[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  float above = 65537, below = -65536;
};
static constexpr FourBitConstants kFourBitConstants;
static inline const FourBitConstants* four_bit_constants() {
  const FourBitConstants* constants = &kFourBitConstants;
  __asm__("" : "+r"(constants));  // so that the compiler reads them anew each time
  return constants;
}

// To bfloat16, to nearest, ties to even. 65537 x is rounded where bfloat16 is, 16 bits further up; without
// 65536 x, which is exact, x is left, rounded. A zero becomes +0, and what is beyond 2^111 no number: which
// of the values are rounded is said in `which`, and pack_four_bits leaves alone what comes out wrong.
static inline __m512 round_to_bfloat16(const FourBitConstants* constants, __m512 x, __mmask16 which) {
  const __m512 above = _mm512_mul_ps(x, _mm512_set1_ps(constants->above));
  return _mm512_mask_fmadd_ps(x, which, _mm512_set1_ps(constants->below), above);
}
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

// 32 weights as Product<X> takes them: get<part>(); and as they are in memory: words().
template <typename X>
class FourBitWeights;

template <>
class FourBitWeights<PairedFloat> {
 public:
  static constexpr int64_t kBytes = kPackedWeights * 16 + kFourBitScaleBytes;
  using Tile = FourBitTile;
  FourBitWeights() = default;
  FourBitWeights(const Tile& tile, int64_t step, int n) {
    const __m512i codes = tile.codes(step, n);
    const FourBitConstants* constants = four_bit_constants();
    const __m512 values = round_to_bfloat16(constants, tile.values(constants, step, n), tile.rounded[n]);
    parts_[0] = bit_cast<Vec>(_mm512_permutexvar_ps(codes, values));
    parts_[1] = bit_cast<Vec>(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values));
  }
  template <int kPart>
  Vec get() const {
    return parts_[kPart];
  }
  __m512i words() const {
    return bit_cast<__m512i>(bit_cast<UIntVec>(parts_[0]) >> 16 | bit_cast<UIntVec>(parts_[1]));
  }

 private:
  Vec parts_[2];
};

#if defined(__AVX512BF16__)
template <>
class FourBitWeights<BFloat16> {
 public:
  static constexpr int64_t kBytes = kPackedWeights * 16 + kFourBitScaleBytes;
  using Tile = FourBitTile;
  FourBitWeights() = default;
  FourBitWeights(const Tile& tile, int64_t step, int n) {
    const __m512i even = tile.codes(step, n);
    // vpermw reads five bits of each word: twice the same 16 values, so that the fifth does not matter.
    const __m256i values = bit_cast<__m256i>(_mm512_cvtneps_pbh(tile.values(four_bit_constants(), step, n)));
    const __m512i codes = _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(even, 12));
    words_ = _mm512_permutexvar_epi16(codes, _mm512_broadcast_i64x4(values));
  }
  template <int>
  __m512bh get() const {
    return bit_cast<__m512bh>(words_);
  }
  __m512i words() const { return words_; }

 private:
  __m512i words_;
};
#endif

// Rows x, x_stride apart, times weight rows `begin` to `end` of `packed`; begin is where a tile begins.
void rows_times_four_bits(const Row<BFloat16>* x, int64_t x_stride, int64_t rows, const char* packed,
                          int64_t begin, int64_t end, int64_t size, const Output<BFloat16>& output);
#endif

}  // namespace cerberus::CERBERUS_ISA
