// head_stack: x[k,l] = x[k,l-1] + silu(W[l,k] @ concat(x[k,l-1], n[k,l]) + b[l,k]), n = anchor or x[k-1,l-1].
//
// The weights are read once and are nearly all of the traffic. One launch per layer computes all heads: a
// warp owns one output row of one head, streams its weights and multiplies them with up to kRows batch rows
// at a time. The two operands are read where they lie, never concatenated. The end of a launch is the barrier
// between two layers.
#include "args.h"
#include "copy.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace cerberus {
namespace {

constexpr int kThreads = 128;  // small blocks spread the K * D output rows evenly over the multiprocessors
constexpr int kWarps = kThreads / kLanes;

// One layer: where it reads the states below and where it writes its own.
struct Layer {
  const void* below;    // (B, K, D), or the hidden state (B, D) that all heads start from
  int64_t row_stride;   // of `below`, in elements
  int64_t head_stride;  // of `below`: 0 where all heads share one state
  const void* weight;   // (K, D, 2 D or D)
  const void* bias;     // (K, D)
  void* states;         // (B, K, D)
  bool first;
};

// sum[r] += weights . vector of row r, for the part of the columns that is this lane's.
template <typename T, int kVector, int kRows>
__device__ inline void accumulate(const T* weights, const T* vectors, int64_t row_stride, int64_t size,
                                  int rows, float (&sum)[kRows]) {
#pragma unroll 4
  for (int64_t column = lane_index() * kVector; column < size; column += kLanes * kVector) {
    float weight[kVector];
    load_once<kVector>(weights + column).unpack(weight);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // Past the last row the last one is read again, and its result dropped.
      float x[kVector];
      load<kVector>(vectors + (r < rows ? r : rows - 1) * row_stride + column).unpack(x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[r] += weight[i] * x[i];
    }
  }
}

template <typename T, int kVector, int kRows>
__global__ void __launch_bounds__(kThreads, 1) head_stack_kernel(const HeadStackArgs a, const Layer layer) {
  const int64_t output =
      static_cast<int64_t>(blockIdx.x) * kWarps + warp_index();  // head * D + row of its weight
  if (output >= a.heads * a.size) return;
  const int64_t head = output / a.size, place = output % a.size;
  const int64_t columns = a.chained ? 2 * a.size : a.size;
  const T* weights = static_cast<const T*>(layer.weight) + output * columns;
  const float bias = to_float(static_cast<const T*>(layer.bias)[output]);

  const T* below = static_cast<const T*>(layer.below) + head * layer.head_stride;
  const bool anchored = head == 0 || layer.first;
  const T* neighbour = anchored ? static_cast<const T*>(a.anchor) : below - layer.head_stride;
  const int64_t neighbour_stride = anchored ? a.size : layer.row_stride;

  for (int64_t row = 0; row < a.rows; row += kRows) {
    const int rows = static_cast<int>(a.rows - row < kRows ? a.rows - row : kRows);
    float sum[kRows] = {};
    accumulate<T, kVector>(weights, below + row * layer.row_stride, layer.row_stride, a.size, rows, sum);
    if (a.chained) {
      accumulate<T, kVector>(weights + a.size, neighbour + row * neighbour_stride, neighbour_stride, a.size,
                             rows, sum);
    }
    const float total = warp_sums(sum) + bias;  // lane r: of row r
    if (lane_index() < rows) {
      const float state = to_float(below[(row + lane_index()) * layer.row_stride + place]);
      static_cast<T*>(layer.states)[(row + lane_index()) * a.heads * a.size + output] =
          from_float<T>(state + total / (1.0f + expf(-total)));
    }
  }
}

template <typename T, int kVector, int kRows>
cudaError_t launch_layers(const HeadStackArgs& a, cudaStream_t stream) {
  const int64_t outputs = a.heads * a.size, columns = a.chained ? 2 * a.size : a.size;
  T* const scratch = static_cast<T*>(a.scratch);
  Layer layer = {a.hidden, a.size, 0, a.weight, a.bias, nullptr, true};
  for (int64_t l = 0; l < a.layers; ++l) {
    layer.states = l + 1 == a.layers ? a.states : scratch + (l % 2) * a.rows * outputs;
    const cudaError_t error = launch(head_stack_kernel<T, kVector, kRows>,
                                     {divide_up(outputs, kWarps), kThreads}, stream, a, layer);
    if (error != cudaSuccess) return error;
    layer.below = layer.states;
    layer.row_stride = outputs;
    layer.head_stride = a.size;
    layer.weight = static_cast<const T*>(layer.weight) + outputs * columns;
    layer.bias = static_cast<const T*>(layer.bias) + outputs;
    layer.first = false;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t head_stack_cuda(const HeadStackArgs& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  return dispatch_vector(
      a.dtype, a.size,
      [&](auto element, auto vector) {
        using T = decltype(element);
        // Odd sizes have one kernel for any number of rows.
        if constexpr (vector() > 1) {
          if (a.rows == 1) return launch_layers<T, vector(), 1>(a, stream);
        }
        return launch_layers<T, vector(), 4>(a, stream);
      },
      a.hidden, a.anchor, a.weight, a.scratch, a.states);
}

}  // namespace cerberus
