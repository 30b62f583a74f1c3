// tree_attention of bf16 and fp16 on tensor cores (flash attention 2's inner loop).
//
// The block's queries lie in shared memory; key and value tiles pass through it, the next ones on their way
// while a tile is computed with. A warp owns kTiles times 16 query rows:
//
//   scores = Q K^T        mma, A from the queries, B from the keys as they lie; with a soft cap, capped here
//   weight = 2^(score - max)   float32, rounded for the next step; max as below
//   output += weight V    mma, A from the scores' registers, B from the values, transposed on the way
//   sum    += weight 1    mma with a matrix of ones: sums the weights as they were rounded, so that they are
//                         weights of a mean, in fewer instructions than adding and shuffling
//
// What is taken off needs not be the maximum: any number close to it keeps the powers in range. So it follows
// the row's maximum only when that has grown by more than kSlack, and the accumulators are hardly ever
// rescaled. And it lies below the maximum by kLift, so that the small weights of a long row are not lost.
//
// Shared memory is read by load_matrices, eight lanes reading 16 bytes each from eight neighbouring rows. The
// 16-byte chunks of a row are permuted by the row's number so that these eight lie in eight different groups
// of four banks; see `element_of`.
//
// Slots that not all rows see. Before a tile that holds nodes or the window's edge is used, every value in it
// that is not finite is replaced by 0, because a weight of 0 does not take it away, and is afterwards added
// to the rows that see it.
//
// Tiles in which nodes find their keys in different slots: tree_attention_mma_tail.cuh.
#pragma once

#include <cfloat>
#include <type_traits>

#include "copy.cuh"
#include "tree_attention.cuh"

namespace cerberus {

// Weights are at most 2^(kLift + kSlack), which fp16 holds. It also holds 2^-24, and that is 2^-31 of
// 2^kLift.
constexpr float kLift = 7.0f, kSlack = 8.0f;

// kSize: head size that the registers are laid out for; a smaller head is filled up with zeros.
// kWarps warps, each with kTiles x 16 rows; kStages tiles of kKeys slots in shared memory.
template <typename T, int kSize_, int kWarps_, int kTiles_, int kKeys_, int kStages_>
struct MmaShape {
  using Element = T;
  static constexpr int kSize = kSize_, kWarps = kWarps_, kTiles = kTiles_, kKeys = kKeys_, kStages = kStages_;
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kWarpRows = 16 * kTiles, kRows = kWarpRows * kWarps;
  static constexpr int kChunks = kSize / 8;  // of 16 bytes, in a row

  static constexpr int kQueryElements = kRows * kSize, kTileElements = kKeys * kSize;
  static constexpr int kSharedBytes = (kQueryElements + kStages * 2 * kTileElements) * 2;  // keys and values
  // How many blocks of this shape share a multiprocessor, as far as its 228 KB of shared memory go, of which
  // a block takes up to 4 KB besides the tiles, and registers without spilling.
  static constexpr int kByMemory = (228 << 10) / (kSharedBytes + (4 << 10));
  static constexpr int kByRegisters = kThreads > 128 ? 1 : kWarps > 1 && kSize > 64 ? 2 : 3;
  static constexpr int kBlocks = kByMemory < kByRegisters ? kByMemory : kByRegisters;

  static_assert(kSharedBytes <= 96 << 10, "a block may have 99 KB on every device from sm_80 up");
  static_assert(kKeys <= 64 && kRows <= kThreads, "masks are 64 bits, made by one thread each");
};

// Where chunk `chunk` of a row begins. Rows of a multiple of 128 bytes all begin in bank 0: eight of them are
// told apart by the low three bits of the row. Rows of an odd multiple of 64 bytes begin in bank 0 and 16 in
// turn: two bits tell the pairs apart.
template <int kSize>
__device__ inline int element_of(int row, int chunk) {
  constexpr int kChunks = kSize / 8;
  static_assert(kChunks % 4 == 0, "");
  const int mix = kChunks % 8 == 0 ? row % 8 : row / 2 % 4;
  return row * kSize + (chunk ^ mix) * 8;
}

// The state of one block's work: where its tiles lie, and this lane's part of the results.
template <typename Shape>
struct MmaBlock {
  using T = typename Shape::Element;
  static constexpr int kSize = Shape::kSize, kKeys = Shape::kKeys, kTiles = Shape::kTiles;
  static constexpr int kKeyGroups = kKeys / 16, kSizeGroups = kSize / 16;

