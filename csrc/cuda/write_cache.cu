// write_cache: node i's keys and values go to slot length + i of their row.
//
// A thread moves one unit, 16 bytes where alignment allows; a block has units of one row's keys, or of its
// values, in the order in which the new ones lie in memory: reads are contiguous, writes are contiguous for
// each node and head. Within a row places fit into 32 bits, in which a division takes a fifth of what it
// takes in 64.
#include "args.h"
#include "copy.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace cerberus {
namespace {

constexpr int kThreads = 256;

// Blocks come by row, first those of the keys: `blocks_of_row` for each.
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    write_cache_kernel(const WriteCacheArgs a, unsigned units, unsigned blocks_of_row) {
  wait_for_previous_launch();
  allow_next_launch();
  const unsigned owner = blockIdx.x / blocks_of_row, rows = static_cast<unsigned>(a.rows);
  const unsigned heads = static_cast<unsigned>(a.kv_heads);
  const unsigned count = static_cast<unsigned>(a.nodes) * heads * units;  // of one row
  const unsigned i = (blockIdx.x - owner * blocks_of_row) * kThreads + threadIdx.x;
  if (i >= count) return;
  const bool is_key = owner < rows;
  const int64_t row = is_key ? owner : owner - rows;

  const unsigned node_and_head = i / units, node = node_and_head / heads;
  const unsigned unit = i - node_and_head * units, head = node_and_head - node * heads;
  const int64_t slot = a.length[row] + node;
  if (slot < 0 || slot >= a.capacity) return;
  const int64_t to = ((row * heads + head) * a.capacity + slot) * units + unit;
  static_cast<Unit*>(is_key ? a.keys : a.values)[to] =
      static_cast<const Unit*>(is_key ? a.new_keys : a.new_values)[row * count + i];
}

}  // namespace

cudaError_t write_cache_cuda(const WriteCacheArgs& a, cudaStream_t stream) {
  return dispatch_unit(
      a.element_bytes, a.head_size,
      [&](auto unit) {
        using Unit = decltype(unit);
        if (a.rows == 0 || a.nodes == 0 || a.kv_heads == 0 || a.head_size == 0) return cudaSuccess;
        const int64_t units = a.head_size * a.element_bytes / static_cast<int64_t>(sizeof(Unit));
        if (a.nodes * a.kv_heads * units > INT32_MAX) return cudaErrorInvalidConfiguration;
        const int64_t blocks = divide_up(a.nodes * a.kv_heads * units, kThreads);
        return launch(write_cache_kernel<Unit>, overlapping(2 * a.rows * blocks, kThreads), stream, a,
                      static_cast<unsigned>(units), static_cast<unsigned>(blocks));
      },
      a.keys, a.values, a.new_keys, a.new_values);
}

}  // namespace cerberus
