// write_cache: node i's keys and values go to slot length + i of their row.
//
// A thread moves one unit, 16 bytes where alignment allows. Threads run over the new keys, then over the new
// values, in the order in which they lie in memory: reads are contiguous, writes are contiguous for each node
// and head.
#include "args.h"
#include "copy.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace cerberus {
namespace {

constexpr int kThreads = 256;

template <typename Unit>
__global__ void __launch_bounds__(kThreads) write_cache_kernel(const WriteCacheArgs a) {
  wait_for_previous_launch();
  allow_next_launch();
  const int64_t units =
      a.head_size * a.element_bytes / static_cast<int64_t>(sizeof(Unit));  // of one node and head
  const int64_t count = a.rows * a.nodes * a.kv_heads * units;             // of keys or of values
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= 2 * count) return;
  const bool is_key = i < count;
  const int64_t from = is_key ? i : i - count;

  const int64_t unit = from % units, head = from / units % a.kv_heads;
  const int64_t node = from / units / a.kv_heads % a.nodes, row = from / units / a.kv_heads / a.nodes;
  const int64_t slot = a.length[row] + node;
  if (slot < 0 || slot >= a.capacity) return;
  const int64_t to = ((row * a.kv_heads + head) * a.capacity + slot) * units + unit;
  static_cast<Unit*>(is_key ? a.keys : a.values)[to] =
      static_cast<const Unit*>(is_key ? a.new_keys : a.new_values)[from];
}

}  // namespace

cudaError_t write_cache_cuda(const WriteCacheArgs& a, cudaStream_t stream) {
  return dispatch_unit(
      a.element_bytes, a.head_size,
      [&](auto unit) {
        using Unit = decltype(unit);
        if (a.nodes == 0 || a.kv_heads == 0 || a.head_size == 0) return cudaSuccess;
        const int64_t count =
            2 * a.rows * a.nodes * a.kv_heads * a.head_size * a.element_bytes / sizeof(Unit);
        return launch(write_cache_kernel<Unit>, overlapping(divide_up(count, kThreads), kThreads), stream, a);
      },
      a.keys, a.values, a.new_keys, a.new_values);
}

}  // namespace cerberus
