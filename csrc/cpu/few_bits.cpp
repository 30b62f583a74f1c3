// Finds d and m of weights that came out of a file in 4 or 5 bits, and packs them, see few_bits.h.
//
// Such a file has d and m of 32 weights as float16: m itself where q counts from 0 (Q4_1, Q5_1: the least
// weight has q = 0, the largest 15 or 31), or d alone where it counts from -8 or -16 (Q4_0, Q5_0: the weight
// of the largest magnitude has that). What rounding to bfloat16 took away is a few bits, so that a few tens
// of pairs are to be tried.
//
// Where d and m are such numbers times small integers (Q4_K, Q5_K), or not all q are there, it is asked which
// d and m would do: a weight says between which numbers d q + m lies.
#include "cpu/few_bits.h"

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

// The largest q, and the one in the middle.
template <int kBits>
constexpr int kTop = (1 << kBits) - 1;
template <int kBits>
constexpr int kMiddle = 1 << (kBits - 1);

// All values rounded, or all but the one in the middle.
constexpr __mmask16 kAll = 0xffff;
template <int kBits>
constexpr __mmask16 kButTheMiddle = kBits == 5 ? 0xfffe : 0xfeff;

// A step of one weight row: its place in a tile that it is packed into, and the weights.
template <int kBits>
struct Block {
  char* tile;
  int64_t size, step;
  int n;
  const BFloat16* weight;

  // Packs it with d and m. Returns whether what is looked up then has the bits of the weights.
  bool fits(float d, float m) const {
    const float scale[2] = {d, m};
    char* scales = tile + few_bit_code_bytes(kBits, size) + step * kFewBitScaleBytes;
    __builtin_memcpy(scales + n * sizeof(scale), scale, sizeof(scale));
    const Pairs pairs = load_pairs(weight);
    const UIntVec both =
        codes(bit_cast<__m512>(pairs.even()), d, m) | codes(bit_cast<__m512>(pairs.odd()), d, m) << kBits;
    if constexpr (kBits == 5) {
      UIntVec all;
      __builtin_memcpy(&all, tile + step * 64, sizeof(all));
      all = (all & ~(0x3ffu << 10 * n)) | both << 10 * n;
      __builtin_memcpy(tile + step * 64, &all, sizeof(all));
    } else {
      char bytes[16], *to = tile + four_bit_code_place(step, n);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8(bit_cast<__m512i>(both)));
      for (int i = 0; i < 16; ++i) to[4 * i] = bytes[i];
    }
    const Made made(typename Made::Tile(tile, size), step, n);
    return made.are_bfloat16() == 0xffff &&
           _mm512_cmpneq_epi16_mask(made.words(), _mm512_loadu_si512(weight)) == 0;
  }

  using Made = FewBitWeights<Row<BFloat16>, kBits>;

  // q of each of 16 weights: the nearest.
  static UIntVec codes(__m512 x, float d, float m) {
    const __m512 share = _mm512_set1_ps(d == 0 ? 0.0f : 1 / d);
    const __m512i from_middle = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(x, _mm512_set1_ps(m)), share));
    const __m512i q = _mm512_add_epi32(from_middle, _mm512_set1_epi32(kMiddle<kBits>));
    return bit_cast<UIntVec>(
        _mm512_max_epi32(_mm512_min_epi32(q, _mm512_set1_epi32(kTop<kBits>)), _mm512_setzero_si512()));
  }
};

// As a file has them where q counts from -8 or -16; m is a zero that keeps the sign of the middle.
template <int kBits>
bool fits_without_least(const Weights& w, const Block<kBits>& block) {
  const float furthest = -w.least > w.largest ? w.least : w.largest;
  if (furthest == 0) return block.fits(-0.0f, -0.0f);
  return any_divisor(load_pairs(block.weight), 0xffff, kMiddle<kBits>, [&](float d) {
    const float other = furthest < 0 ? -d : d;  // the second one to be tried, where q may be on either side
    return block.fits(-other, -0.0f) || block.fits(other, -0.0f);
  });
}

// As a file has them where the least weight is one of its numbers.
template <int kBits>
bool fits_with_least(const Weights& w, const Block<kBits>& block) {
  if (w.least == w.largest) return block.fits(0, w.least);
  return any_near(w.least, [&](float least) {
    if (rounded_to_bfloat16(least) != w.least) return false;
    return any_near((w.largest - least) / kTop<kBits>, [&](float d) {
      return rounded_to_bfloat16(kTop<kBits> * d + least) == w.largest &&
             block.fits(d, kMiddle<kBits> * d + least);
    });
  });
}

struct Inverses {
  constexpr Inverses() {
    for (int i = 1; i < 32; ++i) of[i] = 1.0 / i;
  }
  double of[32] = {};
};
constexpr Inverses kInverse;

// Which d and m make the weights of each q what they are.
template <int kBits>
class Levels {
  static constexpr int kLevels = 1 << kBits;

