// Finds d and m of weights that came out of a 4-bit file, and packs them, see four_bits.h.
//
// Such a file has d and m of 32 weights as float16: m itself where q counts from 0 (Q4_1: the least weight
// has q = 0, the largest 15), or d alone where it counts from -8 (Q4_0: the weight of the largest magnitude
// has -8). What rounding to bfloat16 took away is a few bits, so that a few tens of pairs are to be tried.
//
// Where d and m are such numbers times small integers (Q4_K), or not all of 0 to 15 are there, it is asked
// which d and m would do: a weight says between which numbers d q + m lies.
#include "cpu/four_bits.h"

namespace cerberus::CERBERUS_ISA {
namespace {

// The least and the largest of 32 weights, and whether one is a zero with a sign, which no rounded value is.
struct Weights {
  float least, largest;
  bool has_minus_zero;

  explicit Weights(const BFloat16* p) {
    const Pairs pairs = load_pairs(p);
    const __m512 even = bit_cast<__m512>(pairs.even()), odd = bit_cast<__m512>(pairs.odd());
    least = _mm512_reduce_min_ps(_mm512_min_ps(even, odd));
    largest = _mm512_reduce_max_ps(_mm512_max_ps(even, odd));
    has_minus_zero = _mm512_cmpeq_epi16_mask(_mm512_loadu_si512(p), _mm512_set1_epi16(-0x8000)) != 0;
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

// Which d and m make the weights of each q what they are.
class Levels {
 public:
  // Every weight has the multiple of `step` above `least` that is nearest. False: two of one are not the
  // same.
  bool take(const BFloat16* weight, float least, float step) {
    const float share = 1 / step;
    bool is_there[16] = {};
    float values[16];
    for (int i = 0; i < kBlock; ++i) {
      const float x = to_float(weight[i]), place = (x - least) * share + 0.5f;
      if (!(place >= 0 && place < 16)) return false;
      const int q = static_cast<int>(place);
      if (is_there[q] && x != values[q]) return false;
      is_there[q] = true;
      values[q] = x;
    }
    for (int q = 0; q < 16; ++q) {
      if (!is_there[q]) continue;
      const float x = values[q];
      if (count_ == 0 || magnitude(x) < magnitude(pivot_)) {
        pivot_ = x;
        pivot_q_ = q;
      }
      q_[count_] = q;
      around_[count_++] = around(x);
    }
    return true;
  }

  // Of the numbers d, few of whose bits are not 0, the one at `share`, for which the weight of the least
  // magnitude is d q + m exactly: where that is nearly nothing, float32 has no other m. 0: there are none.
  float with_pivot(double share) const {
    Between d;
    for (int i = 0; i < count_; ++i) {
      const double low = around_[i].least - pivot_, high = around_[i].largest - pivot_;
      const int steps = q_[i] - pivot_q_;
      if (steps > 0) d.narrow(low * kInverse[steps], high * kInverse[steps]);
      if (steps < 0) d.narrow(-high * kInverse[-steps], -low * kInverse[-steps]);
    }
    return bit_cast<float>(bit_cast<uint32_t>(d.at(share)) & ~0xffu);
  }
  // 8 d + m, rounded once.
  float middle_with_pivot(float d) const {
    return static_cast<float>(pivot_ - static_cast<double>(d) * (pivot_q_ - 8));
  }

  // The same where no weight has a place of its own.
  float without_pivot(double share) const {
    Between d;
    for (int i = 1; i < count_; ++i)
      for (int j = 0; j < i; ++j) {
        const double inverse = kInverse[q_[i] - q_[j]];
        d.narrow((around_[i].least - around_[j].largest) * inverse,
                 (around_[i].largest - around_[j].least) * inverse);
      }
    return d.at(share);
  }
  float middle_without_pivot(float d, double share) const {
    Between middle;
    for (int i = 0; i < count_; ++i) {
      const double distance = static_cast<double>(d) * (q_[i] - 8);
      middle.narrow(around_[i].least - distance, around_[i].largest - distance);
    }
    return middle.at(share);
  }

 private:
  static constexpr double kInverse[16] = {0,        1.0,      1.0 / 2,  1.0 / 3, 1.0 / 4,  1.0 / 5,
                                          1.0 / 6,  1.0 / 7,  1.0 / 8,  1.0 / 9, 1.0 / 10, 1.0 / 11,
                                          1.0 / 12, 1.0 / 13, 1.0 / 14, 1.0 / 15};
  struct Between {
    double least = -3e38, largest = 3e38;

    void narrow(double low, double high) {
      if (low > least) least = low;
      if (high < largest) largest = high;
    }
    float at(double share) const {
      return least > largest ? 0 : static_cast<float>(least + share * (largest - least));
    }
  };
  // What rounds to a bfloat16 number other than 0 lies there; 0 is that alone.
  static Between around(float x) {
    Between at;
    if (x == 0) {
      at.least = at.largest = 0;
      return at;
    }
    const uint32_t bits = bit_cast<uint32_t>(x);
    const double inner = 0.5 * (x + static_cast<double>(bit_cast<float>(bits - 0x10000)));
    const double outer = 0.5 * (x + static_cast<double>(bit_cast<float>(bits + 0x10000)));
    at.narrow(x > 0 ? inner : outer, x > 0 ? outer : inner);
    return at;
  }
  static float magnitude(float x) { return x < 0 ? -x : x; }

  int count_ = 0, q_[16];  // those that are there, ascending
  Between around_[16];
  float pivot_ = 0;  // the weight of the least magnitude
  int pivot_q_ = 0;
};

constexpr double kShares[3] = {0.5, 0.3, 0.7};  // rounding may take a number to a wrong place, but not all

// With so many of the shares.
bool fits_levels(const Levels& levels, const Block& block, int tries) {
  for (int i = 0; i < tries; ++i) {
    const float d = levels.with_pivot(kShares[i]);
    if (d > 0 && block.fits(d, levels.middle_with_pivot(d))) return true;
  }
  for (int i = 0; i < tries * tries; ++i) {
    const float d = levels.without_pivot(kShares[i / tries]);
    if (!(d > 0)) return false;
    if (block.fits(d, levels.middle_without_pivot(d, kShares[i % tries]))) return true;
  }
  return false;
}

float nearest_float16(float x) {
  Float16 nearest;
  from_float(x, nearest);
  return to_float(nearest);
}

// The quickest way first. Where the least and the largest weight lie is known but for what rounding took,
// which may be a whole step.
bool fits_somehow(const Weights& w, const Block& block) {
  if (w.has_minus_zero || !(w.largest - w.least <= 3e38f)) return false;  // what is not finite is left
  const float furthest = -w.least > w.largest ? -w.least : w.largest, least = nearest_float16(w.least);
  const float d = nearest_float16((w.largest - least) / 15);
  if (block.fits(d, 8 * d + least)) return true;
  if (block.fits(nearest_float16((w.least < -w.largest ? w.least : w.largest) / -8), -0.0f)) return true;
  Levels all;
  if (all.take(block.weight, w.least, (w.largest - w.least) / 15) && fits_levels(all, block, 1)) return true;
  if (fits_with_least(w, block) || fits_without_least(w, block)) return true;
  for (int steps = 15; steps > 0; --steps)
    for (int shift = 0; shift < 9; ++shift) {
      constexpr float kShifts[3] = {0, 0x1p-10f, -0x1p-10f};
      const float first = w.least + kShifts[shift % 3] * furthest;
      const float last = w.largest + kShifts[shift / 3] * furthest;
      Levels levels;
      if (levels.take(block.weight, first, (last - first) / static_cast<float>(steps)) &&
          fits_levels(levels, block, 3))
        return true;
    }
  return false;
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
    const bool fits = rounded == kAll ? fits_somehow(w, block) : fits_without_least(w, block);
    if (!fits) return false;
  }
  return true;
}

}  // namespace

bool pack_in_four_bits(const BFloat16* weight, int64_t size, int64_t row, char* packed) {
  return pack_row(weight, size, row, packed, kAll) || pack_row(weight, size, row, packed, kButTheMiddle);
}

}  // namespace cerberus::CERBERUS_ISA
