// Puts the nodes' keys and values into slots length .. length + N. A task owns one row's share of keys
// or values.
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {
namespace {

// Waking a thread takes longer than moving fewer bytes: a step of a small tree writes a few KiB, once per
// layer.
constexpr int64_t kWorthThreads = 256 << 10;

}  // namespace

void write_cache(const WriteCacheArgs& a, const Parallel& parallel) {
  const int64_t bytes = a.head_size * a.element_bytes;
  const auto write = [&](int64_t task) {
    const int64_t row = task / 2, length = a.length[row];
    const char* from = static_cast<const char*>(task % 2 ? a.new_values : a.new_keys);
    char* to = static_cast<char*>(task % 2 ? a.values : a.keys);
    if (length < 0 || length >= a.capacity) return;
    const int64_t nodes = smaller(a.nodes, a.capacity - length);  // what does not fit is left out
    for (int64_t node = 0; node < nodes; ++node)
      for (int64_t head = 0; head < a.kv_heads; ++head)
        __builtin_memcpy(to + ((row * a.kv_heads + head) * a.capacity + length + node) * bytes,
                         from + ((row * a.nodes + node) * a.kv_heads + head) * bytes,
                         static_cast<size_t>(bytes));
  };
  if (bytes == 0 || a.kv_heads == 0 || a.nodes == 0) return;  // the other sizes may then be anything
  if (2 * a.rows * a.nodes * a.kv_heads * bytes < kWorthThreads) {
    for (int64_t task = 0; task < 2 * a.rows; ++task) write(task);
  } else {
    parallel_tasks(parallel, 2 * a.rows, write);
  }
}

}  // namespace cerberus::CERBERUS_ISA
