// What the kernels of tree_attention share: the part of the work that a block owns, and how partial results
// are left for the combining kernel.
//
// The query rows of a key/value head are the N nodes times the group of query heads that share it: row r is
// node r / group, head r % group of the group. A block owns a tile of these rows and one piece of the
// positions.
//
// A key's place in every sum is that of its position in the text, whether it is committed or of a node's
// path: pieces begin at fixed positions (first_of_piece), and are walked in tiles counted from position 0
// whose size depends on the element type and the head size alone. So a node's result, to the last bit,
// depends on its own query and on the keys and values that it sees: it is what the node's token gets when it
// is decoded alone, later or instead. It does not depend on N, on the other nodes, be they not a number, on
// how many tokens are committed, on the size of the cache, on the device. What a row does not see adds
// nothing to it, exactly.
//
// Where a position's key lies in one slot for all rows of a block, in the slot of its position, the tile's
// slots are taken for all rows at once (`straight` tiles): all of them where the nodes are a chain, as in
// prompts and in decoding without drafts, and else those of committed tokens. In the others, the last one or
// two, every node's keys are gathered along its path (tree_attention_path.cuh).
#pragma once

#include <cfloat>
#include <cstdint>

#include "args.h"
#include "copy.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "tree_attention_path.cuh"

namespace cerberus {

// Of a piece, a row leaves E numbers of float32, which are written and read once. With 64 nodes and 4 heads
// that share their keys and values, pieces of 256 positions make that twice the bytes of 16-bit keys and
// values, through the L2 cache. Smaller pieces would make it most of the work; with larger ones, a node alone
// in a short cache would leave most of the device idle. Further on there is work for all blocks anyway: the
// size doubles every 16 pieces, so that 2^20 positions have no more pieces than kMaxSplits.
constexpr int kFirstPiece = 256, kPiecesOfOneSize = 16, kMaxSplits = 128;

__host__ __device__ constexpr int64_t first_of_piece(int piece) {
  const int doubled = piece / kPiecesOfOneSize;
  const int64_t before = int64_t{kPiecesOfOneSize} * ((1 << doubled) - 1);  // in first pieces
  return piece >= kMaxSplits ? INT32_MAX
                             : kFirstPiece * (before + (int64_t{piece % kPiecesOfOneSize} << doubled));
}

// What one block does.
struct Piece {
  int batch, head, split;
  int group;           // query heads that share a key/value head
  int first_row;       // of the tile of query rows
  int rows;            // in the tile, at most the tile's size
  int length;          // committed tokens
  const Span* spans;   // what each row of the tile sees; behind the last row nothing
  int begin, end;      // every position that any row sees lies in [begin, end)
  int tile, end_tile;  // of this piece
  int straight_tiles;  // the first one that is not straight, at most end_tile

  // Which of the (B, N, Hq) query rows row m of the tile is.
  __device__ int64_t query_row(const TreeAttentionArgs& a, int m) const {
    return (batch * a.nodes + node(m)) * a.query_heads + query_head(m);
  }
  __device__ int query_head(int m) const { return head * group + (first_row + m) % group; }
  __device__ int node(int m) const { return (first_row + m) / group; }
  __device__ bool is_of(int node, int m) const {
    return static_cast<unsigned>(first_row + m - node * group) < static_cast<unsigned>(group);
  }
  // A row of the tile that is of this node.
  __device__ int row_of(int node) const { return max(node * group - first_row, 0); }
  // Where a slot of this key/value head begins, in elements.
  __device__ int64_t element(const TreeAttentionArgs& a, int64_t slot) const {
    return ((batch * a.kv_heads + head) * a.capacity + slot) * a.head_size;
  }
  // Every node sees all `count` positions from `start` on.
  __device__ bool all_visible(const TreeAttentionArgs& a, int start, int count) const {
    return start + count <= end && start + count <= length &&
           (a.window == 0 || start > length + a.nodes - 1 - a.window);
  }
  // Bit j: row m sees position start + j.
  __device__ uint64_t visible(int m, int start) const {
    return low_bits(spans[m].high - start) & ~low_bits(spans[m].low - start);
  }
};

// Of all rows of a block: the union of their spans, and the smallest of their views' `straight`.
struct Reach {
  int low, high, straight;
};
struct Union {
  __device__ Reach operator()(const Reach& a, const Reach& b) const {
    return {min(a.low, b.low), max(a.high, b.high), min(a.straight, b.straight)};
  }
};

// The block's piece, of tiles of kRows query rows and kKeys positions. All threads call it, with shared
// memory for the rows' spans.
template <int kThreads, int kKeys, int kRows>
__device__ inline Piece piece_of_block(const TreeAttentionArgs& a, Span (&spans)[kRows]) {
  static_assert(kRows <= kThreads, "a thread finds out what a row sees");
  static_assert(kFirstPiece % kKeys == 0, "pieces begin with a tile");
  Piece piece;
  const int splits = static_cast<int>(a.splits), kv_heads = static_cast<int>(a.kv_heads);
  piece.group = static_cast<int>(a.query_heads) / kv_heads;
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
  piece.length = clamped(a.length[piece.batch]);

  const int m = static_cast<int>(threadIdx.x);
  Reach reach = {INT32_MAX, 0, INT32_MAX};
  if (m < piece.rows) {
    const NodeView view = view_of(a, piece.length, piece.node(m));
    spans[m] = view.span;
    reach = {view.span.low, view.span.high, view.straight};
  } else if (m < kRows) {
    spans[m] = {0, 0};
  }
  reach = block_reduce<kThreads>(reach, Union{});  // and now all know all spans
  piece.spans = spans;
  piece.begin = min(reach.low, reach.high);
  piece.end = reach.high;
  const auto border = [](int split) { return static_cast<int>(first_of_piece(split)); };
  const int first = max(piece.begin, border(piece.split)), last = min(piece.end, border(piece.split + 1));
  piece.tile = first / kKeys;
  piece.end_tile = first < last ? (last + kKeys - 1) / kKeys : piece.tile;
  piece.straight_tiles = max(piece.tile, min(piece.end_tile, reach.straight / kKeys));
  return piece;
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
__device__ inline float share_of(const TreeAttentionArgs& a, int query_head, float max, float sum) {
  if (a.sinks != nullptr) {
    const float sink = kLog2e * to_float(static_cast<const T*>(a.sinks)[query_head]);
    const float top = fmaxf(max, sink);
    if (top != -INFINITY) {
      const float factor = exp2f(max - top);
      return factor / fmaf(factor, sum, exp2f(sink - top));
    }
  }
  return sum == 0.0f ? 0.0f : 1.0f / sum;
}

}  // namespace cerberus
