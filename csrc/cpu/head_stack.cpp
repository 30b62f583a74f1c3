// x[k,l] = x[k,l-1] + silu(W[l,k] @ concat(x[k,l-1], n[k,l]) + b[l,k]). One parallel pass a layer; a task
// owns a range of one head's outputs for all rows. The concatenated inputs are a few KiB of scratch; only
// the weights are large.
#include "cpu/eight_bits.h"
#include "cpu/kernels.h"

namespace cerberus::CERBERUS_ISA {
namespace {

Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

// state + silu(dot + bias), rounded, kLanes at a time or the last few.
template <typename T>
void add_update(const float* dots, const T* bias, const T* state, int64_t count, T* out) {
  int64_t i = 0;
  const auto update = [&](const auto& load_at, T* to) {
    float sums[kLanes];
    store(load_at(state) + silu(load_at(dots) + load_at(bias)), sums);
    from_floats<kLanes>(sums, to);
  };
  for (; i + kLanes <= count; i += kLanes) update([i](const auto* p) { return load(p + i); }, out + i);
  if (i < count) {
    T last[kLanes];
    update([i, count](const auto* p) { return load_part(p + i, count - i); }, last);
    __builtin_memcpy(out + i, last, static_cast<size_t>(count - i) * sizeof(T));
  }
}

template <typename T, typename Blocks>
void run(const HeadStackArgs& a, const Parallel& parallel) {
  const int64_t size = a.size, width = a.chained ? 2 * size : size;
  const T* hidden = static_cast<const T*>(a.hidden);
  const T* anchor = static_cast<const T*>(a.anchor);
  const T* bias = static_cast<const T*>(a.bias);
  T* buffers[2] = {static_cast<T*>(a.scratch), static_cast<T*>(a.scratch) + a.rows * a.heads * size};
  Blocks blocks(a.weight, size, width, a.heads * a.rows);  // rows: (K, B), what each head reads in this layer
  Buffer<T> both(width);

  const T* below = nullptr;  // (B, K, D): states of the layer below; null at layer 1, where they are all h
  for (int64_t layer = 0; layer < a.layers; ++layer) {
    T* above = layer + 1 == a.layers ? static_cast<T*>(a.states) : buffers[layer % 2];
    const auto state = [&](int64_t row, int64_t head) {
      return below ? below + (row * a.heads + head) * size : hidden + row * size;
    };
    // At layer 1 all heads read the same: one copy of it serves them all.
    const int64_t distinct = below ? a.heads : 1;
    for (int64_t head = 0; head < distinct; ++head) {
      for (int64_t row = 0; row < a.rows; ++row) {
        const T* neighbour = head == 0 || !below ? anchor + row * size : state(row, head - 1);
        __builtin_memcpy(both.data, state(row, head), static_cast<size_t>(size) * sizeof(T));
        if (a.chained) __builtin_memcpy(both.data + size, neighbour, static_cast<size_t>(size) * sizeof(T));
        blocks.lay(head * a.rows + row, both.data);
      }
    }
    const int64_t per_task = Blocks::rows_per_task(width);
    const int64_t tasks_per_head = (size + per_task - 1) / per_task;
    parallel_tasks(parallel, a.heads * tasks_per_head, [&](int64_t task) {
      const int64_t head = task / tasks_per_head, begin = task % tasks_per_head * per_task;
      const int64_t block = layer * a.heads + head;
      const int64_t outputs = smaller(size, begin + per_task) - begin;
      Scratch dots(a.rows * outputs);
      blocks.multiply((below ? head : 0) * a.rows, a.rows, block, begin, begin + outputs,
                      Output<T>{nullptr, dots.data, outputs, nullptr});
      for (int64_t row = 0; row < a.rows; ++row)
        add_update(dots.data + row * outputs, bias + block * size + begin, state(row, head) + begin, outputs,
                   above + (row * a.heads + head) * size + begin);
    });
    below = above;
  }
}

}  // namespace

void head_stack(const HeadStackArgs& a, const Parallel& parallel) {
  if (a.rows == 0) return;
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    (a.eight_bits ? run<T, EightBitBlocks<T>> : run<T, DenseBlocks<T>>)(a, parallel);
  });
}

}  // namespace cerberus::CERBERUS_ISA
