// step_product: products of one input with several weights in one launch; skinny.cuh has the product.
//
// The tiles of the parts are counted one after the other. How the columns are split depends on how many tiles
// the call names and on the device, not on the rows: where the parts of a product are of several kinds, each
// kind is a launch, and all have the bits of one.
#include "copy.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "skinny.cuh"
#include "skinny_blocks.cuh"
#include "step_kernels.h"

namespace cerberus {
namespace {

// A part of the call, found by one of its tiles.
struct Found {
  const void *weight, *bias;
  int out_size, row;  // row: the tile's first one of the weight
  int64_t first;
};

// Constant indexes only: what is indexed by a variable would be copied to local memory.
__device__ inline Found part_of(const StepProductArgs& a, int tile) {
  Found found = {};
  int begin = 0;
#pragma unroll
  for (int i = 0; i < kMaxProductParts; ++i) {
    if (i >= a.count) break;
    const ProductPart& part = a.parts[i];
    if (tile >= begin)
      found = {part.weight, part.bias, static_cast<int>(part.out_size), (tile - begin) * kTileRows,
               part.first};
    begin += (static_cast<int>(part.out_size) + kTileRows - 1) / kTileRows;
  }
  return found;
}

// What multiply() asks of its work.
template <typename Product>
class StepProduct {
 public:
  using T = typename Product::Element;

  // The groups of rows of the input come one right after the other, while the weights are in the L2 cache.
  struct Place {
    int tile, group;
  };

  __device__ StepProduct(const StepProductArgs& a, const ProductSplit& split)
      : a_(a),
        split_(split),
        size_(static_cast<int>(a.in_size)),
        begin_(split.first_tile(blockIdx.x)),
        end_(split.first_tile(blockIdx.x + 1)) {}

  // The input is of the launch before. The weights are of nobody's: whoever has written them has ended before
  // the first launch of the step went on, which reads tokens alone.
  __device__ void begin() const { wait_for_previous_launch(); }
  __device__ Place first() const { return {begin_, 0}; }
  __device__ bool is_over(const Place& place) const { return place.tile >= end_; }
  __device__ Place after(const Place& place) const {
    if ((place.group + 1) * int64_t{Product::kRows} < a_.rows) return {place.tile, place.group + 1};
    return {place.tile + split_.round_tiles(), 0};
  }

  __device__ auto weights(const Place& place, int tile, int) const {
    const bool exist = !is_over(place) && tile < end_;
    const Found part = part_of(a_, exist ? tile : 0);
    if constexpr (Product::kInBlocks) {
      const int64_t chunks = static_cast<int64_t>(part.row / kTileRows) * (size_ / Product::kChunk);
      return WeightBlocks{
          static_cast<const char*>(part.weight) + (exist ? chunks * Product::Format::kChunk.bytes : 0),
          exist};
    } else {
      // Past the last row the last one is read again, and its sum dropped.
      const int last = part.out_size - 1, row = exist ? min(part.row + lane_index() / 4, last) : 0;
      return WeightRows<T>{static_cast<const T*>(part.weight) + static_cast<int64_t>(row) * size_,
                           exist ? min(8, last - row) * size_ : 0, exist};
    }
  }
  __device__ XRows<T> x(const Place& place, int tile, int) const {
    return {static_cast<const T*>(a_.input) + first_row(place) * size_, size_,
            tile < end_ ? group_rows(place) : 0};
  }

  // A thread finishes one output for some of the rows: consecutive threads write consecutive outputs.
  __device__ void finish(const Place& place, const RoundSums<Product>& sums) const {
    const int weight_row = threadIdx.x & (split_.round_rows() - 1);
    const int tile = place.tile + weight_row / kTileRows;
    if (tile >= end_) return;
    const Found part = part_of(a_, tile);
    const int column = part.row + weight_row % kTileRows;
    if (column >= part.out_size) return;
    const float bias = part.bias ? to_float(static_cast<const T*>(part.bias)[column]) : 0.0f;
    T* const outputs = static_cast<T*>(a_.output) + first_row(place) * a_.out_width + part.first + column;
#pragma unroll 1
    for (int row = threadIdx.x >> split_.log_round_rows(); row < group_rows(place);
         row += kProductThreads >> split_.log_round_rows())
      outputs[row * a_.out_width] = from_float<T>(sums.at(row, weight_row) + bias);
  }

 private:
  __device__ static int64_t first_row(const Place& place) { return int64_t{place.group} * Product::kRows; }
  __device__ int group_rows(const Place& place) const {
    const int64_t rows = a_.rows - first_row(place);
    return rows < Product::kRows ? static_cast<int>(rows) : Product::kRows;
  }

  const StepProductArgs& a_;
  const ProductSplit& split_;
  const int size_;
  const int begin_, end_;  // the tiles of this block
};

template <typename Product>
__global__ void __launch_bounds__(kProductThreads, Product::kResidentBlocks)
    step_product_kernel(const StepProductArgs a, const ProductSplit split) {
  allow_next_launch();
  StepProduct<Product> work(a, split);
  multiply<Product>(split, static_cast<int>(a.in_size), work);
}

}  // namespace

cudaError_t step_product_cuda(const StepProductArgs& a, cudaStream_t stream) {
  if (a.count < 1 || a.count > kMaxProductParts || a.in_size < 1 || a.in_size > kMaxProductSize)
    return cudaErrorInvalidValue;
  uintptr_t weights = 0;  // aligned where all of them are
  int64_t tiles = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    weights |= reinterpret_cast<uintptr_t>(a.parts[i].weight);
    tiles += product_tiles(a.parts[i].out_size);
  }
  if (a.rows == 0 || tiles == 0) return cudaSuccess;
  const auto run = [&](auto product) {
    using Product = decltype(product);
    DeviceLimits limits = {};
    if (const cudaError_t error = device_limits(limits); error != cudaSuccess) return error;
    ProductSplit split(a.tiles, 2 * limits.multiprocessors, divide_up(a.in_size, Product::kChunk), 1);
    split.share(tiles, 2 * limits.multiprocessors);
    return launch(step_product_kernel<Product>,
                  overlapping(split.blocks, kProductThreads, Product::kSharedBytes), stream, a, split);
  };
  const void* const all = reinterpret_cast<const void*>(weights);
  if (a.packing == Packing::kNone) return dispatch_product(a.dtype, a.in_size, a.rows, run, a.input, all);
  const bool fits = a.dtype == DType::kBFloat16 && a.in_size % kBlockColumns == 0;
  if (!fits || !is_aligned16(a.input) || !is_aligned16(all)) return cudaErrorInvalidValue;
  return dispatch_blocks(a.packing, a.rows, run);
}

}  // namespace cerberus
