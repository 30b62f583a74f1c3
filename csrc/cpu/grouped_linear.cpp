// Products whose rows name their weights: rows are sorted by group, so that every weight is read once for all
// rows that name it, multiplied by the kernels of linear, and put back into their places.
#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {
namespace {

// Waking a thread takes longer than moving fewer bytes.
constexpr int64_t kWorthThreads = 256 << 10;

// Where pair m * J + j goes: pairs sorted by group, those of no group last. ends[g]: that of group g.
void sort(const GroupedLinearArgs& a, int64_t* places, int64_t* ends) {
  const int64_t pairs = a.rows * a.each, groups = a.groups;
  const auto group = [&](int64_t pair) {
    const int64_t chosen = a.chosen[pair];
    return chosen >= 0 && chosen < groups ? chosen : groups;
  };
  for (int64_t g = 0; g <= groups; ++g) ends[g] = 0;
  for (int64_t pair = 0; pair < pairs; ++pair)
    if (group(pair) < groups) ++ends[group(pair) + 1];
  for (int64_t g = 0; g < groups; ++g) ends[g + 1] += ends[g];
  // ends[g] is where group g begins, and moves on with each of its pairs: at last it is where the group ends.
  for (int64_t pair = 0; pair < pairs; ++pair) places[pair] = ends[group(pair)]++;
}

// Every group by itself: in `packed` weights their distance is that of whole tiles.
void multiply_packed(const GroupedLinearArgs& a, const char* input, const int64_t* ends, char* output,
                     int64_t bytes, const Parallel& parallel) {
  const int64_t weight_bytes = packed_elements_cpu(a.dtype, a.out_size, a.in_size) * bytes;
  int64_t first = 0;
  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t rows = ends[g] - first;
    if (rows > 0) {
      const char* bias = static_cast<const char*>(a.bias);
      packed_linear_cpu(
          {a.dtype, rows, a.in_size, a.out_size, 1, false, input + first * a.in_size * bytes,
           static_cast<const char*>(a.weight) + g * weight_bytes,
           bias ? bias + g * a.out_size * bytes : nullptr, nullptr, output + first * a.out_size * bytes},
          parallel);
    }
    first = ends[g];
  }
  __builtin_memset(output + first * a.out_size * bytes, 0,
                   static_cast<size_t>((a.rows * a.each - first) * a.out_size * bytes));
}

}  // namespace

void grouped_linear(const GroupedLinearArgs& a, const Parallel& parallel) {
  const int64_t pairs = a.rows * a.each, bytes = a.dtype == DType::kFloat32 ? 4 : 2;
  if (pairs == 0 || a.out_size == 0) return;
  Buffer<int64_t> places(pairs), ends(a.groups + 1);
  sort(a, places.data, ends.data);

  const int64_t in_bytes = a.in_size * bytes, out_bytes = a.out_size * bytes;
  Buffer<char> input(pairs * in_bytes), output(pairs * out_bytes);
  const auto for_each_pair = [&](int64_t size, const auto& body) {
    parallel_tasks(pairs * size < kWorthThreads ? Parallel{nullptr, 1} : parallel, pairs, body);
  };
  const char* from = static_cast<const char*>(a.input);
  for_each_pair(in_bytes, [&](int64_t pair) {
    __builtin_memcpy(input.data + places.data[pair] * in_bytes,
                     from + (a.shared ? pair / a.each : pair) * in_bytes, static_cast<size_t>(in_bytes));
  });
  if (a.packed) {
    multiply_packed(a, input.data, ends.data, output.data, bytes, parallel);
  } else {
    linear_cpu({a.dtype, pairs, a.in_size, a.out_size, a.groups, a.transposed, input.data, a.weight, a.bias,
                ends.data, output.data},
               parallel);
  }
  char* to = static_cast<char*>(a.output);
  for_each_pair(out_bytes, [&](int64_t pair) {
    __builtin_memcpy(to + pair * out_bytes, output.data + places.data[pair] * out_bytes,
                     static_cast<size_t>(out_bytes));
  });
}

}  // namespace cerberus::CERBERUS_ISA
