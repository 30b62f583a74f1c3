// The processor's tiles: 0 to 3 hold sums, 4 and 5 weights, 6 and 7 rows. All are 16 rows of 64 bytes.
//
// The only code that has an instruction for them in it: the tests put a header of the same name before this
// one, which does the same in plain C++.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace cerberus::CERBERUS_ISA::tiles {

// What the instruction reads: palette 1, and the bytes a row and the rows of every tile.
struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Before and after a thread's work with tiles: other libraries have their own idea of them.
static inline void begin() {
  const Configuration whole;
  _tile_loadconfig(&whole);
}
static inline void end() { _tile_release(); }

static inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// The instructions take the number of a tile as a literal.
template <int kIndex>
static inline void load_weights(const void* p, int64_t row_bytes) {
  if constexpr (kIndex == 0) {
    _tile_loadd(4, p, row_bytes);
  } else {
    _tile_loadd(5, p, row_bytes);
  }
}
template <int kIndex>
static inline void load_rows(const void* p) {
  if constexpr (kIndex == 0) {
    _tile_loadd(6, p, 64);
  } else {
    _tile_loadd(7, p, 64);
  }
}
// sums of (weights, rows) += weights * rows
template <int kWeights, int kRows>
static inline void multiply_add() {
  if constexpr (kWeights == 0 && kRows == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (kWeights == 0 && kRows == 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (kWeights == 1 && kRows == 0) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kWeights == 1 && kRows == 1) _tile_dpbf16ps(3, 5, 7);
}
template <int kWeights, int kRows>
static inline void store_sums(float (*out)[16]) {
  if constexpr (kWeights == 0 && kRows == 0) _tile_stored(0, out, 64);
  if constexpr (kWeights == 0 && kRows == 1) _tile_stored(1, out, 64);
  if constexpr (kWeights == 1 && kRows == 0) _tile_stored(2, out, 64);
  if constexpr (kWeights == 1 && kRows == 1) _tile_stored(3, out, 64);
}

}  // namespace cerberus::CERBERUS_ISA::tiles
