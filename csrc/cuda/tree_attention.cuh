// What the kernels of tree_attention share: the part of the work that a block owns, the slots that a node
// sees, and how partial results are left for the combining kernel.
//
// The query rows of a key/value head are the N nodes times the group of query heads that share it: row r is
// node r / group, head r % group of the group. A block owns a tile of these rows and one piece of the slots.
//
// Pieces begin at fixed slots (first_slot_of_piece), and are walked in tiles counted from slot 0 whose size
// depends on the element type and the head size alone. So a node's result, to the last bit, depends on its
// own query and on the slots that it sees: not on N, on the other nodes, be they not a number, on the length,
// on the size of the cache, on the device. What a row does not see adds nothing to it, exactly.
#pragma once

#include <cfloat>
#include <cstdint>

#include "args.h"
#include "copy.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace cerberus {

// Of a piece, a row leaves E numbers of float32, which are written and read once. With 64 nodes and 4 heads
// that share their keys and values, pieces of 256 slots make that twice the bytes of 16-bit keys and values,
// through the L2 cache. Smaller pieces would make it most of the work; with larger ones, a node alone in a
// short cache would leave most of the device idle. Further on there is work for all blocks anyway: the size
// doubles every 16 pieces, so that 2^20 slots have no more pieces than kMaxSplits.
constexpr int kFirstPieceSlots = 256, kPiecesOfOneSize = 16, kMaxSplits = 128;

__host__ __device__ constexpr int64_t first_slot_of_piece(int piece) {
  const int doubled = piece / kPiecesOfOneSize;
  const int64_t before = int64_t{kPiecesOfOneSize} * ((1 << doubled) - 1);  // in first pieces
  return piece >= kMaxSplits ? INT32_MAX
                             : kFirstPieceSlots * (before + (int64_t{piece % kPiecesOfOneSize} << doubled));
}

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
  static_assert(kFirstPieceSlots % kKeys == 0, "pieces begin with a tile");
  const int first = max(piece.begin, static_cast<int>(first_slot_of_piece(piece.split)));
  const int last = min(piece.end, static_cast<int>(first_slot_of_piece(piece.split + 1)));
  piece.tile = first / kKeys;
  piece.end_tile = first < last ? (last + kKeys - 1) / kKeys : piece.tile;
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
      return factor / fmaf(factor, sum, exp2f(sink - top));
    }
  }
  return sum == 0.0f ? 0.0f : 1.0f / sum;
}

}  // namespace cerberus
