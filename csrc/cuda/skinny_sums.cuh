// The sums of a tile of a product, with tensor cores and without, see skinny.cuh. Both kinds end with writing
// them, of kRows rows of X by 16 weight rows, to shared memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "copy.cuh"
#include "reduce.cuh"
#include "skinny_split.cuh"
#include "skinny_weights.cuh"

namespace cerberus {

// Rows of X. They are read through the L1 cache: the warps of a multiprocessor share them, and they may have
// been written in this very launch, before a grid barrier.
template <typename T>
struct XRows {
  const T* first;
  int stride;  // 64 rows are less than 2^31 elements apart, see kMaxRowStates
  int rows;
};

// What a lane reads of them for a chunk; zeros where there is nothing.
template <typename T, int kVector, int kCount>
struct States {
  Pack<T, kVector> row[kCount];

  // x: the lane's rows; exist: it has columns there.
  __device__ States(const XRows<T>& x, int column, bool exist) {
    const T* from = x.first + column;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      row[i] = load_if<kVector>(exist && i < x.rows, from);
      from += x.stride;
    }
  }
};

template <typename T, int kVector, int kRowTiles>
class TensorSums {
 public:
  static constexpr int kRows = 16 * kRowTiles, kLaneRows = 2 * kRowTiles;
  using States = cerberus::States<T, kVector, kLaneRows>;

  // A lane reads rows g, g + 8, ... of X.
  __device__ static XRows<T> rows_of_lane(const XRows<T>& x) {
    const int g = lane_index() / 4;
    return {x.first + static_cast<int64_t>(g) * x.stride, 8 * x.stride, (x.rows - g + 7) / 8};
  }

  __device__ void add(const WeightPair<T, kVector>& weights, const States& x, int) {
    uint32_t low[4], high[4];
    std::memcpy(low, &weights.low, sizeof(low));
    std::memcpy(high, &weights.high, sizeof(high));
    const uint32_t first[4] = {low[0], high[0], low[1], high[1]};
    const uint32_t second[4] = {low[2], high[2], low[3], high[3]};
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      uint32_t state[4];
      std::memcpy(state, &x.row[i], sizeof(state));
      mma_16x8x16<T>(sum_[i], first, {state[0], state[1]});
      mma_16x8x16<T>(sum_[i], second, {state[2], state[3]});
    }
  }
  // sums: of the slice; first: weight row of the round where the tile begins.
  __device__ void store(float* sums, const ProductSplit& split, int first) const {
    const int weight_row = first + lane_index() / 4, row = lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4 * kLaneRows; ++i)
      sums[split.sum_index(row + i / 4 * 8 + i % 2, weight_row + i / 2 % 2 * 8)] = sum_[i / 4][i % 4];
  }

 private:
  // As the product leaves them: weight rows g and g + 8, each with rows 2t and 2t + 1 of 8 of X.
  float sum_[kLaneRows][4] = {};
};

template <typename T, int kVector>
class FmaSums {
 public:
  static constexpr int kRows = 8;
  using States = cerberus::States<T, kVector, kRows>;

  // Every lane reads every row of X.
  __device__ static XRows<T> rows_of_lane(const XRows<T>& x) { return x; }

  // rows: of X, past which there is nothing to add.
  __device__ void add(const WeightPair<T, kVector>& weights, const States& x, int rows) {
    float low[kVector], high[kVector];
    weights.low.unpack(low);
    weights.high.unpack(high);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= rows) break;
      float state[kVector];
      x.row[row].unpack(state);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        part_[2 * row] += low[i] * state[i];
        part_[2 * row + 1] += high[i] * state[i];
      }
    }
  }
  // The four lanes of a weight row add up: two steps halve the values that a lane carries.
  __device__ void store(float* sums, const ProductSplit& split, int first) const {
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
    const int column = first + lane_index() / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[split.sum_index(2 * t + i / 2, column + i % 2 * 8)] = quarter[i];
  }

 private:
  float part_[2 * kRows] = {};  // [row of X][weight row g or g + 8]: the sum over the lane's columns
};

}  // namespace cerberus
