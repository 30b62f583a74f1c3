// The tiles of a piece in which nodes find their keys in different slots: from the one on in which the first
// path leaves the slots of its positions, to the last one that a node sees.
//
// Their slots come into shared memory once for all nodes, the committed ones of the tile and those of the
// nodes. A product's keys are then the rows that its lanes name, whatever their order there. So each node of
// a warp's 16 rows has products of its own, with the keys of its path at the places of their positions, and
// its rows alone take the results: the operands of a row are those that it has when its token is decoded
// alone, zeros where it sees nothing included. 16 positions of committed tokens that all rows of the warp see
// are the same for all its nodes, and are multiplied at once.
//
// The room of the main loop's tiles holds 96 nodes and more. For more than there is room for, a tile's keys
// are gathered on the way to shared memory instead, for one node of the block after the other.
#pragma once

#include "tree_attention_mma_block.cuh"

namespace cerberus {

template <typename Shape>
struct MmaTail {
  using Block = MmaBlock<Shape>;
  using T = typename Shape::Element;
  using Scores = typename Block::Scores;
  static constexpr int kSize = Shape::kSize, kKeys = Shape::kKeys, kTiles = Shape::kTiles;
  static constexpr int kKeyGroups = Block::kKeyGroups, kSizeGroups = Block::kSizeGroups;
  static constexpr int kRoom = 2 * Shape::kStages * kKeys;  // rows of keys, or of values
  static_assert(2 * (kKeys + 1) <= kRoom, "a tile of one node, keys and values");
  static_assert(Shape::kWarpRows <= kLanes, "a lane looks after a row");

  Block& block;

  // A pass: the tile that begins at position `start`, for the nodes of the block, or for one of them.
  static constexpr int kAll = -1;
  int start = 0, only = kAll;

  // --- shared memory

  // How many rows there are: with all nodes slots from `start` on, with one its keys at positions from
  // `start` on. Behind them comes a row of zeros.
  __device__ int count() const {
    const int nodes = static_cast<int>(block.a.nodes), capacity = static_cast<int>(block.a.capacity);
    return only == kAll ? min(block.piece.length - start + nodes, capacity - start) : kKeys;
  }
  // Of the values; behind the keys, or where there is no room, in their place.
  __device__ int first_value(int count) const { return 2 * (count + 1) <= kRoom ? count + 1 : 0; }

  // Keys or values, from row `to` on. What is not there is filled with zeros, and not read.
  __device__ void start_copies(const void* from, int count, int to) const {
    const TreeAttentionArgs& a = block.a;
    const T* const all = static_cast<const T*>(from);
#pragma unroll 1
    for (int i = threadIdx.x; i < (count + 1) * Shape::kChunks; i += Shape::kThreads) {
      const int row = i / Shape::kChunks, chunk = i % Shape::kChunks;
      bool valid = row < count && chunk * 8 < a.head_size;
      int slot = start + row;
      if (only != kAll) {
        valid = valid && sees(only, row);
        if (valid) slot = slot_of(a, block.piece.length, only, slot);
      }
      const T* const key = all + (valid ? block.piece.element(a, slot) + chunk * 8 : 0);
      start_copy16(block.tiles + element_of<kSize>(to + row, chunk), key, valid);
    }
    end_copies();
  }

  // --- who sees what

  __device__ bool sees(int node, int j) const {
    return block.piece.visible(block.piece.row_of(node), start) >> j & 1;
  }
  // In the pass of one node the rows of the others see nothing.
  __device__ uint64_t visible(int row) const {
    return only != kAll && !block.piece.is_of(only, row) ? 0 : block.piece.visible(row, start);
  }
  // Positions 16 n to 16 n + 15 of the tile are committed, and all rows of the warp see them.
  __device__ bool is_common(int n) const {
    const int row = block.first_row() + lane_index();
    const uint64_t mine = row < block.piece.rows ? block.piece.visible(row, start) : ~uint64_t{0};
    const bool sees_all = lane_index() >= Shape::kWarpRows || (mine >> 16 * n & 0xffff) == 0xffff;
    return only == kAll && start + 16 * n + 16 <= block.piece.length && ballot(!sees_all) == 0;
  }