 public:
  // Every weight has the multiple of `step` above `least` that is nearest. False: two of one are not the
  // same.
  bool take(const BFloat16* weight, float least, float step) {
    const float share = 1 / step;
    bool is_there[kLevels] = {};
    float values[kLevels];
    for (int i = 0; i < kBlock; ++i) {
      const float x = to_float(weight[i]), place = (x - least) * share + 0.5f;
      if (!(place >= 0 && place < kLevels)) return false;
      const int q = static_cast<int>(place);
      if (is_there[q] && x != values[q]) return false;
      is_there[q] = true;
      values[q] = x;
    }
    for (int q = 0; q < kLevels; ++q) {
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
      if (steps > 0) d.narrow(low * kInverse.of[steps], high * kInverse.of[steps]);
      if (steps < 0) d.narrow(-high * kInverse.of[-steps], -low * kInverse.of[-steps]);
    }
    return bit_cast<float>(bit_cast<uint32_t>(d.at(share)) & ~0xffu);
  }
  // What the middle has, rounded once.
  float middle_with_pivot(float d) const {
    return static_cast<float>(pivot_ - static_cast<double>(d) * (pivot_q_ - kMiddle<kBits>));
  }

  // The same where no weight has a place of its own.
  float without_pivot(double share) const {
    Between d;
    for (int i = 1; i < count_; ++i)
      for (int j = 0; j < i; ++j) {
        const double inverse = kInverse.of[q_[i] - q_[j]];
        d.narrow((around_[i].least - around_[j].largest) * inverse,
                 (around_[i].largest - around_[j].least) * inverse);
      }
    return d.at(share);
  }
  float middle_without_pivot(float d, double share) const {
    Between middle;
    for (int i = 0; i < count_; ++i) {
      const double distance = static_cast<double>(d) * (q_[i] - kMiddle<kBits>);
      middle.narrow(around_[i].least - distance, around_[i].largest - distance);
    }
    return middle.at(share);
  }

 private:
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

  int count_ = 0, q_[kLevels];  // those that are there, ascending
  Between around_[kLevels];
  float pivot_ = 0;  // the weight of the least magnitude
  int pivot_q_ = 0;
};

constexpr double kShares[3] = {0.5, 0.3, 0.7};  // rounding may take a number to a wrong place, but not all

// With so many of the shares.
template <int kBits>
bool fits_levels(const Levels<kBits>& levels, const Block<kBits>& block, int tries) {
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
template <int kBits>
bool fits_somehow(const Weights& w, const Block<kBits>& block) {
  if (w.has_minus_zero || !(w.largest - w.least <= 3e38f)) return false;  // what is not finite is left
  const float furthest = -w.least > w.largest ? -w.least : w.largest, least = nearest_float16(w.least);
  const float d = nearest_float16((w.largest - least) / kTop<kBits>);
  if (block.fits(d, kMiddle<kBits> * d + least)) return true;
  const float from_middle = (w.least < -w.largest ? w.least : w.largest) / -kMiddle<kBits>;
  if (block.fits(nearest_float16(from_middle), -0.0f)) return true;
  Levels<kBits> all;
  if (all.take(block.weight, w.least, (w.largest - w.least) / kTop<kBits>) && fits_levels(all, block, 1))
    return true;
  if (fits_with_least(w, block) || fits_without_least(w, block)) return true;
  for (int steps = kTop<kBits>; steps > 0; --steps)
    for (int shift = 0; shift < 9; ++shift) {
      constexpr float kShifts[3] = {0, 0x1p-10f, -0x1p-10f};
      const float first = w.least + kShifts[shift % 3] * furthest;
      const float last = w.largest + kShifts[shift / 3] * furthest;
      Levels<kBits> levels;
      if (levels.take(block.weight, first, (last - first) / static_cast<float>(steps)) &&
          fits_levels(levels, block, 3))
        return true;
    }
  return false;
}

// One weight row, with these values rounded; returns whether all of it has its bits then.
template <int kBits>
bool pack_row(const BFloat16* weight, int64_t size, int64_t row, char* packed, __mmask16 rounded) {
  const int n = static_cast<int>(row % kPackedWeights);
  const int64_t tile_bytes = few_bit_tile_bytes(kBits, size);
  char* tile = packed + row / kPackedWeights * tile_bytes;
  __builtin_memcpy(tile + tile_bytes - kFewBitTileEnd + n * sizeof(rounded), &rounded, sizeof(rounded));
  for (int64_t k = 0; k < size; k += kBlock) {
    const Weights w(weight + k);
    const Block<kBits> block{tile, size, k / kBlock, n, weight + k};
    const bool fits = rounded == kAll ? fits_somehow(w, block) : fits_without_least(w, block);
    if (!fits) return false;
  }
  return true;
}

}  // namespace

template <int kBits>
bool pack_in_few_bits(const BFloat16* weight, int64_t size, int64_t row, char* packed) {
  return pack_row<kBits>(weight, size, row, packed, kAll) ||
         pack_row<kBits>(weight, size, row, packed, kButTheMiddle<kBits>);
}

template bool pack_in_few_bits<4>(const BFloat16*, int64_t, int64_t, char*);
template bool pack_in_few_bits<5>(const BFloat16*, int64_t, int64_t, char*);

}  // namespace cerberus::CERBERUS_ISA
