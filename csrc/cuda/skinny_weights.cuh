// The weights of a product on their way to the lanes that multiply them, see skinny.cuh.
#pragma once

#include <cstdint>

#include "copy.cuh"
#include "skinny_split.cuh"

namespace cerberus {

// A lane's weights of a chunk: of rows g and g + 8 of the tile.
template <typename T, int kVector>
struct WeightPair {
  Pack<T, kVector> low, high;
};

// Where rows g and g + 8 begin.
template <typename T>
struct WeightRows {
  const T* low;
  int to_high;
  bool exist;  // else they are zeros, and nothing is read
};

// The chunks of a warp in the order of its walk, from one tile to the next, through a ring in shared memory:
// kStages chunks are on their way or there, the oldest is multiplied, and the one kStages further on is asked
// for in its place. A lane reads back what it has copied itself, so that it waits for its own copies and no
// barrier is needed.
//
// With registers in place of the ring the hardware would have to say which loads have come. It counts them
// with six scoreboards a warp, and who waits for one waits for all that set it: the whole ring was drained
// again and again. Copies are counted one by one.
template <typename Product, typename Work>
class WeightRing {
 public:
  using T = typename Product::Element;
  using Weights = WeightPair<T, Product::kVector>;

  __device__ WeightRing(const WarpSlice& slice, const Work& work)
      : slice_(slice), work_(work), slots_(dynamic_shared<uint4>() + threadIdx.x), place_(work.first()) {
    begin_tile();
#pragma unroll 1
    for (int stage = 0; stage < Product::kStages; ++stage) start(slots_ + stage * kSlot);
  }

  // f(weights, column of the slice) for the chunks of the next tile.
  template <typename F>
  __device__ void for_each_chunk(F f) {
#pragma unroll 1
    for (int column = 0; column < slice_.size; column += Product::kChunk) {
      uint4* const slot = slots_ + stage_ * kSlot;
      wait_for_copies<Product::kStages - 1>();
      f(Weights{{slot[0]}, {slot[kProductThreads]}}, column);
      start(slot);
      stage_ = stage_ + 1 == Product::kStages ? 0 : stage_ + 1;
    }
  }

  // What was started behind the last tile are zeros, but a block does not end before its copies.
  __device__ void finish() const { wait_for_copies<0>(); }

 private:
  static constexpr int kSlot = 2 * kProductThreads;  // low and high of every thread

  // A group of copies for each chunk, also where nothing is read: the groups are counted.
  __device__ void start(uint4* slot) {
    const bool exist = rows_.exist && column_ < slice_.lane_size;
    start_copy16(slot, rows_.low, exist);
    start_copy16(slot + kProductThreads, rows_.low + rows_.to_high, exist);
    end_copies();
    column_ += Product::kChunk;
    rows_.low += Product::kChunk;
    if (column_ < slice_.size) return;
    if (!work_.is_over(place_)) place_ = work_.after(place_);
    begin_tile();
  }
  __device__ void begin_tile() {
    rows_ = work_.weights(place_, place_.tile + slice_.tile, slice_.part);
    rows_.low += slice_.lane_begin;
    column_ = 0;
  }

  const WarpSlice& slice_;
  const Work& work_;
  uint4* const slots_;  // of this thread in the first stage
  int stage_ = 0;       // that is multiplied next
  // What is asked for next.
  decltype(static_cast<const Work*>(nullptr)->first()) place_;
  WeightRows<T> rows_;
  int column_;
};

// The same for rows that do not start at multiples of 16 bytes, which no copy can move: single elements, of
// Product::kBatch chunks at a time.
template <typename Product, typename Work>
class WeightLoads {
 public:
  using T = typename Product::Element;
  using Weights = WeightPair<T, Product::kVector>;

  __device__ WeightLoads(const WarpSlice& slice, const Work& work)
      : slice_(slice), work_(work), place_(work.first()) {}

  template <typename F>
  __device__ void for_each_chunk(F f) {
    constexpr int kVector = Product::kVector, kChunk = Product::kChunk, kBatch = Product::kBatch;
    WeightRows<T> rows = work_.weights(place_, place_.tile + slice_.tile, slice_.part);
    rows.low += slice_.lane_begin;
    for (int first = 0; first < slice_.size; first += kBatch * kChunk) {
      Weights weights[kBatch] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int column = first + i * kChunk;
        if (!rows.exist || column >= slice_.lane_size) continue;
        weights[i] = {load_once<kVector>(rows.low + column),
                      load_once<kVector>(rows.low + rows.to_high + column)};
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) f(weights[i], first + i * kChunk);
    }
    place_ = work_.after(place_);
  }
  __device__ void finish() const {}

 private:
  const WarpSlice& slice_;
  const Work& work_;
  decltype(static_cast<const Work*>(nullptr)->first()) place_;
};

}  // namespace cerberus
