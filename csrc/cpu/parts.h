// Sizes that the kernels of a level share with what is compiled once.
#pragma once

#include <cstdint>

namespace cerberus {

// How many rows of the projection one part of draft_topk has; its logits of several states fit into the L1
// cache.
constexpr int64_t kDraftTopkPart = 512;

// Weight rows that lie side by side in packed weights.
constexpr int kPackedWeights = 3;

// Weight rows of a tile in eight bits, see eight_bits.h.
constexpr int kEightBitRows = 16;

}  // namespace cerberus
