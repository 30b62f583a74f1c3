// tree_attention: softmax(scale q k) v, where node i sees the committed slots and the slots of its ancestors.
//
// The query rows of one kv head are the N nodes times the group of query heads that share it. A block owns
// kTile of them and walks the visible slots kKeys at a time, keys and values passing through shared memory
// once for all its rows (flash attention: running maximum, running sum, rescaled accumulator). In the first
// half of a step lane l owns key l and computes its scores; in the second half it owns the columns l, l + 32,
// ... of the output. The mask costs nothing on committed slots; a node's slot costs one bit of the query's
// ancestors.
#include "args.h"
#include "copy.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace cerberus {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kLanes;
constexpr int kKeys = kLanes;  // slots in shared memory at a time: a lane owns one of them

// The shape of a block. kColumns: output columns of a lane, the head size is at most 32 times that. kRows:
// query rows of a warp; fewer for the largest heads, so that the accumulators fit in registers and the tile
// in 48 KB.
template <int kColumns>
struct Tile {
  static constexpr int kSize = kColumns * kLanes;
  static constexpr int kRows = kColumns > 4 ? 2 : 4;
  static constexpr int kTile = kWarps * kRows;

  float query[kTile][kSize];  // scaled
  float slot[kKeys][kSize +
                    1];  // keys, then values; one more column, so that the lanes' keys lie in different banks
  int node[kTile];       // of a query row
  int depth[kTile];
};

// How many nodes are on the path to `node`, itself excluded.
__device__ inline int64_t node_depth(const TreeAttentionArgs& a, int64_t node) {
  int64_t depth = -1;
#pragma unroll 1
  for (int64_t w = 0; w < a.words; ++w)
    depth += count_bits(static_cast<uint64_t>(a.ancestors[node * a.words + w]));
  return depth;
}

// Bit r: the query row at nodes[r] and depths[r] sees `slot`, a committed one or an ancestor, and in the
// window.
template <int kRows>
__device__ inline uint32_t visible_rows(const TreeAttentionArgs& a, const int* nodes, const int* depths,
                                        int64_t slot, int64_t length) {
  const int64_t node = slot - length;  // negative: committed
  if (node < 0 && a.window <= 0) return (1u << kRows) - 1;
  const int64_t depth =
      node < 0 || a.window <= 0 ? node : node_depth(a, node);  // counted from the root's position
  uint32_t visible = 0;
#pragma unroll 1
  for (int r = 0; r < kRows; ++r) {
    bool sees = a.window <= 0 || depth > depths[r] - a.window;
    if (node >= 0) sees &= a.ancestors[nodes[r] * a.words + node / 64] >> (node % 64) & 1;
    visible |= static_cast<uint32_t>(sees) << r;
  }
  return visible;
}

// `count` slots, which lie one after the other, into shared memory.
template <int kVector, typename T, int kStride>
__device__ inline void load_slots(const T* slots, int count, int head_size, float (&to)[kKeys][kStride]) {
  for (int i = threadIdx.x * kVector; i < count * head_size; i += kThreads * kVector) {
    float x[kVector];
    load<kVector>(slots + i).unpack(x);
    const int slot = i / head_size, column = i % head_size;  // a pack never spans two slots
#pragma unroll
    for (int j = 0; j < kVector; ++j) to[slot][column + j] = x[j];
  }
}