  // f(node) for the nodes of tile m of the warp's rows that are in this pass and see something of the tile;
  // or once, for kAll of them.
  template <typename F>
  __device__ void for_nodes(int m, bool all, const F& f) const {
    const Piece& piece = block.piece;
    const int begin = block.first_row() + 16 * m;
#pragma unroll 1
    for (int row = begin; row < begin + 16 && row < piece.rows;) {
      const int node = all ? kAll : piece.node(row);
      if (all || visible(row) != 0) f(node);
      row = all ? begin + 16 : (node + 1) * piece.group - piece.first_row;
    }
  }

  // Which row has the key that this lane names, number `key` of the tile, for a node.
  __device__ int row_of_key(int node, int key) const {
    if (node == kAll || only != kAll) return key;
    return sees(node, key) ? slot_of(block.a, block.piece.length, node, start + key) - start : count();
  }

  // The results of a node's product belong to its rows alone.
  __device__ void take(float (&to)[4], const float (&from)[4], int m, int node) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (node != kAll && !block.piece.is_of(node, block.lane_row(m, half))) continue;
      to[2 * half] = from[2 * half];
      to[2 * half + 1] = from[2 * half + 1];
    }
  }

  // --- products

  __device__ void multiply_keys(Scores& score) const {
#pragma unroll
    for (int n = 0; n < kKeyGroups; ++n) {
      const bool common = is_common(n);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        for_nodes(m, common, [&](int node) {
          const int row = row_of_key(node, 16 * n + Block::key_of_lane());
          float low[4] = {}, high[4] = {};
#pragma unroll 1
          for (int step = 0; step < kSizeGroups; ++step) {
            uint32_t q[4], k[4];
            block.load_query(q, m, step);
            Block::load_keys(k, block.tiles, row, step);
            mma_16x8x16<T>(low, q, {k[0], k[1]});
            mma_16x8x16<T>(high, q, {k[2], k[3]});
          }
          take(score[m][2 * n], low, m, node);
          take(score[m][2 * n + 1], high, m, node);
        });
      }
    }
  }

  __device__ void multiply_values(const uint32_t (&weights)[kKeyGroups][kTiles][4], int first_value) const {
#pragma unroll
    for (int step = 0; step < kKeyGroups; ++step) {
      const bool common = is_common(step);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        for_nodes(m, common, [&](int node) {
          const int row = first_value + row_of_key(node, 16 * step + lane_index() % 16);
#pragma unroll
          for (int n = 0; n < kSizeGroups; ++n) {
            uint32_t v[4];
            Block::load_values(v, block.tiles, row, n);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float (&output)[4] = block.output[m][2 * n + half];
              float of_node[4] = {output[0], output[1], output[2], output[3]};
              mma_16x8x16<T>(of_node, weights[step][m], {v[2 * half], v[2 * half + 1]});
              take(output, of_node, m, node);
            }
          }
        });
      }
    }
  }

  __device__ void add_pass() const {
    const int rows = count(), values = first_value(rows);
    __syncthreads();  // nobody needs what lies there
    start_copies(block.a.keys, rows, 0);
    if (values > 0) {
      start_copies(block.a.values, rows, values);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    Scores score = {};
    multiply_keys(score);
    block.cap(score);
    block.hide(score, [&](int row) { return visible(row); });
    block.soften(score);
    uint32_t weights[kKeyGroups][kTiles][4];
#pragma unroll
    for (int step = 0; step < kKeyGroups; ++step) block.take_weights(weights[step], score, step);
    if (values == 0) {
      __syncthreads();  // all have read the keys
      start_copies(block.a.values, rows, 0);
    }
    wait_for_copies<0>();
    __syncthreads();
    multiply_values(weights, values);
  }

  __device__ void run() {
    const Piece& piece = block.piece;
    wait_for_copies<0>();  // of the main loop, which are empty by now
#pragma unroll 1
    for (start = piece.straight_tiles * kKeys; start / kKeys < piece.end_tile; start += kKeys) {
      only = kAll;
      if (count() >= kRoom) only = piece.node(0);
#pragma unroll 1
      do {
        add_pass();
      } while (only != kAll && piece.row_of(++only) < piece.rows);
    }
  }
};

}  // namespace cerberus
