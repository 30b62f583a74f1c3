// draft_topk: the P largest of log_softmax(projection @ state), without logits in device memory.
//
// First launch: a block owns consecutive vocabulary rows, a part, and up to kRows state rows (skinny.cuh has
// the product). After each round warp w takes state rows w, w + 8, ... of the logits in shared memory, a lane
// a vocabulary row, and updates its softmax sums and its best candidates: one vote where none is good enough.
// The part's results are (max, sum, top P) of each state. Second launch, on its way while the first one ends:
// a block merges the parts of a state row.
#include "args.h"
#include "copy.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "skinny.cuh"
#include "topk.cuh"

namespace cerberus {
namespace {

// What multiply() asks of its work. In the scratch part_max and part_sum are (rows, parts), part_logits and
// part_ids (rows, P, parts), so that the lanes of the merge, a part each, read side by side.
template <typename Product>
class DraftTopk {
 public:
  using T = typename Product::Element;

  struct Place {
    int tile;
  };

  __device__ DraftTopk(const DraftTopkArgs& a, const ProductSplit& split, int part, int64_t first_row)
      : a_(a),
        round_tiles_(split.round_tiles()),
        round_rows_(split.round_rows()),
        begin_(split.first_tile(part)),
        end_(split.first_tile(part + 1)),
        first_row_(first_row),
        rows_(static_cast<int>(a.rows - first_row < Product::kRows ? a.rows - first_row : Product::kRows)) {
#pragma unroll
    for (SoftmaxSum& softmax : softmax_) softmax = no_softmax_sum();
  }

  __device__ void begin() const {}
  __device__ Place first() const { return {begin_}; }
  __device__ bool is_over(const Place& place) const { return place.tile >= end_; }
  __device__ Place after(const Place& place) const { return {place.tile + round_tiles_}; }

  __device__ WeightRows<T> weights(const Place&, int tile, int) const {
    const T* const all = static_cast<const T*>(a_.projection);
    if (tile >= end_) return {all, 0, false};
    // Past the last row the last one is read again, and its logit dropped.
    const int64_t row = static_cast<int64_t>(tile) * kTileRows + lane_index() / 4, last = a_.vocab - 1;
    return {all + (row < last ? row : last) * a_.size, row + 8 <= last ? 8 * static_cast<int>(a_.size) : 0,
            true};
  }
  __device__ XRows<T> x(const Place&, int tile, int) const {
    return {static_cast<const T*>(a_.states) + first_row_ * a_.size, static_cast<int>(a_.size),
            tile < end_ ? rows_ : 0};
  }

  __device__ void finish(const Place& place, const RoundSums<Product>& logits) {
    const int64_t end = min(static_cast<int64_t>(end_) * kTileRows, a_.vocab);
    for (int group = 0; group < round_rows_; group += kLanes) {
      const int vocab_row = group + lane_index();
      const int64_t id = static_cast<int64_t>(place.tile) * kTileRows + vocab_row;
      const bool exists = vocab_row < round_rows_ && id < end;
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) {
        const int row = i * kProductWarps + warp_index();
        if (row >= rows_) break;
        const float logit = exists ? logits.at(row, vocab_row) : 0.0f;
        if (exists) softmax_[i].add(logit);
        best_[i].offer(exists ? Candidate{logit, static_cast<int32_t>(id)} : no_candidate(),
                       static_cast<int>(a_.drafts));
      }
    }
  }

  // What the part found.
  __device__ void write(int part, int parts) const {
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      if (i * kProductWarps + warp_index() >= rows_) break;
      const int64_t row = first_row_ + i * kProductWarps + warp_index();
      const SoftmaxSum all = warp_reduce(softmax_[i], MergeSoftmaxSums{});
      if (lane_index() == 0) {
        a_.part_max[row * parts + part] = all.max;
        a_.part_sum[row * parts + part] = all.sum;
      }
      if (lane_index() < a_.drafts) {
        const int64_t slot = (row * a_.drafts + lane_index()) * parts + part;
        a_.part_logits[slot] = best_[i].kept.logit;
        a_.part_ids[slot] = best_[i].kept.id;
      }
    }
  }

 private:
  static constexpr int kWarpRows = Product::kRows / kProductWarps;

