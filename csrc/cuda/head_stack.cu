// head_stack: x[k,l] = x[k,l-1] + silu(W[l,k] @ concat(x[k,l-1], n[k,l]) + b[l,k]), n = anchor or x[k-1,l-1].
//
// One launch for all layers and heads, of as many blocks as the device holds at once. In each layer a block
// computes the same rows of the K * D (skinny.cuh has the product), and a barrier of the whole grid separates
// the layers: a state is read by blocks that did not write it. Weights do not depend on states, so that every
// warp's first weights of the next layer are on their way while it waits at the barrier. The two operands
// are the two parts of the product's columns and are read where they lie, never concatenated.
#include "args.h"
#include "copy.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "skinny.cuh"

namespace cerberus {
namespace {

// What multiply() asks of its work.
template <typename Product>
class HeadStack {
 public:
  using T = typename Product::Element;

  // The groups of rows of X come one right after the other, while the weights are in the L2 cache.
  struct Place {
    int layer, tile, group;
  };

  __device__ HeadStack(const HeadStackArgs& a, const ProductSplit& split)
      : a_(a),
        split_(split),
        size_(static_cast<int>(a.size)),
        head_tiles_(static_cast<unsigned>(size_ + kTileRows - 1) / kTileRows),
        begin_(split.first_tile(blockIdx.x)),
        end_(split.first_tile(blockIdx.x + 1)) {}

  __device__ void begin() const {}
  __device__ Place first() const { return {0, begin_, 0}; }
  __device__ bool is_over(const Place& place) const { return place.layer == a_.layers; }
  __device__ Place after(const Place& place) const {
    if ((place.group + 1) * int64_t{Product::kRows} < a_.rows)
      return {place.layer, place.tile, place.group + 1};
    if (place.tile + split_.round_tiles() < end_) return {place.layer, place.tile + split_.round_tiles(), 0};
    return {place.layer + 1, begin_, 0};
  }

  __device__ WeightRows<T> weights(const Place& place, int tile, int part) const {
    const T* const all = static_cast<const T*>(a_.weight);
    if (is_over(place) || tile >= end_) return {all, 0, false};
    const Output output = output_of(tile, 0);
    if (lane_index() == 0) prefetch_l2(bias_of(place.layer, output));  // it comes from memory, like these
    // Past the last row the last one is read again, and its sum dropped.
    const int row = min(output.column + lane_index() / 4, size_ - 1);
    const int64_t columns = static_cast<int64_t>(size_) << split_.log_parts;
    return {all + ((place.layer * a_.heads + output.head) * size_ + row) * columns + part * size_,
            min(8, size_ - 1 - row) * static_cast<int>(columns), true};
  }

  __device__ XRows<T> x(const Place& place, int tile, int part) {
    const Output mine = output_of_thread(place);
    if (mine.exists) bias_ = *bias_of(place.layer, mine);  // finish() wants it
    const Output output = output_of(tile, 0);
    const int rows = output.exists ? group_rows(place) : 0;
    if (part == 1 && (output.head == 0 || place.layer == 0))
      return {static_cast<const T*>(a_.anchor) + first_row(place) * size_, size_, rows};
    return {states_below(place, output.head - part), row_stride_below(place), rows};
  }

  // A thread finishes one output for some of the rows: consecutive threads write consecutive states.
  __device__ void finish(const Place& place, const RoundSums<Product>& sums) const {
    const Output output = output_of_thread(place);
    if (output.exists) {
      const T* const below = states_below(place, output.head) + output.column;
      const int64_t row_size = a_.heads * size_;
      T* const states =
          states_of(place.layer) + first_row(place) * row_size + output.head * size_ + output.column;
      const int weight_row = threadIdx.x & (split_.round_rows() - 1);
#pragma unroll 1
      for (int row = threadIdx.x >> split_.log_round_rows(); row < group_rows(place);
           row += kProductThreads >> split_.log_round_rows()) {
        const float total = sums.at(row, weight_row) + to_float(bias_);
        const float state = to_float(below[static_cast<int64_t>(row) * row_stride_below(place)]);
        states[row * row_size] = from_float<T>(state + total / (1.0f + expf(-total)));
      }
    }
    const Place next = after(place);
    if (next.layer != place.layer && !is_over(next)) grid_barrier();
  }

