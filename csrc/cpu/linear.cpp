// input @ weight^T + bias, row-invariant; rows may come in groups with a weight each. A task owns some rows
// of one group and a range of its outputs: it streams their weights once for all these rows.
#include "cpu/blocks.h"
#include "cpu/byte_weights.h"
#include "cpu/columns.h"
#include "cpu/kernels.h"
#include "cpu/packed.h"
#include "cpu/product.h"
#if defined(CERBERUS_AMX)
#include "cpu/amx.h"
#endif

namespace cerberus::CERBERUS_ISA {
namespace {

// Consecutive rows of one group.
struct Span {
  int64_t group, first, count;
};

// The groups that have rows, as spans; returns how many. `ends` is read once, and may be anything.
int64_t groups_with_rows(const LinearArgs& a, Span* groups) {
  int64_t first = 0, count = 0;
  for (int64_t group = 0; group < a.groups; ++group) {
    const int64_t end = a.ends ? smaller(a.rows, larger(first, a.ends[group])) : a.rows;
    if (end > first) groups[count++] = {group, first, end - first};
    first = end;
  }
  return count;
}

// Rows a span has at least where a group is cut into several, so that there is work for all threads.
constexpr int64_t kMinSpanRows = 32;

// The product of a call, its rows in the form that `Kernel` reads.
template <typename T, typename Kernel>
void run(const LinearArgs& a, const Parallel& parallel) {
  const int64_t per_task = Kernel::outputs_per_task(a.in_size, a.rows);
  const int64_t ranges = (a.out_size + per_task - 1) / per_task;
  T* output = static_cast<T*>(a.output);
  Buffer<Span> groups(a.groups);
  const int64_t active = groups_with_rows(a, groups.data);
  const int64_t end = active ? groups.data[active - 1].first + groups.data[active - 1].count : 0;
  __builtin_memset(output + end * a.out_size, 0,
                   static_cast<size_t>((a.rows - end) * a.out_size) * sizeof(T));
  if (active * ranges == 0) return;

  const int64_t pieces = parallel.threads == 1 ? 1 : (4 * parallel.threads - 1) / (active * ranges) + 1;
  Buffer<Span> spans(active * pieces);
  int64_t count = 0;
  for (int64_t i = 0; i < active; ++i) {
    const Span& group = groups.data[i];
    const int64_t parts = larger(1, smaller(pieces, group.count / kMinSpanRows));
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = group.count * part / parts;
      spans.data[count++] = {group.group, group.first + begin, group.count * (part + 1) / parts - begin};
    }
  }

  const Kernel kernel(static_cast<const T*>(a.input), a.rows, a.in_size, spans.data, count, parallel);
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  parallel_tasks(parallel, count * ranges, [&](int64_t task) {
    const int64_t begin = task / count * per_task;
    const Span& span = spans.data[task % count];
    const Output<T> to{output + span.first * a.out_size, nullptr, a.out_size,
                       bias ? bias + span.group * a.out_size : nullptr};
    kernel.multiply(task % count, weight + span.group * a.out_size * a.in_size, begin,
                    smaller(a.out_size, begin + per_task), a.out_size, to);
  });
}

// Below so many elements a second start of the threads costs more than they save.
constexpr int64_t kSharedElements = 1 << 16;

// Calls body(row) for each row of `size` elements, on all threads where there is much to do.
template <typename Body>
void for_each_row(int64_t rows, int64_t size, const Parallel& parallel, const Body& body) {
  parallel_tasks(rows * size < kSharedElements ? Parallel{nullptr, 1} : parallel, rows, body);
}

// weight (O, I): lanes over k.
template <typename T>
struct ByRows {
  using X = Row<T>;
  ByRows(const T* input, int64_t rows, int64_t in_size, const Span* all, int64_t, const Parallel& parallel)
      : size(in_size),
        stride(apart(rows, row_elements<T>(in_size))),
        spans(all),
        scratch(is_ready() ? 0 : rows * stride) {
    if (is_ready()) {
      x = reinterpret_cast<const X*>(input);
    } else {
      x = scratch.data;
      for_each_row(rows, size, parallel,
                   [&](int64_t row) { lay_row(input + row * size, size, scratch.data + row * stride); });
    }
  }
  // Of many rows at least so much work that fetching them is a small part of it.
  static int64_t outputs_per_task(int64_t in_size, int64_t rows) {
    const int64_t fewest = rows < kManyLongRows ? kWholeTiles : 2 * kWholeTiles;
    return larger(fewest, weight_rows_per_task(in_size, sizeof(T)));
  }
  void multiply(int64_t span, const T* weight, int64_t begin, int64_t end, int64_t,
                const Output<T>& output) const {
    rows_times_weights(x + spans[span].first * stride, stride, spans[span].count, weight, begin, end, size,
                       output);
  }

  // Rows that lie such a multiple of bytes apart, and the weights beside them, want the same few sets of the
  // L1 cache at every k: a third of the time of a large product goes by. So their copies lie further apart.
  static constexpr size_t kSameSets = 2048;
  static constexpr int64_t kPadding = 3 * 64 / sizeof(X);
  static int64_t apart(int64_t rows, int64_t elements) {
    return rows == 1 || elements * sizeof(X) % kSameSets ? elements : elements + kPadding;
  }
  bool is_ready() const { return sizeof(X) == sizeof(T) && stride == size; }

