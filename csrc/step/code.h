// The numbers that a step's code is made of, see step.h.
#pragma once

#include <cstdint>

namespace cerberus {

constexpr int64_t kProductStage = 0, kRowsStage = 1, kAttentionStage = 2, kGroupedStage = 3, kPartStage = 4;
constexpr int64_t kNoSpace = 0, kScratchSpace = 1, kBufferSpace = 2, kConstantSpace = 3, kPositionSpace = 4,
                  kTokenSpace = 5, kKeysSpace = 6, kValuesSpace = 7, kNumberSpace = 8;

}  // namespace cerberus
