// tree_attention of bf16 and fp16 on tensor cores: the kernel, and which shape of blocks a call takes.
// tree_attention_mma_block.cuh says how a block computes.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tree_attention.cuh"
#include "tree_attention_mma_block.cuh"
#include "tree_attention_mma_tail.cuh"

namespace cerberus {

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    tree_attention_mma_kernel(const TreeAttentionArgs a) {
  using T = typename Shape::Element;
  __shared__ Span spans[Shape::kRows];
  __shared__ int marks[Shape::kKeys];
  wait_for_previous_launch();
  allow_next_launch();

  const Piece piece = piece_of_block<Shape::kThreads, Shape::kKeys>(a, spans);
  if (a.splits > 1 && piece.tile == piece.end_tile) {
    for (int m = threadIdx.x; m < piece.rows; m += Shape::kThreads)
      write_part(a, piece.query_row(a, m), piece.split, -INFINITY, 0.0f);
    return;
  }
  T* shared = dynamic_shared<T>();
  MmaBlock<Shape> block = {a,  piece, score_scale(a), shared, shared + Shape::kQueryElements, marks, {},
                           {}, {}};
#pragma unroll
  for (int m = 0; m < Shape::kTiles; ++m) block.max[m][0] = block.max[m][1] = -INFINITY;

#pragma unroll
  for (int ahead = 0; ahead < Shape::kStages - 1; ++ahead) block.start_tile(piece.tile + ahead);
  for (int i = threadIdx.x; i < Shape::kKeys; i += Shape::kThreads) marks[i] = 0;
  block.load_queries();
#pragma unroll 1
  for (int tile = piece.tile; tile < piece.straight_tiles; ++tile) {
    wait_for_copies<Shape::kStages - 2>();
    __syncthreads();  // the tile is there, and nobody needs the one before it
    block.start_tile(tile + Shape::kStages - 1);
    const bool masked = !piece.all_visible(a, tile * Shape::kKeys, Shape::kKeys);
    const uint64_t not_finite = masked ? block.replace_not_finite(tile) : 0;
    if (block.first_row() >= piece.rows) continue;
    block.add_tile(tile, masked);
    if (not_finite != 0) block.add_not_finite(tile, not_finite);
  }
  if (piece.straight_tiles < piece.end_tile) MmaTail<Shape>{block}.run();
  block.write_rows();
}

// f(Shape{}) for the shape of the blocks of such a call.
template <typename T, typename F>
auto with_mma_shape(const TreeAttentionArgs& a, F&& f) {
  const int64_t rows = a.nodes * (a.query_heads / a.kv_heads);
  const auto of_size = [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    // The slots of a tile: the same for every number of rows, since they decide when the maximum follows.
    constexpr int kKeys = kSize < 96 ? 64 : 32;
    // Few rows: one warp, of which a multiprocessor has several. Up to 128: 64 rows a block, since the
    // products of so few take less time than the slots take to arrive. More: as many rows as fit, so that
    // blocks rarely read the same slots, and 32 rows a warp, so that half as much is read from shared memory
    // for a product. Stages: what keeps the memory busy, as far as there is room.
    if constexpr (kSize > 128) {
      if (rows <= 16) return f(MmaShape<T, kSize, 1, 1, kKeys, 2>{});
      return f(MmaShape<T, kSize, 4, 1, kKeys, 2>{});
    } else {
      if (rows <= 16) return f(MmaShape<T, kSize, 1, 1, kKeys, 4>{});
      if (rows <= 128) return f(MmaShape < T, kSize, 4, 1, kKeys, kSize<96 ? 2 : 3>{});
      return f(MmaShape<T, kSize, 8, 2, kKeys, 2>{});
    }
  };
  if (a.head_size <= 64) return of_size(std::integral_constant<int, 64>{});
  if (a.head_size <= 96) return of_size(std::integral_constant<int, 96>{});
  if (a.head_size <= 128) return of_size(std::integral_constant<int, 128>{});
  return of_size(std::integral_constant<int, 256>{});
}

}  // namespace cerberus
