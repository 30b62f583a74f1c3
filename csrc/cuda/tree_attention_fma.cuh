// tree_attention without tensor cores: of float32, and of what tensor cores cannot read, odd head sizes and
// tensors at odd addresses.
//
// A block walks its positions kKeys at a time, keys and values passing through shared memory once for all its
// rows, where they lie in the same slots for all, or else once for each of its nodes (flash attention:
// running maximum, running sum, rescaled accumulator). In the first half of a step lane l owns position l of
// the tile and computes its scores; in the second half it owns the columns l, l + 32, ... of the output. A
// warp owns kRows query rows.
#pragma once

#include "copy.cuh"
#include "kernels.h"
#include "tree_attention.cuh"

namespace cerberus {

constexpr int kFmaThreads = 128;
constexpr int kFmaWarps = kFmaThreads / kLanes;
constexpr int kFmaKeys = kLanes;  // slots in shared memory at a time: a lane owns one of them
constexpr int kFmaBlocks = 4;     // of a multiprocessor: what its memory's latency takes to hide

// The shape of a block. kColumns: output columns of a lane, the head size is at most 32 times that. kRows:
// query rows of a warp; fewer for the largest heads, so that the accumulators fit in registers and the tile
// in 48 KB.
template <int kColumns>
struct FmaTile {
  static constexpr int kSize = kColumns * kLanes;
  static constexpr int kRows = kColumns > 4 ? 2 : 4;
  static constexpr int kTile = kFmaWarps * kRows;

  float query[kTile][kSize];  // times query_sign
  // Keys, then values. One more column, so that the lanes' keys lie in different banks.
  float slot[kFmaKeys][kSize + 1];
};

// Keys or values of `count` positions into shared memory. slot(j): where position j lies.
template <int kVector, typename T, int kStride, typename Slot>
__device__ inline void load_slots(const T* head, int count, int head_size, const Slot& slot,
                                  float (&to)[kFmaKeys][kStride]) {
  for (int i = threadIdx.x * kVector; i < count * head_size; i += kFmaThreads * kVector) {
    const int j = i / head_size, column = i % head_size;  // a pack never spans two slots
    float x[kVector];
    load<kVector>(head + static_cast<int64_t>(slot(j)) * head_size + column).unpack(x);
#pragma unroll
    for (int k = 0; k < kVector; ++k) to[j][column + k] = x[k];
  }
}

template <typename T, int kVector, int kColumns>
__global__ void __launch_bounds__(kFmaThreads, kFmaBlocks)
    tree_attention_fma_kernel(const TreeAttentionArgs a) {
  using Shape = FmaTile<kColumns>;
  constexpr int kRows = Shape::kRows;
  __shared__ Shape tile;
  __shared__ Span spans[Shape::kTile];
  wait_for_previous_launch();
  allow_next_launch();

  const Piece piece = piece_of_block<kFmaThreads, kFmaKeys>(a, spans);
  const int head_size = static_cast<int>(a.head_size), lane = lane_index();
  const int first_of_warp = warp_index() * kRows;

  const float scale = score_scale(a), sign = query_sign(a);
  for (int m = warp_index(); m < Shape::kTile; m += kFmaWarps) {
    for (int column = lane; column < head_size; column += kLanes) {
      tile.query[m][column] =
          m < piece.rows
              ? sign * to_float(static_cast<const T*>(a.query)[piece.query_row(a, m) * head_size + column])
              : 0.0f;
    }
  }

  float max[kRows], sum[kRows], output[kRows][kColumns];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    max[r] = -INFINITY;
    sum[r] = 0.0f;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) output[r][c] = 0.0f;
  }

  const int64_t first_element = piece.element(a, 0);
  const T* const keys = static_cast<const T*>(a.keys) + first_element;
  const T* const values = static_cast<const T*>(a.values) + first_element;
  // What a step takes: a tile, for all rows where it is straight, else for the rows of one node.
  const int first_node = piece.node(0), last_node = piece.node(piece.rows - 1);
  int step = piece.tile, node = first_node;
