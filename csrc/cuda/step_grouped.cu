// step_grouped: products whose rows name their weights; skinny.cuh has the product, of one row of X at a
// time.
//
// An entry is one weight that a row names. The tiles of the entries are counted one after the other; those of
// entries that name the same group find its weights in the L2 cache. How the columns are split depends on the
// tiles of one row and on the device, not on the rows.
#include "copy.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "skinny.cuh"
#include "step_kernels.h"

namespace cerberus {
namespace {

// What multiply() asks of its work.
template <typename Product>
class StepGrouped {
 public:
  using T = typename Product::Element;

  struct Place {
    int tile;
  };

  __device__ StepGrouped(const StepGroupedArgs& a, const ProductSplit& split)
      : a_(a),
        split_(split),
        size_(static_cast<int>(a.in_size)),
        outputs_(static_cast<int>(a.out_size)),
        entry_tiles_(static_cast<unsigned>(outputs_ + kTileRows - 1) / kTileRows),
        begin_(split.first_tile(blockIdx.x)),
        end_(split.first_tile(blockIdx.x + 1)) {}

  __device__ void begin() const {}  // which weights these are has been waited for
  __device__ Place first() const { return {begin_}; }
  __device__ bool is_over(const Place& place) const { return place.tile >= end_; }
  __device__ Place after(const Place& place) const { return {place.tile + split_.round_tiles()}; }

  __device__ WeightRows<T> weights(const Place& place, int tile, int) const {
    const T* const all = static_cast<const T*>(a_.weight);
    if (is_over(place) || tile >= end_) return {all, 0, false};
    const int entry = static_cast<unsigned>(tile) / entry_tiles_, group = group_of(entry);
    if (group < 0) return {all, 0, false};
    // Past the last row the last one is read again, and its sum dropped.
    const int last = outputs_ - 1, row = min(row_of(tile, entry) + lane_index() / 4, last);
    return {all + (int64_t{group} * outputs_ + row) * size_, min(8, last - row) * size_, true};
  }
  __device__ XRows<T> x(const Place&, int tile, int) const {
    const int entry = static_cast<unsigned>(tile) / entry_tiles_;
    const int64_t row = tile >= end_ ? 0 : a_.shared ? entry / static_cast<int>(a_.each) : entry;
    return {static_cast<const T*>(a_.input) + row * size_, size_, tile < end_ ? 1 : 0};
  }

  __device__ void finish(const Place& place, const RoundSums<Product>& sums) const {
    const int weight_row = threadIdx.x;  // there are at most 128
    const int tile = place.tile + weight_row / kTileRows;
    if (weight_row >= split_.round_rows() || tile >= end_) return;
    const int entry = static_cast<unsigned>(tile) / entry_tiles_, group = group_of(entry);
    const int column = row_of(tile, entry) + weight_row % kTileRows;
    if (column >= outputs_) return;
    const int64_t place_of_bias = int64_t{group} * outputs_ + column;
    const bool has_bias = a_.bias && group >= 0;
    const float bias = has_bias ? to_float(static_cast<const T*>(a_.bias)[place_of_bias]) : 0.0f;
    // A product with nothing would not be 0 where the input is not finite.
    const float total = group < 0 ? 0.0f : sums.at(0, weight_row) + bias;
    static_cast<T*>(a_.output)[int64_t{entry} * outputs_ + column] = from_float<T>(total);
  }

 private:
  // -1: none.
  __device__ int group_of(int entry) const {
    const float chosen = a_.chosen[entry];
    return chosen >= 0.0f && chosen < static_cast<float>(a_.groups) ? static_cast<int>(chosen) : -1;
  }
  // The first one of a tile, of the entry's weight.
  __device__ int row_of(int tile, int entry) const {
    return (tile - entry * static_cast<int>(entry_tiles_)) * kTileRows;
  }

  const StepGroupedArgs& a_;
  const ProductSplit& split_;
  const int size_, outputs_;
  const unsigned entry_tiles_;
  const int begin_, end_;  // the tiles of this block
};

template <typename Product>
__global__ void __launch_bounds__(kProductThreads, Product::kResidentBlocks)
    step_grouped_kernel(const StepGroupedArgs a, const ProductSplit split) {
  wait_for_previous_launch();
  allow_next_launch();
  StepGrouped<Product> work(a, split);
  multiply<Product>(split, static_cast<int>(a.in_size), work);
}

}  // namespace

cudaError_t step_grouped_cuda(const StepGroupedArgs& a, cudaStream_t stream) {
  if (a.in_size < 1 || a.in_size > kMaxProductSize) return cudaErrorInvalidValue;
  const int64_t row_tiles = a.each * divide_up(a.out_size, kTileRows), tiles = a.rows * row_tiles;
  if (tiles == 0) return cudaSuccess;
  if (tiles > INT32_MAX) return cudaErrorInvalidValue;
  return dispatch_product<1>(
      a.dtype, a.in_size, 1,
      [&](auto product) {
        using Product = decltype(product);
        DeviceLimits limits = {};
        if (const cudaError_t error = device_limits(limits); error != cudaSuccess) return error;
        ProductSplit split(row_tiles, 2 * limits.multiprocessors, divide_up(a.in_size, Product::kChunk), 1);
        split.share(tiles, 2 * limits.multiprocessors);
        return launch(step_grouped_kernel<Product>,
                      overlapping(split.blocks, kProductThreads, Product::kSharedBytes), stream, a, split);
      },
      a.input, a.weight);
}

}  // namespace cerberus
