// Finds d and m of weights that came out of a 4-bit file, and packs them, see four_bits.h.
//
// Such a file has d and m of 32 weights as float16: m itself where q counts from 0 (Q4_1: the least weight
// has q = 0, the largest 15), or d alone where it counts from -8 (Q4_0: the weight of the largest magnitude
// has -8). What rounding to bfloat16 took away is a few bits, so that a few tens of pairs are to be tried.
#include "cpu/four_bits.h"

#include "cpu/kernels.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int kNear = 10;  // float16 numbers on either side that may round to one bfloat16

float to_bfloat16(float x) {
  BFloat16 rounded;
  from_float(x, rounded);
  return to_float(rounded);
}

// The 32 weights, even and odd ones.
struct Weights {
  __m512 even, odd;
  float least, largest;

  explicit Weights(const BFloat16* p) {
    const Pairs pairs = load_pairs(p);
    even = bit_cast<__m512>(pairs.even());
    odd = bit_cast<__m512>(pairs.odd());
    least = _mm512_reduce_min_ps(_mm512_min_ps(even, odd));
    largest = _mm512_reduce_max_ps(_mm512_max_ps(even, odd));
  }
};

struct Scale {
  float d, m;
};

// q of each weight. Returns whether all of them are d q + m.
bool codes_of(const Weights& w, Scale scale, __m512i& even, __m512i& odd) {
  const __m512 d = _mm512_set1_ps(scale.d), m = _mm512_set1_ps(scale.m);
  const __m512 share = _mm512_set1_ps(scale.d == 0 ? 0.0f : 1 / scale.d);
  const auto code = [&](__m512 x, __m512i& q) {
    const __m512i nearest = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(x, m), share));
    q = _mm512_max_epi32(_mm512_min_epi32(nearest, _mm512_set1_epi32(15)), _mm512_setzero_si512());
    const __m512 value =
        round_to_bfloat16(four_bit_constants(), _mm512_fmadd_ps(_mm512_cvtepi32_ps(q), d, m));
    return _mm512_cmp_ps_mask(value, x, _CMP_NEQ_UQ) == 0;
  };
  return code(w.even, even) && code(w.odd, odd);
}

// Calls body(x) for float16 numbers around x, nearest first, until it returns true; returns whether it did.
template <typename Body>
bool any_near(float x, const Body& body) {
  Float16 nearest;
  from_float(x, nearest);
  for (int i = 0; i <= 2 * kNear; ++i) {
    const int bits = nearest.bits + (i % 2 ? (i + 1) / 2 : -i / 2);
    if (((bits ^ nearest.bits) & 0x8000) || (bits & 0x7c00) == 0x7c00) continue;  // another sign, not finite
    if (body(to_float(Float16{static_cast<uint16_t>(bits)}))) return true;
  }
  return false;
}

bool find(const Weights& w, Scale& scale, __m512i& even, __m512i& odd) {
  const auto fits = [&](float d, float m) {
    scale = {d, m};
    return codes_of(w, scale, even, odd);
  };
  if (w.least == w.largest) return fits(0, w.least);
  const bool found = any_near(w.least, [&](float m) {
    if (to_bfloat16(m) != w.least) return false;
    return any_near((w.largest - m) / 15,
                    [&](float d) { return to_bfloat16(15 * d + m) == w.largest && fits(d, m); });
  });
  if (found) return true;
  const float furthest = -w.least > w.largest ? w.least : w.largest;
  return any_near(furthest / -8, [&](float d) { return to_bfloat16(-8 * d) == furthest && fits(d, -8 * d); });
}

// As products see them: a zero adds the same to a sum whatever its sign, but to one that has underflowed to
// -0.
bool are_same(__m512i words, __m512i weights) {
  const __m512i magnitudes = _mm512_and_si512(_mm512_or_si512(words, weights), _mm512_set1_epi16(0x7fff));
  const __mmask32 apart = _mm512_cmpneq_epi16_mask(words, weights);
  return (apart & _mm512_test_epi16_mask(magnitudes, magnitudes)) == 0;
}

// One weight row of `size`; returns whether all of it could be packed.
bool pack_row(const BFloat16* weight, int64_t size, int64_t row, char* packed) {
  const int n = static_cast<int>(row % kPackedWeights);
  char* step = packed + row / kPackedWeights * four_bit_tile_bytes(size);
  for (int64_t k = 0; k < size; k += kFourBitStep, step += kFourBitStepBytes) {
    Scale scale{};
    __m512i even, odd;
    if (!find(Weights(weight + k), scale, even, odd)) return false;
    const __m512i both = _mm512_or_si512(even, _mm512_slli_epi32(odd, 4));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(step) + n, _mm512_cvtepi32_epi8(both));
    __builtin_memcpy(step + kPackedWeights * 16 + n * sizeof(scale), &scale, sizeof(scale));
    if (!are_same(FourBitWeights<Row<BFloat16>>(step, n).words(), _mm512_loadu_si512(weight + k)))
      return false;
  }
  return true;
}

}  // namespace

void pack_four_bits(const PackFourBitsArgs& a, const Parallel& parallel) {
  const BFloat16* weight = static_cast<const BFloat16*>(a.weight);
  char* packed = static_cast<char*>(a.packed);
  const int64_t tile = four_bit_tile_bytes(a.size);
  if (a.first == 0)  // the last tile may have rows that nothing is copied to
    __builtin_memset(packed + (a.all - 1) / kPackedWeights * tile, 0, static_cast<size_t>(tile));
  parallel_tasks(parallel, a.rows, [&](int64_t row) {
    if (__atomic_load_n(a.fits, __ATOMIC_RELAXED) == 0) return;
    if (!pack_row(weight + row * a.size, a.size, a.first + row, packed))
      __atomic_store_n(a.fits, 0, __ATOMIC_RELAXED);
  });
}

}  // namespace cerberus::CERBERUS_ISA
