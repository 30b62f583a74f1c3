// Products Y = W X^T of a huge W (M weight rows, C columns) and a few rows of X: what head_stack, draft_topk
// and the products of a step have in common. Every weight is used once per row of X, so that the time is that
// of reading W.
//
// A warp computes a tile, 16 weight rows, for 16, 32 or 64 rows of X (8 without tensor cores), over its slice
// of the columns. Lane 4 g + t takes rows g and g + 8 of the tile, at column t * kVector of a chunk of 4 *
// kVector columns 16 bytes each: four lanes read 64 consecutive bytes. For 16-bit types they are the A
// operands of two products mma_16x8x16, and X is the B operand, read in the same way: a lane's 8 elements
// count as its columns 2t, 2t+1, 2t+8 and 2t+9 of both, for a sum does not care about the order. The tensor
// cores add up the four lanes; no weight passes to another lane. With float32, and with rows that do not
// start at multiples of 16 bytes, a lane multiplies its columns itself.
//
// The weights of the next chunks are always on their way, across the border of a tile and across everything
// that happens there (WeightRing in skinny_weights.cuh): of kStages chunks, 1 KiB for a warp, all but the one
// that is waited for, 56 KiB a block. Where an access takes 1 us, 4.8 TB/s over 132 multiprocessors need
// 36 KB on each. What a loop's machine code really keeps in flight is checked by bench/in_flight.py.
//
// A block owns consecutive tiles. Its 8 warps take 8 / slices of them at a time, and `slices` warps share
// the columns of one (skinny_split.cuh). How the columns are split depends on the shape of W and the device
// alone, never on the rows of X, and so do the order of every sum and its result, to the last bit.
#pragma once

#include <cstdint>
#include <type_traits>

#include "copy.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "skinny_split.cuh"
#include "skinny_sums.cuh"
#include "skinny_weights.cuh"

namespace cerberus {

// One kind of product: element type, elements of a load, 16 rows of X so many times (8 rows without tensor
// cores). skinny_blocks.cuh has others.
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
  // On a multiprocessor, hence 128 registers a thread.
  static constexpr int kResidentBlocks = 2;

  static constexpr bool kInBlocks = false;  // its weights, see skinny_blocks.cuh
  static constexpr bool kRing = kVector > 1;
  static constexpr int kStages = 8;  // of the ring
  static constexpr int kBatch = 8;   // chunks that are loaded at once without a ring
  static constexpr int kRingBytes = kRing ? kStages * kProductThreads * 2 * 16 : 0;
  // The ring, then the sums.
  static constexpr int kSharedBytes =
      kRingBytes + kRows * ProductSplit::kSumsOfRow * static_cast<int>(sizeof(float));
  static_assert(kSharedBytes <= 99 << 10, "what a block may have on the smallest of our devices, 8.6");
  // How the weights of a Work come.
  template <typename Work>
  using Stream = std::conditional_t<kRing, WeightRing<Product, Work>, WeightLoads<Product, Work>>;
};

// f(Product{}) for the element type and the number of rows of X; more rows than a product has are taken in
// groups. The pointers are the starts of everything that is read in rows of `size` elements. kMostRows: for
// work that never has more rows of X than that, no kernels are made for more.
template <int kMostRows = 64, typename F, typename... Pointers>
cudaError_t dispatch_product(DType dtype, int64_t size, int64_t x_rows, F&& f, Pointers... pointers) {
  return dispatch_vector(
      dtype, size,
      [&](auto element, auto vector) {
        using T = decltype(element);
        if constexpr (Product<T, vector(), 1>::kTensorCores) {
          if constexpr (kMostRows > 32)
            if (x_rows > 32) return f(Product<T, vector(), 4>{});
          if constexpr (kMostRows > 16)
            if (x_rows > 16) return f(Product<T, vector(), 2>{});
        }
        return f(Product<T, vector(), 1>{});
      },
      pointers...);
}

// The sums of one round, for the threads of the block to read as they like.
template <typename Product>
struct RoundSums {
  float* shared;
  const ProductSplit& split;

  __device__ float* of_slice(int slice) const {
    return shared + (slice * Product::kRows << split.log_round_rows());
  }
  // Of row `row` of X and weight row `weight_row` of the round: the slices are added in their order.
  __device__ float at(int row, int weight_row) const {
    const int index = split.sum_index(row, weight_row);
    float sum = shared[index];
#pragma unroll 1
    for (int slice = 1; slice < 1 << split.log_slices; ++slice) sum += of_slice(slice)[index];
    return sum;
  }
};

// All rounds of a block. `work` says what is multiplied and what becomes of it:
//   void begin()   by all threads, when the first weights have been asked for and before anything else is
//   read Place first(), after(place); bool is_over(place)   the rounds; a place has the first `tile` of a
//   round WeightRows<T> weights(place, tile, part)   called rounds ahead, and more than once at the end of
//   the walk XRows<T> x(place, tile, part)              what they are multiplied with void finish(place,
//   RoundSums)              by all threads, the sums of the round being complete
// Of weights in blocks, weights() gives WeightBlocks.
// A warp may be left without a tile at the end of a walk: it has no weights and no rows of X.
template <typename Product, typename Work>
__device__ inline void multiply(const ProductSplit& split, int part_columns, Work& work) {
  using T = typename Product::Element;
  using Sums = typename Product::Sums;
  using States = typename Sums::States;
  const WarpSlice slice(split, part_columns, Product::kChunk, Product::kVector);
  typename Product::template Stream<Work> stream(slice, work);
  work.begin();
  const RoundSums<Product> round{dynamic_shared<float>() + Product::kRingBytes / sizeof(float), split};

  for (auto place = work.first(); !work.is_over(place); place = work.after(place)) {
    XRows<T> x = Sums::rows_of_lane(work.x(place, place.tile + slice.tile, slice.part));
    x.first += slice.lane_begin;
    assume_global(x.first);
    Sums sums;
    // X comes while the weights of the same chunk are waited for: it has no ring.
    States states(x, 0, slice.lane_size > 0);
    stream.for_each_chunk([&](const auto& weights, int column) {
      sums.add(weights, states, x.rows);
      const int next = column + Product::kChunk;
      states = States(x, next, next < slice.lane_size);
    });

    __syncthreads();  // the round before is finished
    sums.store(round.of_slice(slice.index), split, slice.tile * kTileRows);
    __syncthreads();
    work.finish(place, round);
  }
  stream.finish();
}

}  // namespace cerberus
