// Weights in eight bits, for what only drafts depend on: of a row the integers q from -127 to 127 and d, each
// weight being d q, nearly. The memory that drafting reads is what it costs.
//
//   packed (tiles): d of the kEightBitRows weight rows of a tile, float32, then of every two k the q of all
//   of them, two and two; zeros beyond the last k and the last row
//
// The rows beside them are rounded to integers, too, of as many bits as leave every sum within 32: sums are
// exact, whatever their order. Numbers that are not finite make a row's products NaN.
#pragma once

#include "cpu/parts.h"
#include "cpu/product.h"

namespace cerberus::CERBERUS_ISA {

constexpr int64_t kLargestWeight = 127;

// k of a row, with the zero behind an odd number of them.
static inline int64_t eight_bit_size(int64_t size) { return (size + 1) / 2 * 2; }

// Elements from one row in integers to the next: whole vectors, zeros behind the last k.
static inline int64_t eight_bit_stride(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

static inline int64_t eight_bit_tile_bytes(int64_t size) {
  return kEightBitRows * (static_cast<int64_t>(sizeof(float)) + eight_bit_size(size));
}

// Rows as such weights take them.
class EightBitRows {
 public:
  EightBitRows(int64_t rows, int64_t size)
      : size_(size), stride_(eight_bit_stride(size)), integers_(rows * stride_), scales_(rows) {}

  // Row `row` becomes these `size` numbers.
  template <typename T>
  void lay(int64_t row, const T* from);

  int64_t size() const { return size_; }
  const int16_t* row(int64_t row) const { return integers_.data + row * stride_; }
  float scale(int64_t row) const { return scales_.data[row]; }

 private:
  int64_t size_, stride_;
  Buffer<int16_t> integers_;
  Scratch scales_;
};

// Rows `first` to first + rows times weight rows `begin` to `end`; begin is where a tile begins. The output's
// row 0 and weight 0 are those of `first` and `begin`.
template <typename T>
void rows_times_eight_bits(const EightBitRows& x, int64_t first, int64_t rows, const char* packed,
                           int64_t begin, int64_t end, const Output<T>& output);

// What head_stack and draft_topk multiply rows with: blocks of `block_rows` weight rows, as they are or in
// eight bits.
template <typename T>
class DenseBlocks {
 public:
  DenseBlocks(const void* weight, int64_t block_rows, int64_t size, int64_t rows)
      : weight_(static_cast<const T*>(weight)),
        block_rows_(block_rows),
        size_(size),
        stride_(row_elements<T>(size)),
        rows_(rows * stride_) {}
  static int64_t rows_per_task(int64_t size) { return weight_rows_per_task(size, sizeof(T)); }

  void lay(int64_t row, const T* from) { lay_row(from, size_, rows_.data + row * stride_); }
  void multiply(int64_t first, int64_t rows, int64_t block, int64_t begin, int64_t end,
                const Output<T>& output) const {
    rows_times_weights(rows_.data + first * stride_, stride_, rows,
                       weight_ + (block * block_rows_ + begin) * size_, 0, end - begin, size_, output);
  }

 private:
  const T* weight_;
  int64_t block_rows_, size_, stride_;
  Buffer<Row<T>> rows_;
};

template <typename T>
class EightBitBlocks {
 public:
  EightBitBlocks(const void* weight, int64_t block_rows, int64_t size, int64_t rows)
      : packed_(static_cast<const char*>(weight)),
        block_bytes_((block_rows + kEightBitRows - 1) / kEightBitRows * eight_bit_tile_bytes(size)),
        rows_(rows, size) {}
  static int64_t rows_per_task(int64_t size) { return weight_rows_per_task(size, 1, kEightBitRows); }

  void lay(int64_t row, const T* from) { rows_.lay(row, from); }
  void multiply(int64_t first, int64_t rows, int64_t block, int64_t begin, int64_t end,
                const Output<T>& output) const {
    rows_times_eight_bits(rows_, first, rows, packed_ + block * block_bytes_, begin, end, output);
  }

 private:
  const char* packed_;
  int64_t block_bytes_;
  EightBitRows rows_;
};

}  // namespace cerberus::CERBERUS_ISA
