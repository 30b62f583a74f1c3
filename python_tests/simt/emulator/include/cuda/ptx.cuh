// Stand-in for csrc/cuda/ptx.cuh, which documents these functions: what each of them means, for the
// emulation. Found before that file, because the folder of this one comes first on the include path.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

namespace cerberus {

template <typename T>
inline T* dynamic_shared() {
  return static_cast<T*>(simt::dynamic_shared());
}

inline void start_copy16(void* shared, const void* global, bool valid) {
  simt::start_copy(shared, global, valid);
}
inline void end_copies() { simt::end_copies(); }
template <int kPending>
inline void wait_for_copies() {
  simt::wait_for_copies(kPending);
}

inline uint4 load16(const void* global, bool valid) {
  return valid ? *static_cast<const uint4*>(global) : uint4{};
}
inline void prefetch_l2(const void*) {}
inline void assume_global(const void*) {}

inline uint32_t in_register(uint32_t bits) { return bits; }

inline void wait_for_previous_launch() { simt::wait_for_previous_launch(); }
inline void allow_next_launch() { simt::allow_next_launch(); }

// Element `half` of a register with two elements of T.
template <typename T>
inline float half_of(uint32_t word, int half) {
  T both[2];
  std::memcpy(both, &word, sizeof(word));
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(both[half]);
  else
    return __bfloat162float(both[half]);
}

template <typename T>
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>,
                "tensor cores multiply bf16 and fp16 here");
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const simt::WarpWords& of_lane = simt::exchange(simt::Collective::kMultiply, mine, 6);
  // A[row][k] and B[k][column], from the lane that holds them.
  const auto a_at = [&](int row, int k) {
    return half_of<T>(of_lane[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
  };
  const auto b_at = [&](int k, int column) {
    return half_of<T>(of_lane[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
  };
  const int g = simt::lane_index() / 4, t = simt::lane_index() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) d[i] += a_at(row, k) * b_at(k, column);
  }
}

// A lane reads the row that it names, at once: what other lanes write to it before they come here, without a
// barrier, is a race.
inline const simt::WarpWords& exchange_rows(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    simt::fail("loads a matrix row from an address that is not a multiple of 16 bytes");
  uint32_t mine[4];
  std::memcpy(mine, row, sizeof(mine));
  return simt::exchange(simt::Collective::kLoadMatrices, mine, 4);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const simt::WarpWords& row_of_lane = exchange_rows(row);
  const int g = simt::lane_index() / 4, t = simt::lane_index() % 4;
  for (int i = 0; i < 4; ++i) r[i] = row_of_lane[8 * i + g][t];
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const simt::WarpWords& row_of_lane = exchange_rows(row);
  const int g = simt::lane_index() / 4, t = simt::lane_index() % 4;
  const auto element = [&](int i, int row, int column) {
    return row_of_lane[8 * i + row][column / 2] >> column % 2 * 16 & 0xffff;
  };
  for (int i = 0; i < 4; ++i) r[i] = element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16;
}

inline float exp2_flushed(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
inline float divided(float x, float y) { return x / y; }

}  // namespace cerberus
