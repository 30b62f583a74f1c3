// csrc/cpu/amx_tiles.h in plain C++, found before it: what the instructions are documented to do.
//
// TDPBF16PS keeps the products of even and of odd k of a tile in two sums of float32, adds these, and adds
// that to the tile of sums. Denormal inputs and results are zeros.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace cerberus::CERBERUS_ISA::tiles {

struct Tiles {
  bool configured;
  float sums[2][2][16][16];     // weights, rows; row of the tile, column
  uint16_t weights[2][16][32];  // output, k
  uint16_t rows[2][16][32];     // pair of k, row and which of the pair
};
inline thread_local Tiles here;

inline void must(bool correct, const char* what) {
  if (correct) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

inline void begin() {
  must(!here.configured, "tiles are configured twice");
  std::memset(&here, 0x7f, sizeof(here));  // what was in a tile before must not matter: large numbers
  here.configured = true;
}
inline void end() {
  must(here.configured, "tiles are released twice");
  here.configured = false;
}

inline void clear_sums() {
  must(here.configured, "tiles are not configured");
  std::memset(here.sums, 0, sizeof(here.sums));
}

inline float number(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof(out));
  return std::fpclassify(out) == FP_SUBNORMAL ? std::copysign(0.0f, out) : out;
}
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

template <int kIndex>
void load_weights(const void* p, int64_t row_bytes) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(here.weights[kIndex][row], static_cast<const char*>(p) + row * row_bytes, 64);
}
template <int kIndex>
void load_rows(const void* p) {
  std::memcpy(here.rows[kIndex], p, sizeof(here.rows[kIndex]));
}
template <int kWeights, int kRows>
void multiply_add() {
  must(here.configured, "tiles are not configured");
  for (int output = 0; output < 16; ++output)
    for (int row = 0; row < 16; ++row) {
      float parts[2] = {0, 0};
      for (int pair = 0; pair < 16; ++pair)
        for (int odd = 0; odd < 2; ++odd)
          parts[odd] = flushed(std::fma(number(here.weights[kWeights][output][2 * pair + odd]),
                                        number(here.rows[kRows][pair][2 * row + odd]), parts[odd]));
      float& sum = here.sums[kWeights][kRows][output][row];
      sum = flushed(sum + flushed(parts[0] + parts[1]));
    }
}
template <int kWeights, int kRows>
void store_sums(float (*out)[16]) {
  std::memcpy(out, here.sums[kWeights][kRows], sizeof(here.sums[kWeights][kRows]));
}

}  // namespace cerberus::CERBERUS_ISA::tiles
