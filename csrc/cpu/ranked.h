// The largest elements of a row, for kernels of all levels: compiled once, with the standard library.
#pragma once

#include <cstdint>

namespace cerberus {

struct Ranked {
  float value;
  int32_t place;  // in the row
};

// Puts the `count` largest of `size` elements first, in order, 1 <= count <= size: NaN counts as the largest.
// Which of equal elements come first, and in which order, is what torch.topk on a CPU makes of them.
void rank(Ranked* elements, int64_t size, int64_t count);

}  // namespace cerberus
