// Entropy of softmax(hidden) in nats: logsumexp(x) - sum p x. A task owns a row: its maximum, then one pass
// for both sums.
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {
namespace {

// With y = x - max: log sum e^y - sum e^y y / sum e^y; nothing overflows, and what is -inf adds nothing.
template <typename T>
float entropy(const T* x, int64_t size) {
  Vec tops = broadcast(-__builtin_inff());  // never a NaN: one makes the sums NaN
  int64_t whole = 0;
  for (; whole + kLanes <= size; whole += kLanes) {
    const Vec here = load(x + whole);
    tops = select(here > tops, here, tops);
  }
  float top = largest(tops);
  for (int64_t i = whole; i < size; ++i) {
    const float value = to_float(x[i]);
    if (value > top) top = value;
  }
  Vec mass{}, weighted{};
  const Vec low = broadcast(-87.0f);
  for (int64_t i = 0; i < size; i += kLanes) {
    const bool whole = i + kLanes <= size;
    Vec y = (whole ? load(x + i) : load_part(x + i, size - i)) - top;
    if (!whole)
      for (int lane = static_cast<int>(size - i); lane < kLanes; ++lane) y[lane] = -100.0f;
    const Vec e = exp(y);
    mass += e;
    weighted += e * select(y < low, Vec{}, y);
  }
  const float total = sum(mass);
  return __builtin_logf(total) - sum(weighted) / total;
}

}  // namespace

void hidden_entropy(const HiddenEntropyArgs& a, const Parallel& parallel) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T* hidden = static_cast<const T*>(a.hidden);
    parallel_tasks(parallel, a.rows,
                   [&](int64_t row) { a.entropy[row] = entropy(hidden + row * a.size, a.size); });
  });
}

}  // namespace cerberus::CERBERUS_ISA
