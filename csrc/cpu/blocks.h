// When products share work between the rows of a call, see gemm.cpp.
#pragma once

#include <cstdint>

namespace cerberus {

// From so many rows on (and where weights have to be widened) a task's weights are widened once for all of
// them, and long rows are taken a block of k at a time. Of fewer the first pass costs what the others save.
constexpr int64_t kManyRows = 64, kManyLongRows = 32;

}  // namespace cerberus