  const TreeAttentionArgs& a;
  const Piece& piece;
  float scale;  // score_scale
  T* query;     // (kRows, kSize)
  T* tiles;     // keys, values, keys, values ...: (kKeys, kSize) each
  int* marks;   // (kKeys,): the number + 1 of the last tile with a value in this slot that is not finite

  // Tile m of the warp's rows: d[0], d[1] belong to row 16 m + lane / 4, d[2], d[3] to the row 8 further
  // down.
  float output[kTiles][2 * kSizeGroups][4];
  float sum[kTiles][4];  // d[1] and d[3] repeat d[0] and d[2]
  float max[kTiles][2];  // what is taken off the scaled scores

  __device__ int first_row() const { return warp_index() * Shape::kWarpRows; }
  __device__ int lane_row(int m, int half) const {
    return first_row() + 16 * m + 8 * half + lane_index() / 4;
  }
  __device__ T* keys_of(int tile) const { return tiles + tile % Shape::kStages * 2 * Shape::kTileElements; }
  __device__ T* values_of(int tile) const { return keys_of(tile) + Shape::kTileElements; }

  __device__ void load_queries() const {
    const float sign = query_sign(a);
    for (int i = threadIdx.x; i < Shape::kRows * Shape::kChunks; i += Shape::kThreads) {
      const int m = i / Shape::kChunks, chunk = i % Shape::kChunks;
      float x[8] = {};
      if (m < piece.rows && chunk * 8 < a.head_size)
        load<8>(static_cast<const T*>(a.query) + piece.query_row(a, m) * a.head_size + chunk * 8).unpack(x);
      *reinterpret_cast<uint4*>(query + element_of<kSize>(m, chunk)) = {
          pack2<T>(sign * x[0], sign * x[1]), pack2<T>(sign * x[2], sign * x[3]),
          pack2<T>(sign * x[4], sign * x[5]), pack2<T>(sign * x[6], sign * x[7])};
    }
  }

  // Slots outside of [begin, end) are not read; their places are filled with zeros. A tile behind the last
  // one is an empty group of copies.
  __device__ void start_tile(int tile) const {
    if (tile < piece.straight_tiles) start_copies(tile);
    end_copies();
  }
  __device__ void start_copies(int tile) const {
    const int head_size = static_cast<int>(a.head_size), start = tile * kKeys;
    const int64_t first = piece.element(a, start);
    const T* keys = static_cast<const T*>(a.keys) + first;
    const T* values = static_cast<const T*>(a.values) + first;
    constexpr int kCopies = kKeys * Shape::kChunks;
#pragma unroll 4
    for (int round = 0; round < kCopies; round += Shape::kThreads) {
      const int i = round + static_cast<int>(threadIdx.x);
      if (kCopies % Shape::kThreads != 0 && i >= kCopies) break;
      const int row = i / Shape::kChunks, chunk = i % Shape::kChunks;
      const bool valid = start + row >= piece.begin && start + row < piece.end && chunk * 8 < head_size;
      const int from = valid ? row * head_size + chunk * 8 : 0, to = element_of<kSize>(row, chunk);
      start_copy16(keys_of(tile) + to, keys + from, valid);
      start_copy16(values_of(tile) + to, values + from, valid);
    }
  }

  // For a tile that not all rows see wholly: values that are not finite replaced by 0. Bit j: there was one
  // in slot j.
  __device__ uint64_t replace_not_finite(int tile) const {
    for (int i = threadIdx.x; i < kKeys * Shape::kChunks; i += Shape::kThreads) {
      const int row = i / Shape::kChunks;
      T* chunk = values_of(tile) + element_of<kSize>(row, i % Shape::kChunks);
      float x[8];
      load<8>(chunk).unpack(x);
      bool finite = true;
#pragma unroll
      for (float each : x) finite &= fabsf(each) <= FLT_MAX;
      if (finite) continue;
      marks[row] = tile + 1;
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (!(fabsf(x[j]) <= FLT_MAX)) chunk[j] = from_float<T>(0.0f);
    }
    __syncthreads();
    const int lane = lane_index();
    const uint32_t low = ballot(lane < kKeys && marks[lane] == tile + 1);
    const uint32_t high = ballot(lane + kLanes < kKeys && marks[lane + kLanes] == tile + 1);
    return static_cast<uint64_t>(high) << 32 | low;
  }