template <typename T, int kVector, int kColumns>
__global__ void __launch_bounds__(kThreads, 1) tree_attention_kernel(const TreeAttentionArgs a) {
  using Shape = Tile<kColumns>;
  constexpr int kRows = Shape::kRows;
  __shared__ Shape tile;

  const int group = static_cast<int>(a.query_heads / a.kv_heads),
            query_rows = static_cast<int>(a.nodes) * group;
  const unsigned tiles = (query_rows + Shape::kTile - 1) / Shape::kTile;
  const int first_row = blockIdx.x % tiles * Shape::kTile;
  const int64_t head = blockIdx.x / tiles % a.kv_heads, batch = blockIdx.x / tiles / a.kv_heads;
  const int head_size = static_cast<int>(a.head_size);
  const int lane = lane_index();

  // Where query row m of the tile lies, for q and for the output alike.
  const auto offset_of = [&](int m) {
    const int row = first_row + m;
    return ((batch * a.nodes + row / group) * a.query_heads + head * group + row % group) * a.head_size;
  };
  const int rows_here = query_rows - first_row < Shape::kTile ? query_rows - first_row : Shape::kTile;

  // exp2 is the cheaper exponential, so the scale includes log2 e.
  const float scale = a.scale * 1.44269504f;
  for (int i = threadIdx.x; i < Shape::kTile * head_size; i += kThreads) {
    const int m = i / head_size, column = i % head_size;
    tile.query[m][column] =
        m < rows_here ? scale * to_float(static_cast<const T*>(a.query)[offset_of(m) + column]) : 0.0f;
  }
  if (threadIdx.x < Shape::kTile) {
    // Rows past the end are computed like the last one and not written.
    const int m = static_cast<int>(threadIdx.x) < rows_here ? static_cast<int>(threadIdx.x) : rows_here - 1;
    tile.node[threadIdx.x] = (first_row + m) / group;
    tile.depth[threadIdx.x] = static_cast<int>(node_depth(a, (first_row + m) / group));
  }
  __syncthreads();

  float max[kRows], sum[kRows], output[kRows][kColumns];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    max[r] = -INFINITY;
    sum[r] = 0.0f;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) output[r][c] = 0.0f;
  }

  const int64_t length = a.length[batch];
  const int64_t end = length + a.nodes < a.capacity ? length + a.nodes : a.capacity;
  // The root sees furthest back.
  const int64_t begin = a.window > 0 && length >= a.window ? length - a.window + 1 : 0;
  const int64_t first_slot = (batch * a.kv_heads + head) * a.capacity;
  const int first_of_warp = warp_index() * kRows;

  for (int64_t start = begin; start < end; start += kKeys) {
    const int count = static_cast<int>(end - start < kKeys ? end - start : kKeys);
    const int64_t from = (first_slot + start) * a.head_size;
    load_slots<kVector>(static_cast<const T*>(a.keys) + from, count, head_size, tile.slot);
    __syncthreads();

    float weight[kRows] = {};  // first the score
#pragma unroll 4
    for (int column = 0; column < head_size; ++column) {
      const float key = tile.slot[lane][column];
#pragma unroll
      for (int r = 0; r < kRows; ++r) weight[r] += tile.query[first_of_warp + r][column] * key;
    }
    uint32_t seen = 0;
    if (lane < count) {
      seen =
          visible_rows<kRows>(a, tile.node + first_of_warp, tile.depth + first_of_warp, start + lane, length);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool visible = seen >> r & 1;
      const float score = visible ? weight[r] : -INFINITY;
      const float new_max = fmaxf(max[r], warp_reduce(score, Max{}));
      // Until the row has seen a slot the maximum is -inf, and -inf - -inf is not a number.
      const float rescale = new_max == -INFINITY ? 1.0f : exp2f(max[r] - new_max);
      weight[r] = visible ? exp2f(score - new_max) : 0.0f;
      max[r] = new_max;
      sum[r] = sum[r] * rescale + weight[r];  // of this lane's keys
#pragma unroll
      for (int c = 0; c < kColumns; ++c) output[r][c] *= rescale;
    }
    __syncthreads();  // all have read the keys

    load_slots<kVector>(static_cast<const T*>(a.values) + from, count, head_size, tile.slot);
    __syncthreads();
    for (int key = 0; key < count; ++key) {
      float of_key[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) of_key[r] = shuffle(weight[r], key);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float value =
            tile.slot[key][lane + c * kLanes];  // past the head size: anything, and not written
#pragma unroll
        for (int r = 0; r < kRows; ++r) output[r][c] += of_key[r] * value;
      }
    }
    __syncthreads();  // all have read the values
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float total = warp_reduce(sum[r], Sum{});
    if (first_of_warp + r >= rows_here) continue;
    T* to = static_cast<T*>(a.output) + offset_of(first_of_warp + r);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = lane + c * kLanes;
      // A row that sees nothing, because its own slot lies outside of the cache, gives 0.
      if (column < head_size) to[column] = from_float<T>(total == 0.0f ? 0.0f : output[r][c] / total);
    }
  }
}

template <typename T, int kVector, int kColumns>
cudaError_t launch_tiles(const TreeAttentionArgs& a, cudaStream_t stream) {
  const int64_t tiles = divide_up(a.nodes * (a.query_heads / a.kv_heads), Tile<kColumns>::kTile);
  return launch(tree_attention_kernel<T, kVector, kColumns>, {a.rows * a.kv_heads * tiles, kThreads}, stream,
                a);
}

}  // namespace

cudaError_t tree_attention_cuda(const TreeAttentionArgs& a, cudaStream_t stream) {
  if (a.head_size > kMaxHeadSize) return cudaErrorInvalidValue;
  if (a.nodes * a.query_heads > INT32_MAX) return cudaErrorInvalidValue;
  if (a.rows == 0 || a.nodes == 0 || a.query_heads == 0 || a.head_size == 0) return cudaSuccess;
  return dispatch_vector(
      a.dtype, a.head_size,
      [&](auto element, auto vector) {
        using T = decltype(element);
        // Odd head sizes have one kernel for all of them.
        if constexpr (vector() > 1) {
          if (a.head_size <= 2 * kLanes) return launch_tiles<T, vector(), 2>(a, stream);
          if (a.head_size <= 4 * kLanes) return launch_tiles<T, vector(), 4>(a, stream);
        }
        return launch_tiles<T, vector(), 8>(a, stream);
      },
      a.keys, a.values);
}

}  // namespace cerberus
