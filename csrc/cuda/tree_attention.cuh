// What the kernels of tree_attention share: the part of the work that a block owns, the slots that a node
// sees, and how partial results are left for the combining kernel.
//
// The query rows of a key/value head are the N nodes times the group of query heads that share it: row r is
// node r / group, head r % group of the group. A block owns a tile of these rows and one of `splits` pieces
// of the slots. Slots are taken in tiles counted from slot 0, whatever the window and the tree; the tiles in
// use, those from the window's begin to slot length + N, are dealt out evenly, so that all pieces have work
// also where the cache is much larger than what is in it.
//
// So a node's result depends on its own query, on the slots it sees, and, in the order in which float32 sums
// are taken, on N, length, window and the number of splits (of sizes and the device). It does not depend on
// the other nodes' queries, keys, values and places in the tree, be they not a number: a slot that a row does
// not see adds nothing to it, exactly.
#pragma once

#include <cfloat>
#include <cstdint>

#include "args.h"
#include "copy.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace cerberus {

constexpr int kMaxSplits = 128;

// What one block does.
struct Piece {
  int batch, head, split;
  int group;           // query heads that share a key/value head
  int first_row;       // of the tile of query rows
  int rows;            // in the tile, at most the tile's size
  int64_t length;      // committed slots
  int begin, end;      // every slot that any node sees lies in [begin, end)
  int tile, end_tile;  // of this piece

  // Which of the (B, N, Hq) query rows row m of the tile is.
  __device__ int64_t query_row(const TreeAttentionArgs& a, int m) const {
    const int row = first_row + m;
    return (batch * a.nodes + row / group) * a.query_heads + head * group + row % group;
  }
  __device__ int node(int m) const { return (first_row + m) / group; }
  // Where the slots of this key/value head begin, in elements.
  __device__ int64_t first_element(const TreeAttentionArgs& a) const {
    return (batch * a.kv_heads + head) * a.capacity * a.head_size;
  }
  // Every node sees all `count` slots from `start` on.
  __device__ bool all_visible(const TreeAttentionArgs& a, int start, int count) const {
    return start + count <= end && start + count <= length &&
           (a.window == 0 || start > length + a.nodes - 1 - a.window);
  }
};

// The block's piece, of tiles of kRows query rows and kKeys slots.
template <int kRows, int kKeys>
__device__ inline Piece piece_of_block(const TreeAttentionArgs& a) {
  Piece piece;
  const int splits = static_cast<int>(a.splits), kv_heads = static_cast<int>(a.kv_heads);
  piece.group = static_cast<int>(a.query_heads / a.kv_heads);
  const int query_rows = static_cast<int>(a.nodes) * piece.group;
  const int row_tiles = (query_rows + kRows - 1) / kRows;
  // Blocks that share their slots are neighbours, so that one reads from the L2 cache what the other fetched.
  int index = static_cast<int>(blockIdx.x);
  piece.first_row = index % row_tiles * kRows;
  piece.rows = query_rows - piece.first_row < kRows ? query_rows - piece.first_row : kRows;
  index /= row_tiles;
  piece.split = index % splits;
  index /= splits;
  piece.head = index % kv_heads;
  piece.batch = index / kv_heads;

  const int64_t length = a.length[piece.batch];
  piece.length = length < 0 ? 0 : length < INT32_MAX ? length : INT32_MAX;
  const int64_t end = piece.length + a.nodes < a.capacity ? piece.length + a.nodes : a.capacity;
  // The root sees furthest back.
  const int64_t begin = a.window > 0 && piece.length >= a.window ? piece.length - a.window + 1 : 0;
  piece.end = static_cast<int>(end);
  piece.begin = static_cast<int>(begin < end ? begin : end);
  const int first = piece.begin / kKeys;
  const int64_t tiles = piece.begin < piece.end ? (piece.end + kKeys - 1) / kKeys - first : 0;
  piece.tile = first + static_cast<int>(tiles * piece.split / splits);
  piece.end_tile = first + static_cast<int>(tiles * (piece.split + 1) / splits);
  return piece;
}

