// draft_topk: the P largest of log_softmax(projection @ state), without logits in device memory.
//
// First launch: a block owns one of `parts` slices of the vocabulary and kRows state rows. A warp takes
// vocabulary rows of its share kVocab at a time, so that every weight it loads serves kRows states and every
// state kVocab weights. Lane l keeps the logit of the l-th vocabulary row of a group of 32; then the warp
// updates its softmax sum and its best candidates for the 32 at once. The warps' results are merged and
// written: (max, sum, top P) for each state and slice. Second launch: one block merges the slices of a state
// row.
#include "args.h"
#include "copy.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "topk.cuh"

namespace cerberus {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kVocab = 4;  // 4 loads of 16 bytes in flight per lane, and 16 sums, which fit in registers

// What the warps of a block found for kRows state rows, to be merged.
template <int kRows>
struct WarpResults {
  static_assert(kRows <= kWarps, "warp r merges row r");
  Candidate best[kRows][kWarps][kLanes];
  SoftmaxSum softmax[kRows][kWarps];

  __device__ void put(int row, const BestCandidates& warp_best, const SoftmaxSum& warp_softmax) {
    best[row][warp_index()][lane_index()] = warp_best.kept;
    if (lane_index() == 0) softmax[row][warp_index()] = warp_softmax;
  }
  // For one warp: the merged results of a row.
  __device__ void merge(int row, int places, BestCandidates& all_best, SoftmaxSum& all_softmax) const {
    for (int warp = 0; warp < kWarps; ++warp) {
      all_best.offer(best[row][warp][lane_index()], places);
      all_softmax = MergeSoftmaxSums{}(all_softmax, softmax[row][warp]);
    }
  }
};

// sum[r * kVocab + v] = the lane's part of state r . vocabulary row v.
template <typename T, int kVector, int kRows>
__device__ inline void multiply(const T* const (&weights)[kVocab], const T* const (&states)[kRows],
                                int64_t size, float (&sum)[kRows * kVocab]) {
  for (int64_t column = lane_index() * kVector; column < size; column += kLanes * kVector) {
    Pack<T, kVector> packed[kVocab];
#pragma unroll
    for (int v = 0; v < kVocab; ++v) packed[v] = load_once<kVector>(weights[v] + column);
    float state[kRows][kVector];
#pragma unroll
    for (int r = 0; r < kRows; ++r) load<kVector>(states[r] + column).unpack(state[r]);
#pragma unroll
    for (int v = 0; v < kVocab; ++v) {
      float weight[kVector];
      packed[v].unpack(weight);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[r * kVocab + v] += weight[i] * state[r][i];
      }
    }
  }
}

template <typename T, int kVector, int kRows>
__global__ void __launch_bounds__(kThreads, 1) draft_topk_parts_kernel(const DraftTopkArgs a) {
  const int64_t row_tiles = (a.rows + kRows - 1) / kRows;
  const int64_t part =
      blockIdx.x / row_tiles;  // blocks of one slice run together and share its weights in the L2
  const int64_t first_row = blockIdx.x % row_tiles * kRows;
  const int places = static_cast<int>(a.guesses);

  // The block's slice, and of it the warp's share; both even to within one vocabulary row.
  const int64_t slice = a.vocab * part / a.parts, slice_size = a.vocab * (part + 1) / a.parts - slice;
  const int64_t begin = slice + slice_size * warp_index() / kWarps;
  const int64_t end = slice + slice_size * (warp_index() + 1) / kWarps;

  const T* states[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // Past the last row the last one is taken again, and its result dropped.
    const int64_t row = first_row + r < a.rows ? first_row + r : a.rows - 1;
    states[r] = static_cast<const T*>(a.states) + row * a.size;
  }

  BestCandidates best[kRows];
  SoftmaxSum softmax[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) softmax[r] = no_softmax_sum();
  for (int64_t group = begin; group < end; group += kLanes) {
    float logit[kRows] = {};  // of vocabulary row group + lane
    for (int step = 0; step < kLanes && group + step < end; step += kVocab) {
      const T* weights[kVocab];
#pragma unroll
      for (int v = 0; v < kVocab; ++v) {
        const int64_t id = group + step + v < end ? group + step + v : end - 1;
        weights[v] = static_cast<const T*>(a.projection) + id * a.size;
      }
      float sum[kRows * kVocab] = {};
      multiply<T, kVector, kRows>(weights, states, a.size, sum);
      const float total = warp_sums(sum);  // lane r * kVocab + v: state r, vocabulary row group + step + v
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float mine = shuffle(total, r * kVocab + lane_index() % kVocab);
        if (lane_index() / kVocab == step / kVocab) logit[r] = mine;
      }
    }
    const int64_t id = group + lane_index();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (id < end) softmax[r].add(logit[r]);
      best[r].offer(id < end ? Candidate{logit[r], static_cast<int32_t>(id)} : no_candidate(), places);
    }
  }

  __shared__ WarpResults<kRows> results;