  // Adds them to the output of the rows that see them, whatever their weights there: it is not finite then.
  __device__ void add_not_finite(int tile, uint64_t slots) {
    const int start = tile * kKeys, head_size = static_cast<int>(a.head_size);
#pragma unroll 1
    for (int key = 0; key < kKeys; ++key) {
      if ((slots >> key & 1) == 0) continue;
      const T* value = static_cast<const T*>(a.values) + piece.element(a, start + key);
      bool seen[kTiles][2];
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          seen[m][half] = piece.visible(lane_row(m, half), start) >> key & 1;
#pragma unroll
      for (int n = 0; n < 2 * kSizeGroups; ++n) {
        const int column = n * 8 + lane_index() % 4 * 2;
        T both[2] = {};
        if (column < head_size) std::memcpy(both, value + column, 4);
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const float x = to_float(both[odd]);
          if (fabsf(x) <= FLT_MAX) continue;
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
              if (seen[m][half]) output[m][n][2 * half + odd] += x;
          }
        }
      }
    }
  }

  // Of a tile's positions, two of which a lane has in each of its groups of 8: products of queries and keys,
  // then scores, then weights.
  using Scores = float[kTiles][2 * kKeyGroups][4];

  // Of tile m of the warp's rows, 16 of the inner index.
  __device__ void load_query(uint32_t (&q)[4], int m, int step) const {
    const int row = first_row() + 16 * m + lane_index() % 16;
    load_matrices(q, query + element_of<kSize>(row, 2 * step + lane_index() / 16));
  }
  // Two times 8 keys, two times 8 of the inner index. Of 16 keys a lane names the row of the one that
  // key_of_lane() says.
  __device__ static int key_of_lane() { return lane_index() / 16 * 8 + lane_index() % 8; }
  __device__ static void load_keys(uint32_t (&k)[4], const T* keys, int row, int step) {
    load_matrices(k, keys + element_of<kSize>(row, 2 * step + lane_index() / 8 % 2));
  }
  // Two times 8 columns, two times 8 keys. A lane names the row of key lane % 16.
  __device__ static void load_values(uint32_t (&v)[4], const T* values, int row, int n) {
    load_matrices_transposed(v, values + element_of<kSize>(row, 2 * n + lane_index() / 16));
  }

  // scores = Q K^T
  __device__ void multiply_keys(Scores& score, const T* keys) const {
#pragma unroll
    for (int step = 0; step < kSizeGroups; ++step) {
      uint32_t q[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_query(q[m], m, step);
#pragma unroll
      for (int n = 0; n < kKeyGroups; ++n) {
        uint32_t k[4];
        load_keys(k, keys, 16 * n + key_of_lane(), step);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma_16x8x16<T>(score[m][2 * n], q[m], {k[0], k[1]});
          mma_16x8x16<T>(score[m][2 * n + 1], q[m], {k[2], k[3]});
        }
      }
    }
  }

  __device__ void cap(Scores& score) const {
    if (!(a.softcap > 0.0f)) return;
    const SoftCap capped(a);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * kKeyGroups; ++n) {
#pragma unroll
        for (float& each : score[m][n]) each = capped(each);
      }
    }
  }

  // visible(row): bit j says that this row of the block sees position j of the tile.
  template <typename Visible>
  __device__ void hide(Scores& score, const Visible& visible) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint64_t sees = visible(lane_row(m, half)) >> (lane_index() % 4 * 2);