  int64_t size, stride;
  const Span* spans;
  Buffer<X> scratch;
  const X* x;
};

#if defined(__AVX2__) && !defined(CERBERUS_AMX)
// weight as packed.h packs it.
template <typename T>
struct ByPackedRows : ByRows<T> {
  using ByRows<T>::ByRows;
  void multiply(int64_t span, const T* packed, int64_t begin, int64_t end, int64_t,
                const Output<T>& output) const {
    rows_times_packed(this->x + this->spans[span].first * this->stride, this->stride, this->spans[span].count,
                      packed, begin, end, this->size, output);
  }
};
#endif

#if defined(__AVX512F__) && !defined(CERBERUS_AMX)
// weight as pack_blocks puts it.
template <Packing kPacking>
struct ByBlocks : ByRows<BFloat16> {
  using ByRows<BFloat16>::ByRows;
  void multiply(int64_t span, const BFloat16* packed, int64_t begin, int64_t end, int64_t,
                const Output<BFloat16>& output) const {
    rows_times_blocks(kPacking, x + spans[span].first * stride, stride, spans[span].count,
                      reinterpret_cast<const char*>(packed), begin, end, size, output);
  }
};
#endif

// weight (I, O): lanes over outputs.
template <typename T>
struct ByColumns {
  ByColumns(const T* input, int64_t rows, int64_t in_size, const Span* all, int64_t, const Parallel& parallel)
      : size(in_size), spans(all), scratch(rows * in_size) {
    for_each_row(rows, size, parallel,
                 [&](int64_t row) { lay_row(input + row * size, size, scratch.data + row * size); });
  }
  static int64_t outputs_per_task(int64_t, int64_t) { return kColumnsAtOnce; }
  void multiply(int64_t span, const T* weight, int64_t begin, int64_t end, int64_t out_size,
                const Output<T>& output) const {
    rows_times_columns(scratch.data + spans[span].first * size, size, spans[span].count, weight, begin, end,
                       out_size, output);
  }

  int64_t size;
  const Span* spans;
  Scratch scratch;
};

#if defined(CERBERUS_AMX)
// weight (O, I) in tiles.
struct ByTiles {
  ByTiles(const BFloat16* input, int64_t, int64_t in_size, const Span* all, int64_t count,
          const Parallel& parallel)
      : size(in_size), spans(all), starts(count + 1), packed(place(all, count)) {
    const auto pack = [&](int64_t i) {
      pack_rows(input + all[i].first * in_size, all[i].count, in_size, packed.data + starts.data[i]);
    };
    if (starts.data[count] >= kSharedElements) {
      parallel_tasks(parallel, count, pack);
    } else {
      for (int64_t i = 0; i < count; ++i) pack(i);
    }
  }
  static int64_t outputs_per_task(int64_t in_size, int64_t) {
    return weight_rows_per_task(in_size, sizeof(BFloat16), 2 * kTile);
  }
  void multiply(int64_t span, const BFloat16* weight, int64_t begin, int64_t end, int64_t,
                const Output<BFloat16>& output) const {
    tiles_times_packed(packed.data + starts.data[span], spans[span].count, weight, begin, end, size, output);
  }

  // Where every span starts in `packed`; returns how large that is.
  int64_t place(const Span* all, int64_t count) {
    starts.data[0] = 0;
    for (int64_t i = 0; i < count; ++i)
      starts.data[i + 1] = starts.data[i] + packed_elements(all[i].count, size);
    return starts.data[count];
  }

  int64_t size;
  const Span* spans;
  Buffer<int64_t> starts;
  Buffer<BFloat16> packed;
};
#endif

template <typename T>
struct ByRowsKernel {
  using Type = ByRows<T>;
};
#if defined(CERBERUS_AMX)
template <>
struct ByRowsKernel<BFloat16> {
  using Type = ByTiles;
};
#endif

}  // namespace

void linear(const LinearArgs& a, const Parallel& parallel) {
  if (a.rows == 0) return;
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
#if !defined(CERBERUS_BFLOAT16_ONLY)
    if (a.transposed) return run<T, ByColumns<T>>(a, parallel);
#endif
    run<T, typename ByRowsKernel<T>::Type>(a, parallel);
  });
}

#if defined(__AVX2__) && !defined(CERBERUS_AMX)
void packed_linear(const LinearArgs& a, const Parallel& parallel) {
  if (a.rows == 0) return;
  with_type(a.dtype, [&](auto type) { run<decltype(type), ByPackedRows<decltype(type)>>(a, parallel); });
}
#endif

#if defined(__AVX512F__) && !defined(CERBERUS_AMX)
void block_linear(const LinearArgs& a, Packing packing, const Parallel& parallel) {
  if (is_bytes(packing) && a.rows > most_rows_of_bytes(packing)) {
    LinearArgs dense = a;
    dense.weight = static_cast<const char*>(a.weight) + byte_tiles_bytes(packing, a.out_size, a.in_size);
    return packed_linear(dense, parallel);
  }
  if (a.rows == 0) return;
  const auto product = packing == Packing::kFourBits   ? run<BFloat16, ByBlocks<Packing::kFourBits>>
                       : packing == Packing::kFiveBits ? run<BFloat16, ByBlocks<Packing::kFiveBits>>
                       : packing == Packing::kBytes    ? run<BFloat16, ByBlocks<Packing::kBytes>>
                                                       : run<BFloat16, ByBlocks<Packing::kBytesOf16>>;
  product(a, parallel);
}
#endif

}  // namespace cerberus::CERBERUS_ISA
