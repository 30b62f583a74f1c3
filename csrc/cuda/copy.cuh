// Element types, their conversion, and loads of 16 bytes. One of the three files with intrinsics.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

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

// For what is read once, such as weights: marked as the first to leave the caches.
template <int kVector, typename T>
__device__ inline Pack<T, kVector> load_once(const T* from) {
  using Bits = typename Pack<T, kVector>::Bits;
  return {__ldcs(reinterpret_cast<const Bits*>(from))};
}

// f(index, value) for the elements of one row that belong to this thread of a block of kThreads.
template <int kThreads, int kVector, typename T, typename F>
__device__ inline void for_each_in_row(const T* row, int64_t size, F f) {
#pragma unroll 2
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * kVector; i < size; i += kThreads * kVector) {
    float x[kVector];
    load<kVector>(row + i).unpack(x);
#pragma unroll
    for (int j = 0; j < kVector; ++j) f(i + j, x[j]);
  }
}

}  // namespace cerberus
