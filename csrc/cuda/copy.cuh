// Element types and their conversion, loads of 16 bytes, a row of memory by the threads of a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/ptx.cuh"

namespace cerberus {

using bf16 = __nv_bfloat16;
using fp16 = __half;

inline bool is_aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(fp16 x) { return __half2float(x); }

// Rounds to nearest, ties to even.
template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline fp16 from_float<fp16>(float x) {
  return __float2half_rn(x);
}

__device__ inline bool is_nan(float x) { return x != x; }
__device__ inline uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ inline float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

// kVector consecutive elements: one element, or 16 bytes at a multiple of 16 bytes.
template <typename T, int kVector>
struct Pack {
  static_assert(kVector == 1 || kVector * sizeof(T) == 16, "a pack is one element or 16 bytes");
  using Bits = std::conditional_t<kVector == 1, T, uint4>;
  Bits bits;

  __device__ void unpack(float (&x)[kVector]) const {
    T element[kVector];
    std::memcpy(element, &bits, sizeof(bits));
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = to_float(element[i]);
  }
};

template <int kVector, typename T>
__device__ inline Pack<T, kVector> load(const T* from) {
  using Bits = typename Pack<T, kVector>::Bits;
  return {*reinterpret_cast<const Bits*>(from)};
}

// The same, or zeros where `valid` is false.
template <int kVector, typename T>
__device__ inline Pack<T, kVector> load_if(bool valid, const T* from) {
  if constexpr (kVector > 1) return {load16(from, valid)};
  Pack<T, kVector> pack = {};
  if (valid) pack = load<kVector>(from);
  return pack;
}

// For what is read once, such as weights: marked as the first to leave the caches.
template <int kVector, typename T>
__device__ inline Pack<T, kVector> load_once(const T* from) {
  using Bits = typename Pack<T, kVector>::Bits;
  return {__ldcs(reinterpret_cast<const Bits*>(from))};
}

// Two numbers rounded to T in one register, the first in the low half: as the operands of a product hold
// them.
template <typename T>
__device__ inline uint32_t pack2(float low, float high) {
  const T both[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  std::memcpy(&bits, both, sizeof(bits));
  return bits;
}

// f(index of the first, values) for the packs of one row that belong to this thread of a block of kThreads,
// in order. kAtOnce of them are under way at the same time.
template <int kThreads, int kVector, int kAtOnce, typename T, typename F>
__device__ inline void for_each_pack(const T* row, int64_t size, F f) {
  constexpr int64_t kStride = kThreads * kVector;
  for (int64_t first = static_cast<int64_t>(threadIdx.x) * kVector; first < size;
       first += kAtOnce * kStride) {
    Pack<T, kVector> packs[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kStride < size) packs[i] = load<kVector>(row + first + i * kStride);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kStride >= size) break;
      float x[kVector];
      packs[i].unpack(x);
      f(first + i * kStride, x);
    }
  }
}
// f(index, value) for the same elements.
template <int kThreads, int kVector, typename T, typename F>
__device__ inline void for_each_in_row(const T* row, int64_t size, F f) {
  for_each_pack<kThreads, kVector, 2>(row, size, [&](int64_t first, const float (&x)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) f(first + i, x[i]);
  });
}

}  // namespace cerberus
