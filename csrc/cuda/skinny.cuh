// Products Y = W X^T of a huge W (M weight rows, C columns) and a few rows of X: what head_stack and
// draft_topk have in common. Every weight is used once per row of X, so that the time is that of reading W.
//
// A warp computes a tile, 16 weight rows, for 16, 32 or 64 rows of X (8 without tensor cores), over its slice
// of the columns. Lane 4 g + t reads rows g and g + 8 of the tile, at column t * kVector of a chunk of 4 *
// kVector columns 16 bytes each, straight into registers: four lanes read 64 consecutive bytes, and two
// chunks are asked for together, the halves of a cache line. For 16-bit types the four registers of a load
// are the B operands of two products mma_16x8x16 just as they are, and X is the A operand, read in the same
// way: a lane's 8 elements count as its columns 2t, 2t+1, 2t+8 and 2t+9 of both, for a sum does not care
// about the order. The tensor cores add up the four lanes; no weight passes through shared memory or a
// shuffle. With float32, and with rows that do not start at multiples of 16 bytes, a lane multiplies its
// columns itself.
//
// The weights of the next kDepth chunks are always on their way, across the border of a tile and across
// everything that happens there: a lane multiplies a chunk and asks at once for the one kDepth further on in
// the block's walk. A chunk of a warp is 1 KiB. 2 blocks of 8 warps on a multiprocessor with kDepth 6, for up
// to 16 rows of X, have 96 KiB in flight, the other kinds 64 KiB (2 blocks with kDepth 4 or 1 with 8); loads
// of single elements, for rows at odd addresses, 8 or 16 KiB. Where an access takes 1 us, 3.35 TB/s over 132
// multiprocessors need 25 KB on each: slices that are shorter than kDepth chunks do no harm either.
//
// A block owns consecutive tiles. Its 8 warps take 8 / slices of them at a time, and `slices` warps share
// the columns of one. How the columns are split depends on the shape of W and the device alone, never on the
// rows of X, and so do the order of every sum and its result, to the last bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "copy.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace cerberus {

constexpr int kProductThreads = 256;
constexpr int kProductWarps = kProductThreads / kLanes;
constexpr int kTileRows = 16;  // weight rows of a tile

// ---------------------------------------------------------------- how a product is split

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

  // The sums of a round in shared memory: [slice][row of X][weight row], at most 48 KiB. From one row of X to
  // the next it is 8 more than a multiple of 16, so that 16 lanes, which write pairs of sums of four rows,
  // meet 32 different banks.
  __host__ __device__ constexpr int pitch() const { return round_rows() + 8; }
  int64_t shared_bytes(int x_rows) const {
    return (static_cast<int64_t>(x_rows) * pitch() << log_slices) * static_cast<int64_t>(sizeof(float));
  }
};

// ---------------------------------------------------------------- what a lane reads

// Its weights of a chunk: of rows g and g + 8 of the tile.
template <typename T, int kVector>
struct WeightPair {
  Pack<T, kVector> low, high;
};

template <typename T, int kVector>
__device__ inline WeightPair<T, kVector> load_weights(const T* low, int to_high, bool exist) {
  if (!exist) return {};
  return {load_once<kVector>(low), load_once<kVector>(low + to_high)};
}

// Where rows g and g + 8 begin.
template <typename T>
struct WeightRows {
  const T* low;
  int to_high;
  bool exist;  // else they are zeros, and nothing is read
};

// Rows of X. They are read through the L1 cache: the warps of a multiprocessor share them, and they may have
// been written in this very launch, before a grid barrier.
template <typename T>
struct XRows {
  const T* first;
  int stride;  // 64 rows are less than 2^31 elements apart, see kMaxRowStates
  int rows;
};

// ---------------------------------------------------------------- the sums of a tile

// Both kinds end with writing their sums, of kRows rows of X by 16 weight rows, to shared memory.

template <typename T, int kVector, int kRowTiles>
class TensorSums {
 public:
  static constexpr int kRows = 16 * kRowTiles;

  // A lane reads rows g, g + 8, ... of X.
  __device__ static XRows<T> rows_of_lane(const XRows<T>& x) {
    const int g = lane_index() / 4;
    return {x.first + static_cast<int64_t>(g) * x.stride, 8 * x.stride, (x.rows - g + 7) / 8};
  }

