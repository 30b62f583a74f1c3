// Stand-in for the toolkit's header of this name: the barrier of a cooperative launch.
#pragma once

#include "emulator.h"

namespace cooperative_groups {

struct grid_group {
  void sync() const { simt::grid_barrier(); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
