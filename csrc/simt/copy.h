// What the PTX of cuda/copy.cuh means, on a host. Only that file includes this one.
#pragma once

#include "simt/emulator.h"

namespace cerberus {

template <typename T>
inline T* dynamic_shared() {
  return static_cast<T*>(simt::dynamic_shared());
}

inline void start_copy16(void* shared, const void* global, bool valid) {
  simt::start_copy(shared, global, valid);
}
inline void end_copies() { simt::end_copies(); }
template <int kPending>
inline void wait_for_copies() {
  simt::wait_for_copies(kPending);
}

inline void prefetch_l2(const void*) {}
inline void assume_global(const void*) {}

inline void wait_for_previous_launch() { simt::wait_for_previous_launch(); }
inline void allow_next_launch() { simt::allow_next_launch(); }

}  // namespace cerberus
