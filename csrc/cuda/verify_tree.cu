// verify_tree: the longest path from the root on which every node is what the target model chose after its
// parent.
//
// One warp owns one row. Which nodes equal their parent's target is decided for 32 nodes at a time by a vote,
// whatever their order in the tree; a node is accepted where all its ancestors do: ancestors & ~matches == 0.
// So the work takes a few steps however deep the tree is.
#include "args.h"
#include "kernels.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace cerberus {
namespace {

__global__ void __launch_bounds__(kLanes) verify_tree_kernel(const VerifyTreeArgs a) {
  __shared__ uint32_t
      matches[kMaxVerifyNodes / kLanes];  // bit i % 32 of word i / 32: node i equals its parent's target
  wait_for_previous_launch();
  allow_next_launch();
  const int lane = lane_index();
  const int64_t* draft = a.draft + blockIdx.x * a.nodes;
  const int64_t* target = a.target + blockIdx.x * a.nodes;

  for (int64_t first = 0; first < a.words * 64; first += kLanes) {
    const int64_t node = first + lane;
    const bool match = node == 0 || (node < a.nodes && draft[node] == target[a.parents[node]]);
    const uint32_t word = ballot(match);
    if (lane == 0) matches[first / kLanes] = word;
  }
  __syncthreads();

  // The best node as one number: the deeper, then the lower node is the larger number.
  uint64_t best = UINT32_MAX;  // the root: depth 0, node 0
  for (int64_t node = lane; node < a.nodes; node += kLanes) {
    const int64_t* ancestors = a.ancestors + node * a.words;
    uint64_t missing = 0;
    int64_t depth = -1;
    for (int64_t w = 0; w < a.words; ++w) {
      const uint64_t word = static_cast<uint64_t>(ancestors[w]);
      missing |= word & ~(static_cast<uint64_t>(matches[2 * w + 1]) << 32 | matches[2 * w]);
      depth += count_bits(word);
    }
    if (missing != 0 || depth < 0 || depth > a.depth) continue;
    const uint64_t rank = static_cast<uint64_t>(depth) << 32 | (UINT32_MAX - static_cast<uint32_t>(node));
    best = Max{}(best, rank);
  }
  best = warp_reduce(best, Max{});
  const int64_t accepted = static_cast<int64_t>(best >> 32);
  const int64_t* chosen =
      a.ancestors + static_cast<int64_t>(UINT32_MAX - static_cast<uint32_t>(best)) * a.words;

  int32_t* path = a.path + blockIdx.x * (a.depth + 1);
  for (int64_t depth = accepted + 1 + lane; depth <= a.depth; depth += kLanes) path[depth] = -1;
  // A node's depth is the number of its ancestors, itself excluded: they have lower indices.
  for (int64_t node = lane; node < a.nodes; node += kLanes) {
    const uint64_t word = static_cast<uint64_t>(chosen[node / 64]);
    if ((word >> (node % 64) & 1) == 0) continue;
    int64_t depth = count_bits(word & ((uint64_t{1} << (node % 64)) - 1));
    for (int64_t w = 0; w < node / 64; ++w) depth += count_bits(static_cast<uint64_t>(chosen[w]));
    if (depth <= accepted) path[depth] = static_cast<int32_t>(node);
  }
  if (lane == 0) a.accepted[blockIdx.x] = static_cast<int32_t>(accepted);
}

}  // namespace

cudaError_t verify_tree_cuda(const VerifyTreeArgs& a, cudaStream_t stream) {
  if (a.nodes > kMaxVerifyNodes) return cudaErrorInvalidValue;
  return launch(verify_tree_kernel, overlapping(a.rows, kLanes), stream, a);
}

}  // namespace cerberus