 private:
  // One of the K * D: row `column` of the weight of a head.
  struct Output {
    int head, column;
    bool exists;
  };

  __device__ Output output_of(int tile, int row) const {
    const int head = static_cast<unsigned>(tile) / head_tiles_;
    const int column = (tile - head * static_cast<int>(head_tiles_)) * kTileRows + row;
    return {head, column, tile < end_ && column < size_};
  }
  // That this thread finishes.
  __device__ Output output_of_thread(const Place& place) const {
    const int weight_row = threadIdx.x & (split_.round_rows() - 1);
    return output_of(place.tile + weight_row / kTileRows, weight_row % kTileRows);
  }
  __device__ const T* bias_of(int layer, const Output& output) const {
    return static_cast<const T*>(a_.bias) + (layer * a_.heads + output.head) * size_ + output.column;
  }

  __device__ static int64_t first_row(const Place& place) { return int64_t{place.group} * Product::kRows; }
  __device__ int group_rows(const Place& place) const {
    const int64_t rows = a_.rows - first_row(place);
    return rows < Product::kRows ? static_cast<int>(rows) : Product::kRows;
  }

  // Two buffers are enough: when a layer is written, no block reads the layer two below it any more.
  __device__ T* states_of(int layer) const {
    return layer + 1 == a_.layers ? static_cast<T*>(a_.states)
                                  : static_cast<T*>(a_.scratch) + layer % 2 * a_.rows * a_.heads * size_;
  }
  // What a head starts from in this layer, for the first row of the group: all from the hidden state in the
  // first layer.
  __device__ const T* states_below(const Place& place, int head) const {
    if (place.layer == 0) return static_cast<const T*>(a_.hidden) + first_row(place) * size_;
    return states_of(place.layer - 1) + (first_row(place) * a_.heads + head) * size_;
  }
  __device__ int row_stride_below(const Place& place) const {
    return place.layer == 0 ? size_ : static_cast<int>(a_.heads) * size_;
  }

  const HeadStackArgs& a_;
  const ProductSplit& split_;
  const int size_;
  const unsigned head_tiles_;
  const int begin_, end_;  // the tiles of this block
  T bias_ = {};
};

template <typename Product>
__global__ void __launch_bounds__(kProductThreads, Product::kResidentBlocks)
    head_stack_kernel(const HeadStackArgs a, const ProductSplit split) {
  allow_next_launch();
  HeadStack<Product> work(a, split);
  multiply<Product>(split, static_cast<int>(a.size), work);
}

}  // namespace

cudaError_t head_stack_cuda(const HeadStackArgs& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  return dispatch_product(
      a.dtype, a.size, a.rows,
      [&](auto product) {
        using Product = decltype(product);
        const auto kernel = head_stack_kernel<Product>;
        DeviceLimits limits = {};
        cudaError_t error = device_limits(limits);
        if (error != cudaSuccess) return error;
        const int64_t tiles = a.heads * divide_up(a.size, kTileRows);
        ProductSplit split(tiles, 2 * limits.multiprocessors, divide_up(a.size, Product::kChunk),
                           a.chained ? 2 : 1);
        const bool cooperative = a.layers > 1;  // one layer has no barrier
        if (cooperative) {
          int64_t resident = 0;
          error = resident_blocks(kernel, kProductThreads, Product::kSharedBytes, resident);
          if (error != cudaSuccess) return error;
          if (resident == 0) return cudaErrorLaunchOutOfResources;
          if (resident < split.blocks) split.share(tiles, resident);
        }
        return launch(kernel, {split.blocks, kProductThreads, Product::kSharedBytes, cooperative}, stream, a,
                      split);
      },
      a.hidden, a.anchor, a.weight, a.scratch, a.states);
}

}  // namespace cerberus
