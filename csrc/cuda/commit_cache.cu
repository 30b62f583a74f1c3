// commit_cache: the accepted path's slots move next to the committed ones, in every plane; then `length`
// grows.
//
// A thread owns one unit (16 bytes where alignment allows) of one plane, row and head, and moves it for all
// nodes of the path in order, several at a time. Nobody else touches that column of the slots, so the moves
// need no synchronization: node j is written to slot length + j, and everything read later lies above it,
// because a path is increasing.
//
// `length` is read by every block of its row and may be advanced only when all have read it. So the blocks
// sign in where they read: each takes the length by adding 1 << kLengthBits to it, what the numbers from
// there on count is how many came before, and the last block writes the new length. Nothing is left behind
// and no memory of its own is needed, as a counter would be, which calls on two streams would share.
#include "args.h"
#include "copy.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace cerberus {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;       // slots that a thread has under way: most paths are not longer
constexpr int kLengthBits = 40;  // with the sign; the blocks of a row are counted above them

// Nodes of the path to be kept, at least the root.
__device__ inline int64_t kept_nodes(const CommitCacheArgs& a, int64_t row) {
  const int64_t kept = static_cast<int64_t>(a.accepted[row]) + 1;
  return kept < a.path_nodes ? kept : a.path_nodes;
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads) commit_cache_kernel(const CommitCacheArgs a, int blocks_of_row) {
  __shared__ int64_t length_of_row;
  wait_for_previous_launch();
  allow_next_launch();
  const int64_t row = blockIdx.x / blocks_of_row, kept = kept_nodes(a, row);
  if (threadIdx.x == 0) {
    const uint64_t taken = atomicAdd(reinterpret_cast<unsigned long long*>(a.length + row),
                                     static_cast<unsigned long long>(uint64_t{1} << kLengthBits));
    length_of_row = static_cast<int64_t>(taken << (64 - kLengthBits)) >> (64 - kLengthBits);
    const uint64_t before = (taken - static_cast<uint64_t>(length_of_row)) >> kLengthBits;
    if (before == static_cast<uint64_t>(blocks_of_row - 1)) a.length[row] = length_of_row + kept;
  }
  __syncthreads();

  // So many blocks have units that 32 bits count, in which a division takes a fifth of what it takes in 64.
  constexpr int64_t kUnit = sizeof(Unit);
  const unsigned units = static_cast<unsigned>(a.head_size * a.element_bytes / kUnit);  // of one slot
  const unsigned heads = static_cast<unsigned>(a.kv_heads);
  const unsigned i = (blockIdx.x % blocks_of_row) * kThreads + threadIdx.x;
  if (heads == 0 || units == 0 || a.capacity == 0) return;
  if (i >= a.planes * heads * units) return;
  const unsigned plane_and_head = i / units, unit = i - plane_and_head * units;
  const unsigned plane = plane_and_head / heads, head = plane_and_head - plane * heads;

  const int64_t length = length_of_row;
  const int32_t* path = a.path + row * a.path_nodes;
  const int64_t owner = (plane * a.rows + row) * a.kv_heads + head;
  Unit* column = static_cast<Unit*>(a.cache) + owner * a.capacity * units + unit;
  for (int64_t first = 0; first < kept; first += kAtOnce) {
    Unit moved[kAtOnce];
    bool moves[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t node = first + j, to = length + node;
      const int64_t from = node < kept ? length + path[node] : to;
      moves[j] = from != to && from >= 0 && from < a.capacity && to >= 0 && to < a.capacity;
      if (moves[j]) moved[j] = column[from * units];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (moves[j]) column[(length + first + j) * units] = moved[j];
  }
}

}  // namespace

cudaError_t commit_cache_cuda(const CommitCacheArgs& a, cudaStream_t stream) {
  return dispatch_unit(
      a.element_bytes, a.head_size,
      [&](auto unit) {
        using Unit = decltype(unit);
        // A cache without elements may have any number of planes.
        const bool moves = a.kv_heads > 0 && a.capacity > 0 && a.head_size > 0;
        const int64_t units =
            moves ? a.planes * a.kv_heads * a.head_size * a.element_bytes / sizeof(Unit) : 0;
        const int64_t blocks =
            units > 0 ? divide_up(units, kThreads) : 1;  // of a row; one to advance its length
        if (blocks > int64_t{1} << (63 - kLengthBits)) return cudaErrorInvalidConfiguration;
        return launch(commit_cache_kernel<Unit>, overlapping(a.rows * blocks, kThreads), stream, a,
                      static_cast<int>(blocks));
      },
      a.cache);
}

}  // namespace cerberus