  // x: the lane's rows, from its columns of the chunk on; exist: it has columns there.
  __device__ void add(const WeightPair<T, kVector>& weights, const XRows<T>& x, int column, bool exist) {
    uint32_t low[4], high[4];
    std::memcpy(low, &weights.low, sizeof(low));
    std::memcpy(high, &weights.high, sizeof(high));
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      uint32_t state[2][4];  // rows g and g + 8 of the tile
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Pack<T, kVector> pack = {};
        if (exist && 2 * tile + i < x.rows)
          pack = load<kVector>(x.first + (2 * tile + i) * x.stride + column);
        std::memcpy(state[i], &pack, sizeof(pack));
      }
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        const uint32_t rows[4] = {state[0][half], state[1][half], state[0][half + 1], state[1][half + 1]};
        mma_16x8x16<T>(sum_[tile][0], rows, {low[half], low[half + 1]});
        mma_16x8x16<T>(sum_[tile][1], rows, {high[half], high[half + 1]});
      }
    }
  }
  // sums: of the tile; from one row of X to the next it is `pitch`.
  __device__ void store(float* sums, int pitch) const {
    float* const to = sums + lane_index() / 4 * pitch + lane_index() % 4 * 2;
#pragma unroll
    for (int row = 0; row < kRows; row += 8) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* const sum = &sum_[row / 16][half][row % 16 / 4];
        *reinterpret_cast<float2*>(to + row * pitch + half * 8) = make_float2(sum[0], sum[1]);
      }
    }
  }

 private:
  // As the product leaves them: rows g and g + 8 of X, each with weight rows 2t and 2t + 1 of 8.
  float sum_[kRowTiles][2][4] = {};
};

template <typename T, int kVector>
class FmaSums {
 public:
  static constexpr int kRows = 8;

  // Every lane reads every row of X.
  __device__ static XRows<T> rows_of_lane(const XRows<T>& x) { return x; }

  __device__ void add(const WeightPair<T, kVector>& weights, const XRows<T>& x, int column, bool exist) {
    float low[kVector], high[kVector];
    weights.low.unpack(low);
    weights.high.unpack(high);
    const T* from = x.first + column;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= x.rows) break;
      float state[kVector] = {};
      if (exist) load<kVector>(from).unpack(state);
      from += x.stride;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        part_[2 * row] += low[i] * state[i];
        part_[2 * row + 1] += high[i] * state[i];
      }
    }
  }
  // The four lanes of a weight row add up: two steps halve the values that a lane carries.
  __device__ void store(float* sums, int pitch) const {
    float half[8], quarter[4];
    const int t = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float keep = t >= 2 ? part_[8 + i] : part_[i], give = t >= 2 ? part_[i] : part_[8 + i];
      half[i] = keep + shuffle_xor(give, 2);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float keep = t % 2 ? half[4 + i] : half[i], give = t % 2 ? half[i] : half[4 + i];
      quarter[i] = keep + shuffle_xor(give, 1);
    }
    float* const to = sums + 2 * t * pitch + lane_index() / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i / 2 * pitch + i % 2 * 8] = quarter[i];
  }

 private:
  float part_[2 * kRows] = {};  // [row of X][weight row g or g + 8]: the sum over the lane's columns
};

// One kind of product: element type, elements of a load, 16 rows of X so many times (8 rows without tensor
// cores).
template <typename T, int kVectorSize, int kRowTiles>
struct Product {
  using Element = T;
  static constexpr bool kTensorCores = sizeof(T) == 2 && kVectorSize == 8;
  static_assert(kTensorCores || kRowTiles == 1, "more sums than registers");
  using Sums =
      std::conditional_t<kTensorCores, TensorSums<T, kVectorSize, kRowTiles>, FmaSums<T, kVectorSize>>;
  static constexpr int kVector = kVectorSize;
  static constexpr int kChunk = 4 * kVector;
  static constexpr int kRows = Sums::kRows;
  // On a multiprocessor, hence 128 registers a thread or 255; more rows of X have more sums.
  static constexpr int kResidentBlocks = kRowTiles == 1 ? 2 : 1;
  // As many chunks as the registers have room for.
  static constexpr int kDepth = kRowTiles > 1 ? 8 : kTensorCores ? 6 : 4;
};

