// Moves the accepted path's slots to the front, in every plane, then advances the lengths. A task owns one
// plane of a row.
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {

void commit_cache(const CommitCacheArgs& a, const Parallel& parallel) {
  const int64_t bytes = a.head_size * a.element_bytes;
  parallel_tasks(parallel, a.planes * a.rows, [&](int64_t task) {
    const int64_t row = task % a.rows, length = a.length[row];
    const int64_t places = smaller(a.path_places, static_cast<int64_t>(a.accepted[row]) + 1);
    const int32_t* path = a.path + row * a.path_places;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      char* slots = static_cast<char*>(a.cache) + (task * a.kv_heads + head) * a.capacity * bytes;
      for (int64_t j = 0; j < places; ++j) {
        const int64_t from = length + path[j], to = length + j;
        // Values are not checked by the op; what lies outside of the cache is left alone.
        if (from == to || from < 0 || to < 0 || from >= a.capacity || to >= a.capacity) continue;
        __builtin_memcpy(slots + to * bytes, slots + from * bytes, static_cast<size_t>(bytes));
      }
    }
  });
  for (int64_t row = 0; row < a.rows; ++row) a.length[row] += a.accepted[row] + 1;
}

}  // namespace cerberus::CERBERUS_ISA
