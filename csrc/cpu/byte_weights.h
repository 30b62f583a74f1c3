// Weights of bfloat16 in a byte each, where every 32 of a row along k are d q, rounded, for some d and q from
// -127 to 127: those that came out of an 8-bit file (Q8_0).
//
//   packed (tiles): of every step of 32 k and every weight row its 32 q, then d (float32) of each of them,
//   then zeros to a multiple of kLoad
//
// The q lie in the order in which their products take them: 16 at a time. Behind all tiles the same weights
// follow as pack_weights puts them, for products of more rows: converting takes longer there than reading.
#pragma once

#include "cpu/pack_blocks.h"

namespace cerberus::CERBERUS_ISA {

constexpr int64_t kLoad = 16;  // bytes, so that none crosses a cache line

// Measured on Emerald Rapids with 49152 x 576 weights: 1.3 ms instead of 1.8 of one row, 2.7 instead of 2.3
// of eight.
constexpr int64_t kMostRowsOfBytes = 5;

static inline int64_t byte_code_bytes(int64_t size) { return size * kPackedWeights; }
static inline int64_t byte_tile_bytes(int64_t size) {
  const int64_t bytes = byte_code_bytes(size) + size / kBlock * kPackedWeights * 4;
  return (bytes + kLoad - 1) / kLoad * kLoad;
}

// Of all tiles: where those of pack_weights begin.
static inline int64_t byte_tiles_bytes(int64_t rows, int64_t size) {
  return ((rows + kPackedWeights - 1) / kPackedWeights * byte_tile_bytes(size) + 63) / 64 * 64;
}

#if defined(__AVX512F__)
static constexpr RoundingConstants kByteRounding;

struct ByteTile {
  ByteTile(const char* tile, int64_t size)
      : codes(reinterpret_cast<const int8_t*>(tile)),
        scales(reinterpret_cast<const float*>(tile + byte_code_bytes(size))) {}
  // d q of 16 weights of a step's weight row n, not rounded yet: exact.
  __m512 values(int64_t step, int n, int half) const {
    const int64_t place = step * kPackedWeights + n;
    const void* from = codes + place * kBlock + half * kLoad;
    const __m512i q = _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(scales[place]));
  }
  const int8_t* codes;
  const float* scales;
};

// kInPairs: q of even numbers come first, then those of odd ones.
template <typename X>
class ByteWeights;

template <>
class ByteWeights<PairedFloat> : public BlockWeights<PairedFloat> {
 public:
  static constexpr int64_t kBytes = kPackedWeights * (kBlock + 4);
  static constexpr bool kInPairs = true;
  using Tile = ByteTile;
  ByteWeights() = default;
  ByteWeights(const Tile& tile, int64_t step, int n) {
    const RoundingConstants& constants = *from_memory(&kByteRounding);
    for (int half = 0; half < 2; ++half)
      parts_[half] = bit_cast<Vec>(round_to_bfloat16(constants, tile.values(step, n, half), 0xffff));
  }
};

#if defined(__AVX512BF16__)
template <>
class ByteWeights<BFloat16> : public BlockWeights<BFloat16> {
 public:
  static constexpr int64_t kBytes = kPackedWeights * (kBlock + 4);
  static constexpr bool kInPairs = false;
  using Tile = ByteTile;
  ByteWeights() = default;
  ByteWeights(const Tile& tile, int64_t step, int n) {
    words_ = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(tile.values(step, n, 1), tile.values(step, n, 0)));
  }
};
#endif

// Packs one weight row, row `row` of all; returns whether what the kernels make of it has its bits.
bool pack_in_bytes(const BFloat16* weight, int64_t size, int64_t row, char* packed);
#endif

}  // namespace cerberus::CERBERUS_ISA
