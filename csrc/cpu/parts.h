// Sizes that the kernels of a level share with what is compiled once.
#pragma once

#include <cstdint>

namespace cerberus {

// How many rows of the projection one part of draft_topk has; its logits of several states fit into the L1
// cache.
constexpr int64_t kDraftTopkPart = 512;

// Weight rows that lie side by side in packed weights.
constexpr int kPackedWeights = 3;

// In four bits, see four_bits.h: k of a step and bytes of its scales; bytes of a tile's codes, four times 16
// at once, of its end, and in all.
constexpr int64_t kFourBitStep = 32, kFourBitScaleBytes = kPackedWeights * 2 * 4, kFourBitTileEnd = 8;
static inline int64_t four_bit_code_bytes(int64_t size) {
  return (size / kFourBitStep * kPackedWeights + 3) / 4 * 64;
}
static inline int64_t four_bit_tile_bytes(int64_t size) {
  return four_bit_code_bytes(size) + size / kFourBitStep * kFourBitScaleBytes + kFourBitTileEnd;
}

// Weight rows of a tile in eight bits, see eight_bits.h.
constexpr int kEightBitRows = 16;

}  // namespace cerberus