// The lowest `count` bits.
__device__ inline uint64_t low_bits(int64_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// Bit j: `node` sees slot start + j. Only tiles that not all nodes see wholly come here, so it may cost a few
// loads.
__device__ inline uint64_t visible_slots(const TreeAttentionArgs& a, const Piece& piece, int node,
                                         int start) {
  const int64_t* path = a.ancestors + node * a.words;
  const auto word = [&](int64_t w) {
    return w >= 0 && w < a.words ? static_cast<uint64_t>(path[w]) : uint64_t{0};
  };
  // The node in slot `start`; negative: that many committed slots come before the root's.
  const int64_t first = start - piece.length;
  uint64_t committed = low_bits(-first), nodes = 0;
  const int64_t first_word = first < 0 ? -1 : first / 64;
  if (first > -64) {
    const int shift = static_cast<int>(first - first_word * 64);
    nodes = word(first_word) >> shift;
    if (shift > 0) nodes |= word(first_word + 1) << (64 - shift);
  }
  if (a.window > 0) {
    int64_t depth = -1, before = 0;  // nodes on the path; those of them before slot `start`
#pragma unroll 1
    for (int64_t w = 0; w < a.words; ++w) {
      depth += count_bits(word(w));
      before += count_bits(word(w) & low_bits(first - w * 64));
    }
    committed &= ~low_bits(piece.length + depth - a.window + 1 - start);
    // The nodes nearest to the root are the first to leave the window.
#pragma unroll 1
    for (int64_t leave = depth + 1 - a.window - before; leave > 0 && nodes != 0; --leave) nodes &= nodes - 1;
  }
  return (committed | nodes) & low_bits(piece.end - start);
}

// The queries take over the sign of the scale, and are 0 where it is 0, so that the largest product q k is
// the largest score, and the -infinity of a mask is scaled to itself.
__device__ inline float query_sign(const TreeAttentionArgs& a) {
  return a.scale > 0.0f ? 1.0f : a.scale < 0.0f ? -1.0f : 0.0f;
}
constexpr float kLog2e = 1.44269504f;  // exp2 is the cheaper exponential

// What the product of such a query and a key, or the capped score, is to be multiplied by, log2 e included.
// Always in one fused multiply-add with what is taken off: large scores are not rounded.
__device__ inline float score_scale(const TreeAttentionArgs& a) {
  if (a.softcap > 0.0f) return kLog2e;
  return a.scale == 0.0f ? 1.0f : fabsf(a.scale) * kLog2e;
}

// softcap tanh(scale q k / softcap) of the product of such a query and a key; only where softcap > 0.
// (1 - e) / (1 + e) with e = 2^(-2 |x| log2 e), and where that cancels the first terms of the series.
struct SoftCap {
  float scale, cap;

  __device__ explicit SoftCap(const TreeAttentionArgs& a)
      : scale(fminf(fabsf(a.scale) / a.softcap, FLT_MAX)), cap(a.softcap) {}

  __device__ float operator()(float product) const {
    const float x = product * scale, y = fabsf(x), square = x * x;
    const float e = exp2_flushed(-2.0f * kLog2e * y);
    const float far = copysignf(divided(1.0f - e, 1.0f + e), x);
    const float terms = fmaf(
        square, fmaf(square, fmaf(square, 62.0f / 2835.0f, -17.0f / 315.0f), 2.0f / 15.0f), -1.0f / 3.0f);
    return cap * (y < 0.25f ? fmaf(x * square, terms, x) : far);
  }
};

// What the combining kernel needs to know of a query row besides the piece's output.
__device__ inline void write_part(const TreeAttentionArgs& a, int64_t query_row, int split, float max,
                                  float sum) {
  a.part_max[query_row * a.splits + split] = max;
  a.part_sum[query_row * a.splits + split] = sum;
}

// What the output of a query row is to be multiplied by: 1 / its whole mass, the sink of its head included,
// which is added here, once, however the slots are split. `sum` is of what the row sees, relative to `max`. A
// row that sees nothing, because its own slot lies outside of the cache, gives 0.
template <typename T>
__device__ inline float share_of(const TreeAttentionArgs& a, int64_t query_row, float max, float sum) {
  if (a.sinks != nullptr) {
    const float sink = kLog2e * to_float(static_cast<const T*>(a.sinks)[query_row % a.query_heads]);
    const float top = fmaxf(max, sink);
    if (top != -INFINITY) {
      const float factor = exp2f(max - top);
      return factor / (factor * sum + exp2f(sink - top));
    }
  }
  return sum == 0.0f ? 0.0f : 1.0f / sum;
}

// A device holds `slots` such blocks at once. Into how many pieces to split the slots, at most `most`, where
// there are `blocks` of them unsplit: the fewest pieces with which the call takes hardly longer than with the
// best number of them, if a block's time is in proportion to its part of the slots.
inline int64_t choose_splits(int64_t blocks, int64_t slots, int64_t most) {
  most = most < kMaxSplits ? most : kMaxSplits;
  if (blocks == 0 || most <= 1) return 1;
  const auto time = [=](int64_t splits) {
    return static_cast<double>(divide_up(blocks * splits, slots)) / static_cast<double>(splits);
  };
  double best = time(1);
  for (int64_t splits = 2; splits <= most; ++splits) best = time(splits) < best ? time(splits) : best;
  constexpr double kHardlyLonger = 1.1;  // a piece less is a partial result less to write and read
  int64_t splits = 1;
  while (time(splits) > kHardlyLonger * best) ++splits;
  return splits;
}

}  // namespace cerberus