#pragma unroll
        for (int n = 0; n < 2 * kKeyGroups; ++n) {
#pragma unroll
          for (int d = 2 * half; d < 2 * half + 2; ++d)
            if ((sees >> (8 * n + d % 2) & 1) == 0) score[m][n][d] = -INFINITY;
        }
      }
    }
  }

  // Scores become weights; output and sum what they are relative to the new maximum.
  __device__ void soften(Scores& score) {
    bool rescale = false;
    float factor[kTiles][2];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < 2 * kKeyGroups; ++n)
          top = fmaxf(top, fmaxf(score[m][n][2 * half], score[m][n][2 * half + 1]));
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(top, shuffle_xor(top, 2));
        const float before = max[m][half];
        const bool grows = scale * top > before + (kLift + kSlack);
        if (grows) max[m][half] = fmaf(scale, top, -kLift);  // one rounding, in the kernels of all shapes
        factor[m][half] = grows ? exp2_flushed(before - max[m][half]) : 1.0f;
        rescale |= grows;
        // Until the row has seen a key the maximum is -infinity, which cannot be taken off.
        const float off = max[m][half] == -INFINITY ? 0.0f : max[m][half];
#pragma unroll
        for (int n = 0; n < 2 * kKeyGroups; ++n) {
#pragma unroll
          for (int d = 2 * half; d < 2 * half + 2; ++d)
            score[m][n][d] = exp2_flushed(fmaf(score[m][n][d], scale, -off));
        }
      }
    }
    if (ballot(rescale) == 0) return;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        sum[m][d] *= factor[m][d / 2];
#pragma unroll
        for (int n = 0; n < 2 * kSizeGroups; ++n) output[m][n][d] *= factor[m][d / 2];
      }
    }
  }

  // The weights of 16 positions as the left operand of a product; their registers are those that it is made
  // of. Adds them to the sum.
  __device__ void take_weights(uint32_t (&p)[kTiles][4], const Scores& weight, int step) {
    const uint32_t ones = pack2<T>(1.0f, 1.0f);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&from)[4] = weight[m][2 * step + i / 2];
        p[m][i] = pack2<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
      }
      mma_16x8x16<T>(sum[m], p[m], {ones, ones});
    }
  }

  // output += weight V, of 16 positions. A lane names the row of key lane % 16.
  __device__ void multiply_values(const uint32_t (&p)[kTiles][4], const T* values, int row) {
#pragma unroll
    for (int n = 0; n < kSizeGroups; ++n) {
      uint32_t v[4];
      load_values(v, values, row, n);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        mma_16x8x16<T>(output[m][2 * n], p[m], {v[0], v[1]});
        mma_16x8x16<T>(output[m][2 * n + 1], p[m], {v[2], v[3]});
      }
    }
  }

  __device__ void add_tile(int tile, bool masked) {
    Scores score = {};
    multiply_keys(score, keys_of(tile));
    cap(score);
    if (masked) hide(score, [&](int row) { return piece.visible(row, tile * kKeys); });
    soften(score);
#pragma unroll
    for (int step = 0; step < kKeyGroups; ++step) {
      uint32_t p[kTiles][4];
      take_weights(p, score, step);
      multiply_values(p, values_of(tile), 16 * step + lane_index() % 16);
    }
  }

  // Two neighbouring columns of a query row, which `share` makes a mean where this is all of it.
  __device__ void write(int64_t row, int column, float share, float x0, float x1) const {
    if (a.splits > 1) {
      float* to = a.part_output + (row * a.splits + piece.split) * a.head_size + column;
      *reinterpret_cast<uint2*>(to) = {float_bits(x0), float_bits(x1)};
    } else {
      *reinterpret_cast<uint32_t*>(static_cast<T*>(a.output) + row * a.head_size + column) =
          pack2<T>(share * x0, share * x1);
    }
  }

  __device__ void write_rows() const {
    const int head_size = static_cast<int>(a.head_size);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane_row(m, half);
        if (row >= piece.rows) continue;
        const int64_t query_row = piece.query_row(a, row);
        const float total = sum[m][2 * half];
        const float share = share_of<T>(a, piece.query_head(row), max[m][half], total);
        if (a.splits > 1 && lane_index() % 4 == 0) write_part(a, query_row, piece.split, max[m][half], total);
#pragma unroll
        for (int n = 0; n < 2 * kSizeGroups; ++n) {
          const int column = n * 8 + lane_index() % 4 * 2;
          if (column < head_size)
            write(query_row, column, share, output[m][n][2 * half], output[m][n][2 * half + 1]);
        }
      }
    }
  }
};

}  // namespace cerberus
