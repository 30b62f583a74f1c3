// How a kernel spreads its tasks over threads, without knowing whose threads they are.
#pragma once

#include <cstdint>

namespace cerberus {

struct Parallel {
  using Body = void (*)(const void* state, int64_t task);
  // Calls body(state, task) for every task in [0, tasks), on several threads, in any order, and returns when
  // all are done. A kernel's bits may not depend on the order, nor on which thread does what.
  void (*run)(int64_t tasks, Body body, const void* state);
  int64_t threads;  // at most so many at a time
};

}  // namespace cerberus
