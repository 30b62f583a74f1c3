// How a product Y = W X^T is shared by the blocks of a launch and the warps of a block, see skinny.cuh.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "launch.cuh"
#include "reduce.cuh"

namespace cerberus {

constexpr int kProductThreads = 256;
constexpr int kProductWarps = kProductThreads / kLanes;
constexpr int kTileRows = 16;  // weight rows of a tile

// How the tiles are shared by the blocks of a launch, and the columns by the warps of a block. The columns
// may have two parts of one size, for which the rows of X lie in two places; a slice lies in one of them.
struct ProductSplit {
  int blocks;
  int block_tiles, longer_blocks;  // tiles of a block; the first `longer_blocks` blocks have one more
  int log_parts;                   // 0 or 1
  int log_slices = 0;

  // max_blocks: 2 for each multiprocessor of the device. chunks: of a part of the columns.
  ProductSplit(int64_t tiles, int64_t max_blocks, int64_t chunks, int parts) : log_parts(parts - 1) {
    share(tiles, max_blocks);
    // The time of a block is that of its slowest warp. Of equals the fewest slices: more tiles side by side
    // use the same part of X.
    int64_t shortest = std::numeric_limits<int64_t>::max();
    for (int log = log_parts; 1 << log <= kProductWarps && 1 << (log - log_parts) <= chunks; ++log) {
      const int64_t rounds = divide_up(divide_up(tiles, blocks) << log, kProductWarps);
      const int64_t time = rounds * divide_up(chunks, 1 << (log - log_parts));
      if (time >= shortest) continue;
      shortest = time;
      log_slices = log;
    }
  }
  // Another number of blocks changes no sum: it depends on the slices.
  void share(int64_t tiles, int64_t max_blocks) {
    blocks = static_cast<int>(std::min(tiles, max_blocks));
    block_tiles = static_cast<int>(tiles / blocks);
    longer_blocks = static_cast<int>(tiles % blocks);
  }

  __device__ int first_tile(int block) const { return block * block_tiles + min(block, longer_blocks); }
  // That a block computes side by side.
  __host__ __device__ constexpr int round_tiles() const { return kProductWarps >> log_slices; }
  static_assert(kProductWarps * kTileRows == 1 << 7);
  __host__ __device__ constexpr int log_round_rows() const { return 7 - log_slices; }
  __host__ __device__ constexpr int round_rows() const { return round_tiles() * kTileRows; }

  // The sums of a round in shared memory: [slice][row of X][weight row], 128 for each row of X. The lanes
  // write eights of weight rows, to every other row of X at once: from there to there the eights change
  // places, so that the lanes meet 32 different banks (16 where the rows have no more than two eights).
  static constexpr int kSumsOfRow = kProductWarps * kTileRows;
  __device__ int sum_index(int row, int weight_row) const {
    const int eight = row >> 1 & (log_slices == 3 ? 1 : 3);
    return (row << log_round_rows()) + (weight_row ^ eight << 3);
  }
};

// The columns that a warp reads, and where in them its lane begins.
struct WarpSlice {
  int index;       // of the slice
  int tile;        // of the round's
  int part;        // of the columns
  int lane_begin;  // in the part
  int size;        // in columns from the warp's first chunk on
  int lane_size;   // from lane_begin on; less than `size` where the part ends inside of the last chunk

  // chunk: columns, of which a lane has `vector`.
  __device__ WarpSlice(const ProductSplit& split, int part_columns, int chunk, int vector) {
    index = warp_index() & ((1 << split.log_slices) - 1);
    tile = warp_index() >> split.log_slices;
    const int log_part_slices = split.log_slices - split.log_parts;
    part = index >> log_part_slices;
    const int of_part = index & ((1 << log_part_slices) - 1);
    const int64_t chunks = (part_columns + chunk - 1) / chunk;
    const int begin = static_cast<int>(chunks * of_part >> log_part_slices) * chunk;
    size = static_cast<int>(chunks * (of_part + 1) >> log_part_slices) * chunk - begin;
    lane_begin = begin + lane_index() % 4 * vector;
    lane_size = min(size, part_columns - lane_begin);
  }
};

}  // namespace cerberus