// f(Product{}) for the element type and the number of rows of X; more rows than a product has are taken in
// groups. The pointers are the starts of everything that is read in rows of `size` elements.
template <typename F, typename... Pointers>
cudaError_t dispatch_product(DType dtype, int64_t size, int64_t x_rows, F&& f, Pointers... pointers) {
  return dispatch_vector(
      dtype, size,
      [&](auto element, auto vector) {
        using T = decltype(element);
        if constexpr (Product<T, vector(), 1>::kTensorCores) {
          if (x_rows > 32) return f(Product<T, vector(), 4>{});
          if (x_rows > 16) return f(Product<T, vector(), 2>{});
        }
        return f(Product<T, vector(), 1>{});
      },
      pointers...);
}

// ---------------------------------------------------------------- a block's walk over its tiles

// The sums of one round, for the threads of the block to read as they like.
template <typename Product>
struct RoundSums {
  const float* shared;
  const ProductSplit& split;

  // Of row `row` of X and weight row `weight_row` of the round: the slices are added in their order.
  __device__ float at(int row, int weight_row) const {
    const float* const sums = shared + row * split.pitch() + weight_row;
    float sum = sums[0];
#pragma unroll 1
    for (int slice = 1; slice < 1 << split.log_slices; ++slice)
      sum += sums[slice * Product::kRows * split.pitch()];
    return sum;
  }
};

// All rounds of a block. `work` says what is multiplied and what becomes of it:
//   Place first(), after(place); bool is_over(place)   the rounds; a place has the first `tile` of a round
//   WeightRows<T> weights(place, tile, part)   called a round ahead, and once more at the end of the walk
//   XRows<T> x(place, tile, part)              what they are multiplied with
//   void finish(place, RoundSums)              by all threads, the sums of the round being complete
// A warp may be left without a tile at the end of a walk: it has no weights and no rows of X.
template <typename Product, typename Work>
__device__ inline void multiply(const ProductSplit& split, int part_columns, Work& work) {
  using T = typename Product::Element;
  constexpr int kVector = Product::kVector, kChunk = Product::kChunk, kDepth = Product::kDepth;
  float* const shared = dynamic_shared<float>();

  const int slice = warp_index() & ((1 << split.log_slices) - 1), tile = warp_index() >> split.log_slices;
  const int log_part_slices = split.log_slices - split.log_parts;
  const int part = slice >> log_part_slices, slice_of_part = slice & ((1 << log_part_slices) - 1);
  const int64_t chunks = (part_columns + kChunk - 1) / kChunk;
  const int begin = static_cast<int>(chunks * slice_of_part >> log_part_slices) * kChunk;
  const int size = static_cast<int>(chunks * (slice_of_part + 1) >> log_part_slices) * kChunk - begin;
  // Of the lane; in the last chunk of a part it may have fewer columns than others.
  const int lane_begin = begin + lane_index() % 4 * kVector;
  const int lane_size = min(size, part_columns - lane_begin);

  auto place = work.first();
  WeightRows<T> ahead = work.weights(place, place.tile + tile, part);
  ahead.low += lane_begin;
  WeightPair<T, kVector> weights[kDepth];
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    weights[i] = load_weights<T, kVector>(ahead.low + i * kChunk, ahead.to_high,
                                          ahead.exist && i * kChunk < lane_size);
  }

  while (!work.is_over(place)) {
    XRows<T> x = Product::Sums::rows_of_lane(work.x(place, place.tile + tile, part));
    x.first += lane_begin;
    assume_global(x.first);
    typename Product::Sums sums;
    for (int column = 0; column < size; column += kDepth * kChunk) {
      // Where the loads go on: in the next columns of the tile or at the beginning of the next tile.
      int next = column + kDepth * kChunk;
      ahead.low += kDepth * kChunk;
      if (next >= size) {
        next = 0;
        const auto next_place = work.after(place);
        ahead = work.weights(next_place, next_place.tile + tile, part);
        ahead.low += lane_begin;
      }
      const int left = lane_size - column, left_ahead = ahead.exist ? lane_size - next : 0;
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        sums.add(weights[i], x, i * kChunk, i * kChunk < left);
        weights[i] = load_weights<T, kVector>(ahead.low + i * kChunk, ahead.to_high, i * kChunk < left_ahead);
        // Else the compiler multiplies all chunks before it asks for the next. Two at a time read X together.
        if (i % 2 == 1) warp_barrier();
      }
      x.first += kDepth * kChunk;
    }

    __syncthreads();  // the round before is finished
    sums.store(shared + slice * Product::kRows * split.pitch() + tile * kTileRows, split.pitch());
    __syncthreads();
    work.finish(place, RoundSums<Product>{shared, split});
    place = work.after(place);
  }
}

}  // namespace cerberus
