// Stand-in for the toolkit's header of this name: what csrc/cuda uses of CUDA C++ beyond C++, for the
// emulation.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_runtime_api.h"
#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// Every block has its own copy: the emulator puts it in place, see Segment there.
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};
// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) float4 {
  float x, y, z, w;
};

// ---------------------------------------------------------------- barriers, shuffles, votes: of whole warps

namespace simt {
inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("calls a warp function for some of the lanes only");
}
inline uint32_t shuffle(unsigned mask, uint32_t word, int from) {
  check_mask(mask);
  return exchange(Collective::kShuffle, &word, 1)[from][0];
}
}  // namespace simt

inline void __syncthreads() { simt::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  simt::check_mask(mask);
  simt::exchange(simt::Collective::kSyncWarp, nullptr, 0);
}
inline uint32_t __shfl_sync(unsigned mask, uint32_t word, int lane) {
  return simt::shuffle(mask, word, lane % simt::kWarpLanes);
}
inline uint32_t __shfl_xor_sync(unsigned mask, uint32_t word, int bits) {
  const int from = simt::lane_index() ^ bits;
  return simt::shuffle(mask, word, from < simt::kWarpLanes ? from : simt::lane_index());
}
inline uint32_t __shfl_up_sync(unsigned mask, uint32_t word, int distance) {
  const int from = simt::lane_index() - distance;
  return simt::shuffle(mask, word, from >= 0 ? from : simt::lane_index());
}
inline uint32_t __ballot_sync(unsigned mask, bool condition) {
  simt::check_mask(mask);
  const uint32_t mine = condition;
  const simt::WarpWords& all = simt::exchange(simt::Collective::kVote, &mine, 1);
  uint32_t votes = 0;
  for (int lane = 0; lane < simt::kWarpLanes; ++lane) votes |= all[lane][0] << lane;
  return votes;
}

// ---------------------------------------------------------------- memory

template <typename T>
T __ldcs(const T* pointer) {
  return *pointer;
}
inline void __threadfence() {}

// Each may be where another thread goes on, before it or after it.
namespace simt {
template <typename T, typename Change>
T atomic(T* pointer, Change change) {
  yield();
  const T before = *pointer;
  *pointer = change(before);
  return before;
}
}  // namespace simt
template <typename T>
T atomicAdd(T* pointer, std::common_type_t<T> value) {
  return simt::atomic(pointer, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* pointer, std::common_type_t<T> value) {
  return simt::atomic(pointer, [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicExch(T* pointer, std::common_type_t<T> value) {
  return simt::atomic(pointer, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* pointer, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return simt::atomic(pointer, [=](T old) { return old == expected ? value : old; });
}

// ---------------------------------------------------------------- numbers

using std::max;
using std::min;

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __popcll(uint64_t bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
// Of the bytes of `low`, then of `high`, those that the lowest four digits of `select` name.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t select) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i)
    chosen |= static_cast<uint32_t>(bytes >> 8 * (select >> 4 * i & 7) & 0xff) << 8 * i;
  return chosen;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// ---------------------------------------------------------------- launches

namespace simt {
cudaError_t limit_dynamic_shared(const void* kernel, int64_t bytes);
cudaError_t check_and_enqueue(const cudaLaunchConfig_t& config, const void* kernel,
                              std::function<void()> body);
cudaError_t resident_blocks(int* blocks, const void* kernel, int threads, size_t shared_bytes);
}  // namespace simt

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  return simt::limit_dynamic_shared(reinterpret_cast<const void*>(kernel), value);
}

template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Parameters...),
                                                          int threads, size_t shared_bytes) {
  return simt::resident_blocks(blocks, reinterpret_cast<const void*>(kernel), threads, shared_bytes);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "what a kernel's parameters may take");
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "parameters are copied to the device");
  std::tuple<Parameters...> given(std::forward<Arguments>(arguments)...);
  return simt::check_and_enqueue(*config, reinterpret_cast<const void*>(kernel),
                                 [kernel, given] { std::apply(kernel, given); });
}