#pragma unroll 1
  while (step < piece.end_tile) {
    // From the tile's first position on, also where the window begins inside of it: which lane owns a
    // position decides the order of the sums.
    const int start = step * kFmaKeys;
    const bool straight = step < piece.straight_tiles;
    const int end = straight ? piece.end : spans[piece.row_of(node)].high;
    const int count = end > start ? min(kFmaKeys, end - start) : 0;
    const bool masked = !straight || count < kFmaKeys || !piece.all_visible(a, start, count);
    const auto slot = [&](int j) { return straight ? start + j : slot_of(a, piece.length, node, start + j); };
    __syncthreads();  // all have read the values before these
    load_slots<kVector>(keys, count, head_size, slot, tile.slot);
    __syncthreads();

    float weight[kRows] = {};  // first the product
#pragma unroll 4
    for (int column = 0; column < head_size; ++column) {
      const float key = tile.slot[lane][column];
#pragma unroll
      for (int r = 0; r < kRows; ++r) weight[r] += tile.query[first_of_warp + r][column] * key;
    }
    if (a.softcap > 0.0f) {
      const SoftCap capped(a);
#pragma unroll
      for (int r = 0; r < kRows; ++r) weight[r] = capped(weight[r]);
    }
    uint32_t seen = ~0u;  // bit r: row r sees this lane's slot
    if (masked) {
      seen = 0;
#pragma unroll 1
      for (int r = 0; r < kRows; ++r) {
        const int m = first_of_warp + r;
        const uint64_t visible = straight || piece.is_of(node, m) ? piece.visible(m, start) : 0;
        seen |= static_cast<uint32_t>(visible >> lane & 1) << r;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool visible = seen >> r & 1;
      const float top = warp_reduce(visible ? weight[r] : -INFINITY, Max{});
      const float new_max = fmaxf(max[r], scale * top);
      // Until the row has seen a slot the maximum is -inf, and -inf - -inf is not a number.
      const float rescale = new_max == -INFINITY ? 1.0f : exp2f(max[r] - new_max);
      weight[r] = visible ? exp2f(fmaf(weight[r], scale, -new_max)) : 0.0f;
      max[r] = new_max;
      sum[r] = sum[r] * rescale + weight[r];  // of this lane's keys
#pragma unroll
      for (int c = 0; c < kColumns; ++c) output[r][c] *= rescale;
    }
    __syncthreads();  // all have read the keys

    load_slots<kVector>(values, count, head_size, slot, tile.slot);
    __syncthreads();
    for (int key = 0; key < count; ++key) {
      float of_key[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) of_key[r] = shuffle(weight[r], key);
      const uint32_t rows = masked ? shuffle(seen, key) : ~0u;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float value =
            tile.slot[key][lane + c * kLanes];  // past the head size: anything, and not written
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          // A weight of 0 does not take away what is not a number.
          if (rows >> r & 1) output[r][c] += of_key[r] * value;
        }
      }
    }
    const bool is_last = straight || node == last_node;
    step += is_last;
    node = is_last ? first_node : node + 1;
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float total = warp_reduce(sum[r], Sum{});
    const int m = first_of_warp + r;
    if (m >= piece.rows) continue;
    const int64_t row = piece.query_row(a, m);
    const float share = share_of<T>(a, piece.query_head(m), max[r], total);
    if (a.splits > 1 && lane == 0) write_part(a, row, piece.split, max[r], total);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = lane + c * kLanes;
      if (column >= head_size) continue;
      if (a.splits > 1) {
        a.part_output[(row * a.splits + piece.split) * head_size + column] = output[r][c];
      } else {
        static_cast<T*>(a.output)[row * head_size + column] = from_float<T>(share * output[r][c]);
      }
    }
  }
}

// f(T{}, integral_constant<int, kVector>, integral_constant<int, kColumns>) for such a call. What is rare, 16
// bits a number and odd head sizes, has one kernel for all head sizes.
template <typename F>
cudaError_t with_fma_shape(const TreeAttentionArgs& a, F&& f) {
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, 4> kFour;
  return dispatch_dtype(a.dtype, [&](auto element) {
    if constexpr (std::is_same_v<decltype(element), float>) {
      if (a.head_size % 4 == 0 && is_aligned16(a.keys) && is_aligned16(a.values)) {
        if (a.head_size <= 2 * kLanes) return f(element, kFour, std::integral_constant<int, 2>{});
        if (a.head_size <= 4 * kLanes) return f(element, kFour, std::integral_constant<int, 4>{});
        return f(element, kFour, std::integral_constant<int, 8>{});
      }
    }
    return f(element, kOne, std::integral_constant<int, 8>{});
  });
}

}  // namespace cerberus
