// commit_cache: the accepted path's slots move next to the committed ones, in every plane; then `length`
// grows.
//
// A thread owns one unit (16 bytes where alignment allows) of one plane, row and head, and moves it for all
// places of the path in order. Nobody else touches that column of the slots, so the moves need no
// synchronization: place j is written to slot length + j, and everything read later lies above it, because a
// path is increasing.
//
// `length` is read by every block of the move, so nobody may advance it before the last has read it. The end
// of a launch is the one barrier over all blocks that needs neither a counter in device memory, which calls
// on two streams would share, nor a cooperative launch; hence a second launch of a few threads.
#include "args.h"
#include "copy.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace cerberus {
namespace {

constexpr int kThreads = 256;

// Places of the path to be kept, at least the root.
__device__ inline int64_t kept_places(const CommitCacheArgs& a, int64_t row) {
  const int64_t places = static_cast<int64_t>(a.accepted[row]) + 1;
  return places < a.path_places ? places : a.path_places;
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads) commit_cache_kernel(const CommitCacheArgs a) {
  const int64_t units = a.head_size * a.element_bytes / static_cast<int64_t>(sizeof(Unit));  // of one slot
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.planes * a.rows * a.kv_heads * units) return;
  const int64_t unit = i % units, owner = i / units;  // owner: which plane, row and head
  const int64_t row = owner / a.kv_heads % a.rows;

  const int64_t length = a.length[row], places = kept_places(a, row);
  const int32_t* path = a.path + row * a.path_places;
  Unit* column = static_cast<Unit*>(a.cache) + owner * a.capacity * units + unit;
  for (int64_t place = 0; place < places; ++place) {
    const int64_t from = length + path[place], to = length + place;
    if (from == to || from < 0 || from >= a.capacity || to < 0 || to >= a.capacity) continue;
    column[to * units] = column[from * units];
  }
}

__global__ void __launch_bounds__(kThreads) advance_length_kernel(const CommitCacheArgs a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row < a.rows) a.length[row] += kept_places(a, row);
}

}  // namespace

cudaError_t commit_cache_cuda(const CommitCacheArgs& a, cudaStream_t stream) {
  const cudaError_t error = dispatch_unit(
      a.element_bytes, a.head_size,
      [&](auto unit) {
        using Unit = decltype(unit);
        const int64_t count = a.planes * a.rows * a.kv_heads * a.head_size * a.element_bytes / sizeof(Unit);
        return launch(commit_cache_kernel<Unit>, {divide_up(count, kThreads), kThreads}, stream, a);
      },
      a.cache);
  if (error != cudaSuccess) return error;
  return launch(advance_length_kernel, {divide_up(a.rows, kThreads), kThreads}, stream, a);
}

}  // namespace cerberus
