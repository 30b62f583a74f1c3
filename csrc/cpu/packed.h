// Products with packed weights: every tile of weight rows lies in memory as its loop over k reads it, so that
// a step streams all weights from the first byte to the last.
//
//   packed (tiles, steps, kPackedWeights, kStep): step s of weight row t * kPackedWeights + n, zeros beyond
//   the last k and the last row
//
// The sums are those of rows_times_weights, to the same bits.
#pragma once

#include "cpu/dot.h"
#include "cpu/parts.h"
#include "cpu/product.h"

namespace cerberus::CERBERUS_ISA {

template <typename T>
constexpr int64_t packed_tile(int64_t size) {
  constexpr int kStep = Product<Row<T>>::kStep;
  return (size + kStep - 1) / kStep * kStep * kPackedWeights;
}

// Rows x (rows, size), x_stride apart, times weight rows `begin` to `end` of `packed`; begin is where a tile
// begins.
template <typename T>
void rows_times_packed(const Row<T>* x, int64_t x_stride, int64_t rows, const T* packed, int64_t begin,
                       int64_t end, int64_t size, const Output<T>& output);

#if defined(__AVX512F__)
// The same of weights in blocks, see pack_blocks.h; in bytes: of no more than kMostRowsOfBytes rows.
void rows_times_blocks(Packing packing, const Row<BFloat16>* x, int64_t x_stride, int64_t rows,
                       const char* packed, int64_t begin, int64_t end, int64_t size,
                       const Output<BFloat16>& output);
#endif

}  // namespace cerberus::CERBERUS_ISA
