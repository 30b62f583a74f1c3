// Sizes that the kernels of a level share with what is compiled once.
#pragma once

#include <cstdint>

namespace cerberus {

// How many rows of the projection one part of draft_topk has; its logits of several states fit into the L1
// cache.
constexpr int64_t kDraftTopkPart = 512;

// Weight rows that lie side by side in packed weights. In four bits: k of a step, its bytes, and those at the
// end of a tile, see four_bits.h.
constexpr int kPackedWeights = 3;
constexpr int64_t kFourBitStep = 32, kFourBitStepBytes = kPackedWeights * (kFourBitStep / 2 + 2 * 4),
                  kFourBitTileEnd = 8;

}  // namespace cerberus