  const DraftTopkArgs& a_;
  const int round_tiles_, round_rows_;
  const int begin_, end_;  // the tiles of this block
  const int64_t first_row_;
  const int rows_;
  BestCandidates best_[kWarpRows];
  SoftmaxSum softmax_[kWarpRows];  // of the vocabulary rows that were this lane's
};

// The best candidates of 64 rows take the registers of the second block of a multiprocessor.
template <typename Product>
constexpr int kPartBlocks = Product::kRows > 32 ? 1 : Product::kResidentBlocks;

// Blocks of one part run side by side, each with other state rows, and share its weights in the L2 cache.
template <typename Product>
__global__ void __launch_bounds__(kProductThreads, kPartBlocks<Product>)
    draft_topk_parts_kernel(const DraftTopkArgs a, const ProductSplit split) {
  wait_for_previous_launch();  // for the weights, too: it may have written them
  allow_next_launch();
  const int groups = static_cast<int>((a.rows + Product::kRows - 1) / Product::kRows);
  const int part = blockIdx.x / groups, group = blockIdx.x % groups;
  DraftTopk<Product> work(a, split, part, int64_t{group} * Product::kRows);
  multiply<Product>(split, static_cast<int>(a.size), work);
  work.write(part, split.blocks);
}

constexpr int kMergeThreads = 256;  // a lane for each of the 264 parts of a device with 132 multiprocessors
constexpr int kMergeWarps = kMergeThreads / kLanes;
constexpr int kBatch = 4;  // places that are read at once: most often the only ones

__global__ void __launch_bounds__(kMergeThreads, 1)
    draft_topk_merge_kernel(const DraftTopkArgs a, const int parts) {
  __shared__ Candidate warp_best[kMergeWarps][kLanes];
  const int64_t row = blockIdx.x;
  const int places = static_cast<int>(a.drafts);
  wait_for_previous_launch();

  SoftmaxSum softmax = no_softmax_sum();
  BestCandidates best;
  for (int group = warp_index() * kLanes; group < parts; group += kMergeThreads) {
    const int part = group + lane_index();
    if (part < parts) {
      const SoftmaxSum of_part = {a.part_max[row * parts + part], a.part_sum[row * parts + part]};
      softmax = MergeSoftmaxSums{}(softmax, of_part);
    }
    // A part's candidates are sorted: where no part has a good one at this place, none has one behind it.
    bool any = true;
    for (int place = 0; any && place < places; place += kBatch) {
      Candidate candidates[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        candidates[i] = no_candidate();
        if (part >= parts || place + i >= places) continue;
        const int64_t slot = (row * places + place + i) * parts + part;
        candidates[i] = {a.part_logits[slot], a.part_ids[slot]};
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) any = best.offer(candidates[i], places);
    }
  }
  softmax = block_reduce<kMergeThreads>(softmax, MergeSoftmaxSums{});
  warp_best[warp_index()][lane_index()] = best.kept;
  __syncthreads();
  if (warp_index() != 0) return;
  for (int warp = 1; warp < kMergeWarps; ++warp) best.offer(warp_best[warp][lane_index()], places);
  if (lane_index() < places) {
    a.ids[row * places + lane_index()] = best.kept.id;
    a.logprobs[row * places + lane_index()] = best.kept.logit - softmax.max - logf(softmax.sum);
  }
}

}  // namespace

// Two blocks for each multiprocessor: with one, a block that waits for its loads would leave its
// multiprocessor idle.
int64_t draft_topk_parts(int64_t multiprocessors) { return 2 * multiprocessors; }

cudaError_t draft_topk_cuda(const DraftTopkArgs& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  int parts = 0;
  const cudaError_t error = dispatch_product(
      a.dtype, a.size, a.rows,
      [&](auto product) {
        using Product = decltype(product);
        const ProductSplit split(divide_up(a.vocab, kTileRows), a.parts, divide_up(a.size, Product::kChunk),
                                 1);
        parts = split.blocks;
        return launch(draft_topk_parts_kernel<Product>,
                      overlapping(split.blocks * divide_up(a.rows, Product::kRows), kProductThreads,
                                  Product::kSharedBytes),
                      stream, a, split);
      },
      a.states, a.projection);
  if (error != cudaSuccess) return error;
  return launch(draft_topk_merge_kernel, overlapping(a.rows, kMergeThreads), stream, a, parts);
}

}  // namespace cerberus
