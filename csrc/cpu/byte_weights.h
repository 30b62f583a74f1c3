// Weights of bfloat16 in a byte each, where every 32 of a row along k (Packing::kBytes) or every 16
// (kBytesOf16) are d q, rounded, for some d and q from -127 to 127: those that came out of a file in 8 bits
// (Q8_0) or 6 (Q6_K).
//
//   packed (tiles): of every step of 32 k and every weight row its 32 q, then d (float32) of each of them, or
//   the two, then zeros to a multiple of kLoad
//
// The q lie in the order in which their products take them: 16 at a time. Behind all tiles the same weights
// follow as pack_weights puts them, for products of more rows: converting takes longer there than reading.
#pragma once

#include "cpu/pack_blocks.h"

namespace cerberus::CERBERUS_ISA {

constexpr int64_t kLoad = 16;  // bytes, so that none crosses a cache line

// Measured on Emerald Rapids with 49152 x 576 weights: 1.3 ms instead of 1.8 of one row, 2.7 instead of 2.3
// of eight. With two d 0.88 of what bfloat16 takes of one row, 0.96 of four, more of five.
constexpr int64_t kMostRowsOfBytes = 5;
constexpr int64_t most_rows_of_bytes(Packing packing) {
  return packing == Packing::kBytesOf16 ? 4 : kMostRowsOfBytes;
}

constexpr bool is_bytes(Packing packing) {
  return packing == Packing::kBytes || packing == Packing::kBytesOf16;
}

// Of a step of one weight row: how many d.
constexpr int byte_scales(Packing packing) { return packing == Packing::kBytesOf16 ? 2 : 1; }

static inline int64_t byte_code_bytes(int64_t size) { return size * kPackedWeights; }
static inline int64_t byte_tile_bytes(Packing packing, int64_t size) {
  const int64_t bytes = byte_code_bytes(size) + size / kBlock * kPackedWeights * 4 * byte_scales(packing);
  return (bytes + kLoad - 1) / kLoad * kLoad;
}

// Of all tiles: where those of pack_weights begin.
static inline int64_t byte_tiles_bytes(Packing packing, int64_t rows, int64_t size) {
  return ((rows + kPackedWeights - 1) / kPackedWeights * byte_tile_bytes(packing, size) + 63) / 64 * 64;
}

#if defined(__AVX512F__)
struct ByteConstants {
  RoundingConstants rounding;
  int sign = INT32_MIN;
};
static constexpr ByteConstants kByteConstants;

// d of a step's even weights, which are those of its odd ones: lanes 0 to 7 are of the first 16.
template <int kScales>
static inline __m512 scales_of_pairs(const float* d) {
  const __m512 first = _mm512_set1_ps(d[0]);
  return kScales == 1 ? first : _mm512_mask_blend_ps(0xff00, first, _mm512_set1_ps(d[kScales - 1]));
}

template <int kScales>
struct ByteTile {
  ByteTile(const char* tile, int64_t size)
      : codes(reinterpret_cast<const int8_t*>(tile)),
        scales(reinterpret_cast<const float*>(tile + byte_code_bytes(size))) {}
  // q of 16 weights of a step's weight row n: half a step's, in the order of the products.
  __m512 q(int64_t step, int n, int half) const {
    const void* from = codes + (step * kPackedWeights + n) * kBlock + half * kLoad;
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
  }
  const float* d(int64_t step, int n) const { return scales + (step * kPackedWeights + n) * kScales; }
  const int8_t* codes;
  const float* scales;
};

// d q: exact, but for some of Q6_K. kInPairs: q of even numbers come first, then those of odd ones.
template <typename X, Packing kPacking>
class ByteWeights;

template <Packing kPacking>
class ByteWeights<PairedFloat, kPacking> : public BlockWeights<PairedFloat> {
  static constexpr int kScales = byte_scales(kPacking);

 public:
  static constexpr int64_t kBytes = kPackedWeights * (kBlock + 4 * kScales);
  static constexpr bool kInPairs = true;
  using Tile = ByteTile<kScales>;
  ByteWeights() = default;
  ByteWeights(const Tile& tile, int64_t step, int n) {
    const ByteConstants& constants = *from_memory(&kByteConstants);
    const __m512 d = scales_of_pairs<kScales>(tile.d(step, n));
    for (int half = 0; half < 2; ++half) {
      const __m512 x = _mm512_mul_ps(tile.q(step, n, half), d);
      __m512i rounded = bit_cast<__m512i>(round_to_bfloat16(constants.rounding, x, 0xffff));
      if (kPacking == Packing::kBytesOf16)  // a zero keeps its sign: rounded | x & sign
        rounded =
            _mm512_ternarylogic_epi32(rounded, bit_cast<__m512i>(x), _mm512_set1_epi32(constants.sign), 0xf8);
      parts_[half] = bit_cast<Vec>(rounded);
    }
  }
};

#if defined(__AVX512BF16__)
template <Packing kPacking>
class ByteWeights<BFloat16, kPacking> : public BlockWeights<BFloat16> {
  static constexpr int kScales = byte_scales(kPacking);

 public:
  static constexpr int64_t kBytes = kPackedWeights * (kBlock + 4 * kScales);
  static constexpr bool kInPairs = false;
  using Tile = ByteTile<kScales>;
  ByteWeights() = default;
  ByteWeights(const Tile& tile, int64_t step, int n) {
    const float* d = tile.d(step, n);
    const __m512 first = _mm512_mul_ps(tile.q(step, n, 0), _mm512_set1_ps(d[0]));
    const __m512 second = _mm512_mul_ps(tile.q(step, n, 1), _mm512_set1_ps(d[kScales - 1]));
    words_ = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  }
};
#endif

// Packs one weight row, row `row` of all; returns whether what the kernels make of it has its bits.
template <Packing kPacking>
bool pack_in_bytes(const BFloat16* weight, int64_t size, int64_t row, char* packed);
#endif

}  // namespace cerberus::CERBERUS_ISA
