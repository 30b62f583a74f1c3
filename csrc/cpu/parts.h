// How many rows of the projection one part of draft_topk has; its logits of several states fit into the L1
// cache.
#pragma once

#include <cstdint>

namespace cerberus {
constexpr int64_t kDraftTopkPart = 512;
}
