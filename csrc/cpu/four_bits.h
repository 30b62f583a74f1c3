// Weights of bfloat16 in four bits each, where every 32 of a row along k are d (q - 8) + m, rounded, for some
// d and m and q from 0 to 15: those that came out of a 4-bit file.
//
//   packed (tiles, steps of 32 k), 72 bytes each: 16 bytes of codes of each of kPackedWeights weight rows
//   (byte i: q of element 2 i, above it that of 2 i + 1), then d and m of each, float32;
//   behind the steps of a tile for each row which of the 16 values are rounded, a bit each, see below
//
// What is looked up has the bits of the weights: pack_four_bits compares all of them, so that sums are those
// of rows_times_packed, to the same bits.
#pragma once

#include "cpu/packed.h"

namespace cerberus::CERBERUS_ISA {

static inline int64_t four_bit_tile_bytes(int64_t size) {
  return size / kFourBitStep * kFourBitStepBytes + kFourBitTileEnd;
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

// The 16 values of a step's weight row n, not rounded yet.
static inline __m512 four_bit_values(const FourBitConstants* constants, const char* step, int n) {
  const float* scale = reinterpret_cast<const float*>(step + kPackedWeights * 16) + 2 * n;
  return _mm512_fmadd_ps(_mm512_set1_ps(scale[0]), _mm512_load_ps(constants->levels),
                         _mm512_set1_ps(scale[1]));
}
// To bfloat16, to nearest, ties to even. 65537 x is rounded where bfloat16 is, 16 bits further up; without
// 65536 x, which is exact, x is left, rounded. A zero becomes +0, and what is beyond 2^111 no number: which
// of the values are rounded is said in `which`, and pack_four_bits leaves alone what comes out wrong.
static inline __m512 round_to_bfloat16(const FourBitConstants* constants, __m512 x, __mmask16 which) {
  const __m512 above = _mm512_mul_ps(x, _mm512_set1_ps(constants->above));
  return _mm512_mask_fmadd_ps(x, which, _mm512_set1_ps(constants->below), above);
}
// The codes of a step's weight row n, a byte in each lane.
static inline __m512i four_bit_codes(const char* step, int n) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(step) + n));
}
// Which values of the rows of a tile are rounded: all, or all but the one in the middle, which is a zero of
// either sign then, as in a file that counts q from -8.
struct FourBitTile {
  FourBitTile(const char* tile, int64_t size) {
    __builtin_memcpy(rounded, tile + four_bit_tile_bytes(size) - kFourBitTileEnd, sizeof(rounded));
  }
  __mmask16 rounded[kPackedWeights];
};

// 32 weights as Product<X> takes them: get<part>(); and as they are in memory: words().
template <typename X>
class FourBitWeights;

template <>
class FourBitWeights<PairedFloat> {
 public:
  static constexpr int64_t kBytes = kFourBitStepBytes;
  using Tile = FourBitTile;
  FourBitWeights() = default;
  FourBitWeights(const char* step, int n, const Tile& tile) {
    const __m512i codes = four_bit_codes(step, n);
    const FourBitConstants* constants = four_bit_constants();
    const __m512 values = round_to_bfloat16(constants, four_bit_values(constants, step, n), tile.rounded[n]);
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
  static constexpr int64_t kBytes = kFourBitStepBytes;
  using Tile = FourBitTile;
  FourBitWeights() = default;
  FourBitWeights(const char* step, int n, const Tile&) {
    const __m512i bytes = four_bit_codes(step, n);
    // vpermw reads five bits of each word: twice the same 16 values, so that the fifth does not matter.
    const __m256i values =
        bit_cast<__m256i>(_mm512_cvtneps_pbh(four_bit_values(four_bit_constants(), step, n)));
    const __m512i codes = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
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
