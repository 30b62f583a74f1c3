// What the threads of a warp, a block or a grid do together: shuffles, votes, reductions, scans, barriers.
// Intrinsics are here and in ptx.cuh alone. Every warp function is called by all 32 lanes, every block
// function by all threads of the block.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace cerberus {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane_index() { return threadIdx.x % kLanes; }
__device__ inline int warp_index() { return threadIdx.x / kLanes; }

// Any plain value travels as 32-bit words.
template <typename T, typename Exchange>
__device__ inline T exchange_words(T value, Exchange exchange) {
  static_assert(sizeof(T) % 4 == 0, "values are exchanged in 32-bit words");
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof(T));
#pragma unroll
  for (uint32_t& word : words) word = exchange(word);
  std::memcpy(&value, words, sizeof(T));
  return value;
}

// The value of lane `lane`.
template <typename T>
__device__ inline T shuffle(T value, int lane) {
  return exchange_words(value, [=](uint32_t word) { return __shfl_sync(kAllLanes, word, lane); });
}
// The value of the lane whose index differs in the bits of `mask`.
template <typename T>
__device__ inline T shuffle_xor(T value, int mask) {
  return exchange_words(value, [=](uint32_t word) { return __shfl_xor_sync(kAllLanes, word, mask); });
}
// The value of the lane `distance` below; the lowest lanes keep their own.
template <typename T>
__device__ inline T shuffle_up(T value, int distance) {
  return exchange_words(value, [=](uint32_t word) { return __shfl_up_sync(kAllLanes, word, distance); });
}
// Bit l: lane l's condition.
__device__ inline uint32_t ballot(bool condition) { return __ballot_sync(kAllLanes, condition); }

__device__ inline int count_bits(uint32_t bits) { return __popc(bits); }
__device__ inline int count_bits(uint64_t bits) { return __popcll(bits); }
__device__ inline int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

// Until all lanes of the warp are here; what they wrote to memory before is visible to each other after it.
__device__ inline void warp_barrier() { __syncwarp(kAllLanes); }
// The same for all threads of the grid. Only in a cooperative launch (Launch::cooperative).
__device__ inline void grid_barrier() { cooperative_groups::this_grid().sync(); }

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// combine() over the lanes' values, in every lane.
template <typename T, typename Combine>
__device__ inline T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  return value;
}

// combine() over the threads' values, the same bits in every thread: warps are combined in one order.
template <int kThreads, typename T, typename Combine>
__device__ inline T block_reduce(T value, Combine combine) {
  constexpr int kWarps = kThreads / kLanes;
  static_assert(std::is_trivially_default_constructible_v<T>, "shared memory is not initialized");
  __shared__ T partial[kWarps];
  value = warp_reduce(value, combine);
  __syncthreads();  // an earlier reduction may still be reading
  if (lane_index() == 0) partial[warp_index()] = value;
  __syncthreads();
  value = partial[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, partial[warp]);
  return value;
}

// The sum of the values of the threads before this one.
template <int kThreads, typename T>
__device__ inline T block_sum_before(T value) {
  constexpr int kWarps = kThreads / kLanes;
  __shared__ T partial[kWarps];
  T through = value;  // of the lanes up to and including this one
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const T below = shuffle_up(through, distance);
    if (lane_index() >= distance) through += below;
  }
  __syncthreads();  // an earlier scan may still be reading
  if (lane_index() == kLanes - 1) partial[warp_index()] = through;
  __syncthreads();
  T before = through - value;
  for (int warp = 0; warp < warp_index(); ++warp) before += partial[warp];
  return before;
}

}  // namespace cerberus
