// Element types, their conversion, loads of 16 bytes, copies that run while a thread goes on, shared memory
// of a size chosen at the launch. One of the three files with intrinsics and PTX; what the PTX means on a
// host, for the emulation, is in simt/copy.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef __CUDACC__
#include "simt/copy.h"
#endif

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

#ifdef __CUDACC__
// The block's shared memory of the size that the launch asked for (Launch::shared_bytes), at a multiple of 16
// bytes.
template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ uint4 dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, both at multiples of 16 bytes, or 16 zero bytes where `valid` is
// false, and then nothing is read. The thread goes on at once; the bytes are there for it after end_copies
// and wait_for_copies, and for the other threads of the block after a barrier that follows. Not kept in the
// L1 cache.
__device__ inline void start_copy16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// Closes the group of the copies that this thread has started since the last call.
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the kPending groups closed last are still under way.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

// Asks for the 128 bytes around `pointer` to be brought into the L2 cache. A hint.
__device__ inline void prefetch_l2(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(pointer));
}

// `pointer` is in global memory: said where the compiler cannot follow it there, so that its loads are global
// ones and not generic ones.
__device__ inline void assume_global(const void* pointer) { __builtin_assume(__isGlobal(pointer)); }

// Until the launch before this one on the stream is complete and its writes are visible; at once where this
// launch did not ask to overlap it (Launch::overlaps). The first thing a kernel does that reads what the one
// before wrote.
__device__ inline void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on the next launch on the stream may begin, if it asked to overlap this one.
__device__ inline void allow_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

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
