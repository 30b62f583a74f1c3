// Weights of bfloat16 in blocks as the CUDA kernels read them (cuda/skinny_blocks.cuh): every 32 of a row
// along k are d q + m, rounded, for q of four or five bits, or d q for q of eight, with a d for all 32
// (Packing::kBytes) or for every 16 (kBytesOf16).
//
//   packed (tiles of 16 rows, chunks of 32 columns): rows beyond the last one are zeros
//
// A chunk is what a warp reads at once. Lane 4 g + t multiplies rows g and g + 8 at columns 8 t to 8 t + 7,
// and finds there
//   four bits:  codes (lane, 2): a word for each of its rows. Byte i has q of column 2 i in its lower half,
//               that of column 2 i + 1 in its upper one.
//   five bits:  the lowest four bits of q in the same way; then (lane) 16 of the highest ones: of its first
//               row's even columns, its odd ones, then of the other row's
//   bytes:      codes (lane, 2, 2): a word of even columns, one of odd ones, of q + 128
// and behind these the scales of all rows, in float32
//   four, five: (g, 2): d and m of row g, of row g + 8
//   bytes:      (half of the columns where there are two, g): d of row g, of row g + 8
//
// Of few bits, q is added to the bits of the float32 number 32, and what comes out multiplied by d: the m
// that is packed is less by 32 d, and one multiply-add makes the weight. Packing checks each of them, since
// that m may have no float32 number, but for the sign of a zero: a sum that begins with +0 does not depend on
// it.
#pragma once

#include <cstdint>

#include "args.h"

namespace cerberus {

constexpr int kBlockTileRows = 16, kBlockColumns = 32;
constexpr int kFewBitsFrom = 32;  // that is added to q

// Where in a chunk what lies, in bytes.
struct DeviceChunk {
  int high, scales, bytes;  // bytes: of the chunk, a multiple of 16; 0: there are none such
};
constexpr DeviceChunk device_chunk(Packing packing) {
  switch (packing) {
    case Packing::kFourBits:
      return {256, 256, 384};
    case Packing::kFiveBits:
      return {256, 320, 448};
    case Packing::kBytes:
      return {512, 512, 576};
    case Packing::kBytesOf16:
      return {512, 512, 640};
    default:
      return {};
  }
}

// 0: there are none such.
constexpr int64_t device_block_bytes(Packing packing, int64_t rows, int64_t size) {
  if (size % kBlockColumns != 0) return 0;
  return (rows + kBlockTileRows - 1) / kBlockTileRows * (size / kBlockColumns) * device_chunk(packing).bytes;
}

}  // namespace cerberus
