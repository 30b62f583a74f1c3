// The second launch of a split tree_attention: a query row's result from those of its pieces.
//
// A block owns one query row. Its warps take turns at the pieces; a lane owns up to 8 columns.
#pragma once

#include "copy.cuh"
#include "kernels.h"
#include "tree_attention.cuh"

namespace cerberus {

constexpr int kCombineThreads = 128;
constexpr int kAtOnce = 4;  // pieces whose outputs a warp has under way
// On a multiprocessor at once. ptxas, left alone, keeps to 64 registers and spills.
constexpr int kCombineBlocks = 6;

template <typename T, int kVector>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocks) combine_kernel(const TreeAttentionArgs a) {
  constexpr int kWarps = kCombineThreads / kLanes, kColumns = kMaxHeadSize / kLanes;
  __shared__ float of_warp[kWarps][kMaxHeadSize];
  wait_for_previous_launch();
  allow_next_launch();

  const int splits = static_cast<int>(a.splits), head_size = static_cast<int>(a.head_size);
  const int64_t first_part = static_cast<int64_t>(blockIdx.x) * splits;
  const int lane = lane_index();

  // Lane l knows all about pieces l, l + 32, ...; every warp the same.
  constexpr int kOwn = kMaxSplits / kLanes;
  float weight[kOwn], sum[kOwn], max = -INFINITY;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int split = i * kLanes + lane;
    sum[i] = split < splits ? a.part_sum[first_part + split] : 0.0f;
    weight[i] = sum[i] == 0.0f ? -INFINITY : a.part_max[first_part + split];
    max = fmaxf(max, weight[i]);
  }
  max = warp_reduce(max, Max{});
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    weight[i] = sum[i] == 0.0f ? 0.0f : exp2f(weight[i] - max);  // the row sees nothing of the piece
    total = fmaf(weight[i], sum[i], total);
  }
  total = warp_reduce(total, Sum{});

  float output[kColumns] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (i * kLanes >= splits) break;
#pragma unroll 1
    for (int first = warp_index(); first < kLanes; first += kAtOnce * kWarps) {
      float of_piece[kAtOnce];
      Pack<float, kVector> packs[kAtOnce][kColumns / kVector];
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) {
        const int other = first + p * kWarps;
        of_piece[p] = shuffle(weight[i], other);
        // Of a piece of which the row sees nothing, nothing is there.
        const bool sees = shuffle(sum[i], other) != 0.0f;
        const float* part = a.part_output + (first_part + i * kLanes + other) * head_size;
#pragma unroll
        for (int c = 0; c < kColumns; c += kVector) {
          const int column = c * kLanes + lane * kVector;
          packs[p][c / kVector] = load_if<kVector>(sees && column < head_size, part + column);
        }
      }
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) {
#pragma unroll
        for (int c = 0; c < kColumns; c += kVector) {
          float x[kVector];
          packs[p][c / kVector].unpack(x);
#pragma unroll
          for (int j = 0; j < kVector; ++j) output[c + j] = fmaf(of_piece[p], x[j], output[c + j]);
        }
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; c += kVector)
#pragma unroll
    for (int j = 0; j < kVector; ++j) of_warp[warp_index()][c * kLanes + lane * kVector + j] = output[c + j];
  __syncthreads();

  const float share = share_of<T>(a, blockIdx.x % static_cast<unsigned>(a.query_heads), max, total);
  T* to = static_cast<T*>(a.output) + static_cast<int64_t>(blockIdx.x) * head_size;
  for (int column = threadIdx.x; column < head_size; column += kCombineThreads) {
    float x = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) x += of_warp[warp][column];
    to[column] = from_float<T>(share * x);
  }
}

template <typename T>
cudaError_t launch_combine(const TreeAttentionArgs& a, cudaStream_t stream) {
  const Launch how = overlapping(a.rows * a.nodes * a.query_heads, kCombineThreads);
  return a.head_size % 4 == 0 ? launch(combine_kernel<T, 4>, how, stream, a)
                              : launch(combine_kernel<T, 1>, how, stream, a);
}

}  // namespace cerberus