#pragma unroll
  for (int r = 0; r < kRows; ++r) results.put(r, best[r], warp_reduce(softmax[r], MergeSoftmaxSums{}));
  __syncthreads();

  const int64_t row = first_row + warp_index();
  if (warp_index() >= kRows || row >= a.rows) return;
  BestCandidates all_best;
  SoftmaxSum all_softmax = no_softmax_sum();
  results.merge(warp_index(), places, all_best, all_softmax);
  const int64_t slot = row * a.parts + part;
  if (lane_index() == 0) {
    a.part_max[slot] = all_softmax.max;
    a.part_sum[slot] = all_softmax.sum;
  }
  if (lane_index() < places) {
    a.part_logits[slot * places + lane_index()] = all_best.kept.logit;
    a.part_ids[slot * places + lane_index()] = all_best.kept.id;
  }
}

__global__ void __launch_bounds__(kThreads, 1) draft_topk_merge_kernel(const DraftTopkArgs a) {
  const int64_t row = blockIdx.x;
  const int places = static_cast<int>(a.guesses);
  SoftmaxSum softmax = no_softmax_sum();
  for (int64_t part = threadIdx.x; part < a.parts; part += kThreads) {
    const SoftmaxSum of_part = {a.part_max[row * a.parts + part], a.part_sum[row * a.parts + part]};
    softmax = MergeSoftmaxSums{}(softmax, of_part);
  }
  BestCandidates best;
  const int64_t candidates = a.parts * places, first = row * candidates;
  for (int64_t group = warp_index() * kLanes; group < candidates; group += kThreads) {
    const int64_t i = group + lane_index();
    best.offer(i < candidates ? Candidate{a.part_logits[first + i], a.part_ids[first + i]} : no_candidate(),
               places);
  }

  __shared__ WarpResults<1> results;
  results.put(0, best, warp_reduce(softmax, MergeSoftmaxSums{}));
  __syncthreads();
  if (warp_index() != 0) return;
  BestCandidates all_best;
  SoftmaxSum all_softmax = no_softmax_sum();
  results.merge(0, places, all_best, all_softmax);
  if (lane_index() < places) {
    a.ids[row * places + lane_index()] = all_best.kept.id;
    a.logprobs[row * places + lane_index()] = all_best.kept.logit - all_softmax.max - logf(all_softmax.sum);
  }
}

}  // namespace

cudaError_t draft_topk_cuda(const DraftTopkArgs& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const cudaError_t error = dispatch_vector(
      a.dtype, a.size,
      [&](auto element, auto vector) {
        using T = decltype(element);
        // Odd sizes have one kernel for any number of rows.
        if constexpr (vector() > 1) {
          if (a.rows == 1)
            return launch(draft_topk_parts_kernel<T, vector(), 1>, {a.parts, kThreads}, stream, a);
        }
        return launch(draft_topk_parts_kernel<T, vector(), 4>, {a.parts * divide_up(a.rows, 4), kThreads},
                      stream, a);
      },
      a.states, a.projection);
  if (error != cudaSuccess) return error;
  return launch(draft_topk_merge_kernel, {a.rows, kThreads}, stream, a);
}

}  // namespace cerberus
