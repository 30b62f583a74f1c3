// The row instructions of a step: each is one op of the model on the values of one node, in float32, rounded
// where the model rounds. A task owns a node, so that nothing of another node can reach it; within a node, an
// element goes through the same arithmetic wherever it lies.
#include "cpu/activate.h"
#include "cpu/kernels.h"
#include "cpu/ranked.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {
namespace {

using Kind = RowOperand::Kind;

// --- reading and writing ---

// One run of elements along n0.
struct Run {
  Kind kind;
  float number;
  const char* data;
  int64_t stride;
};

template <typename T>
Vec gather(const T* p, int64_t stride, int64_t count) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = to_float(p[i * stride]);
  return load(lanes);
}

template <typename T>
inline Vec read(const Run& run, int64_t i, int64_t count) {
  if (run.kind == Kind::kNumber) return broadcast(run.number);
  if (run.kind == Kind::kModel) {
    const T* p = reinterpret_cast<const T*>(run.data) + i * run.stride;
    if (run.stride != 1) return gather(p, run.stride, count);
    return count == kLanes ? load(p) : load_part(p, count);
  }
  const float* p = reinterpret_cast<const float*>(run.data) + i * run.stride;
  if (run.stride != 1) return gather(p, run.stride, count);
  return count == kLanes ? load(p) : load_part(p, count);
}

// Vectors at a time, so that what kind of memory it is is asked less often.
constexpr int kTogether = 4;

template <typename T>
inline void read_together(const Run& run, int64_t i, Vec (&v)[kTogether]) {
  const auto each = [&](const auto& at) {
#pragma GCC unroll 4
    for (int j = 0; j < kTogether; ++j) v[j] = at(i + j * kLanes);
  };
  if (run.kind == Kind::kNumber) {
    each([&](int64_t) { return broadcast(run.number); });
  } else if (run.stride != 1) {
    each([&](int64_t k) { return read<T>(run, k, kLanes); });
  } else if (run.kind == Kind::kModel) {
    each([&](int64_t k) { return load(reinterpret_cast<const T*>(run.data) + k); });
  } else {
    each([&](int64_t k) { return load(reinterpret_cast<const float*>(run.data) + k); });
  }
}

// v rounded to T, as float.
inline Vec rounded(Vec v, float) { return v; }
inline Vec rounded(Vec v, BFloat16) {
  const UIntVec bits = bit_cast<UIntVec>(v), upper = bits >> 16;
  const UIntVec nearest = (bits + 0x7fffu + (upper & 1u)) & 0xffff0000u, nan = (upper | 0x40u) << 16;
  return bit_cast<Vec>((bits & 0x7fffffffu) > 0x7f800000u ? nan : nearest);
}
inline Vec rounded(Vec v, Float16) {
  float lanes[kLanes];
  Float16 halves[kLanes];
  store(v, lanes);
  from_floats<kLanes>(lanes, halves);
  return load(halves);
}

template <typename T>
void scatter(const float* lanes, T* p, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) from_float(lanes[i], p[i * stride]);
}

template <typename T>
inline void write(Vec v, const Run& run, int64_t i, int64_t count) {
  float lanes[kLanes];
  if (run.kind == Kind::kModel) {
    T* p = reinterpret_cast<T*>(const_cast<char*>(run.data)) + i * run.stride;
    store(v, lanes);
    if (run.stride == 1 && count == kLanes) return from_floats<kLanes>(lanes, p);
    return scatter(lanes, p, run.stride, count);
  }
  float* p = reinterpret_cast<float*>(const_cast<char*>(run.data)) + i * run.stride;
  if (run.stride == 1 && count == kLanes) return store(v, p);
  store(v, lanes);
  scatter(lanes, p, run.stride, count);
}

// v, which T holds, or what is nearest.
inline void narrow(Vec v, float* p) { store(v, p); }
inline void narrow(Vec v, BFloat16* p) {
  const HalfVec halves = __builtin_convertvector(bit_cast<UIntVec>(rounded(v, BFloat16{})) >> 16, HalfVec);
  __builtin_memcpy(p, &halves, sizeof(halves));
}
inline void narrow(Vec v, Float16* p) {
  float lanes[kLanes];
  store(v, lanes);
  from_floats<kLanes>(lanes, p);
}

template <typename T>
inline void write_together(const Vec (&v)[kTogether], const Run& run, int64_t i) {
  const auto each = [&](const auto& to) {
#pragma GCC unroll 4
    for (int j = 0; j < kTogether; ++j) to(v[j], i + j * kLanes);
  };
  if (run.stride != 1) {
    each([&](Vec x, int64_t k) { write<T>(x, run, k, kLanes); });
  } else if (run.kind == Kind::kModel) {
    each([&](Vec x, int64_t k) { narrow(x, reinterpret_cast<T*>(const_cast<char*>(run.data)) + k); });
  } else {
    each([&](Vec x, int64_t k) { store(x, reinterpret_cast<float*>(const_cast<char*>(run.data)) + k); });
  }
}

// --- where an operand lies for a node ---

struct Place {
  Kind kind;
  float number;
  char* data;  // null: nothing is written
  int64_t stride[3];

  // The run at (i2, i1). What is the same for all of it is a number.
  template <typename T>
  Run run(int64_t i2, int64_t i1, bool reads) const {
    const int64_t size = kind == Kind::kModel ? sizeof(T) : sizeof(float);
    const char* p = data + (i2 * stride[0] + i1 * stride[1]) * size;
    if (kind == Kind::kNumber || stride[2] != 0 || !reads) return {kind, number, p, stride[2]};
    const float same =
        kind == Kind::kModel ? to_float(*reinterpret_cast<const T*>(p)) : *reinterpret_cast<const float*>(p);
    return {Kind::kNumber, same, nullptr, 0};
  }
};

template <typename T>
Place place(const RowOperand& o, const RowsArgs& a, int64_t node, float* scratch) {
  Place found{o.kind, o.number, nullptr, {o.stride[0], o.stride[1], o.stride[2]}};
  if (o.kind == Kind::kNone || o.kind == Kind::kNumber) return found;
  if (o.kind == Kind::kScratch) {
    found.kind = Kind::kFloat32;
    found.data = reinterpret_cast<char*>(scratch + o.offset);
    return found;
  }
  int64_t row = 0;
  switch (o.row) {
    case RowOperand::Row::kConstant:
      break;
    case RowOperand::Row::kNode:
      row = node;
      break;
    case RowOperand::Row::kPosition:
      row = larger(0, smaller(a.positions[node], o.rows - 1));
      break;
    case RowOperand::Row::kToken:
      row = larger(0, smaller(a.tokens[node], o.rows - 1));
      break;
    case RowOperand::Row::kSlot:
      row = a.length + node - a.first;
      if (a.length < 0 || a.length >= o.rows || row >= o.rows) return found;
      break;
  }
  const int64_t size = o.kind == Kind::kModel ? sizeof(T) : sizeof(float);
  found.data = static_cast<char*>(o.data) + (row * o.row_stride + o.offset) * size;
  return found;
}

// --- what instructions do ---

// Calls body(to, a, b) for the runs along n0.
template <typename T, typename Body>
void for_each_run(const RowInstruction& in, const Place& to, const Place& a, const Place& b,
                  const Body& body) {
  for (int64_t i2 = 0; i2 < in.size[0]; ++i2)
    for (int64_t i1 = 0; i1 < in.size[1]; ++i1)
      body(to.run<T>(i2, i1, false), a.run<T>(i2, i1, true), b.run<T>(i2, i1, true));
}

template <typename T, typename F>
void elementwise(const RowInstruction& in, const Place& to, const Place& a, const Place& b, const F& f) {
  const int64_t size = in.size[2];
  for_each_run<T>(in, to, a, b, [&](const Run& out, const Run& x, const Run& y) {
    const auto some = [&](int64_t i, int64_t count) {
      Vec v = f(read<T>(x, i, count), read<T>(y, i, count));
      if (in.round) v = rounded(v, T{});
      write<T>(v, out, i, count);
    };
    int64_t i = 0;
    for (; i + kTogether * kLanes <= size; i += kTogether * kLanes) {
      Vec v[kTogether], w[kTogether];
      read_together<T>(x, i, v);
      read_together<T>(y, i, w);
#pragma GCC unroll 4
      for (int j = 0; j < kTogether; ++j) v[j] = f(v[j], w[j]);
      if (in.round && out.kind == Kind::kFloat32) {
#pragma GCC unroll 4
        for (int j = 0; j < kTogether; ++j) v[j] = rounded(v[j], T{});
      }
      write_together<T>(v, out, i);
    }
    for (; i + kLanes <= size; i += kLanes) some(i, kLanes);
    if (i < size) some(i, size - i);
  });
}

constexpr int64_t kBuffer = 256;  // elements that an activation takes at a time

template <typename T>
void activated(const RowInstruction& in, const Place& to, const Place& a, DType dtype) {
  const Activation kind =
      static_cast<Activation>(static_cast<int32_t>(in.op) - static_cast<int32_t>(RowOp::kActivation));
  for_each_run<T>(in, to, a, a, [&](const Run& out, const Run& x, const Run&) {
    float buffer[kBuffer];
    for (int64_t begin = 0; begin < in.size[2]; begin += kBuffer) {
      const int64_t count = smaller(kBuffer, in.size[2] - begin);
      for (int64_t i = 0; i < count; i += kLanes)
        store(read<T>(x, begin + i, smaller(kLanes, count - i)), buffer + i);
      activate(kind, dtype, buffer, count, buffer);
      for (int64_t i = 0; i < count; i += kLanes) {
        Vec v = load(buffer + i);
        if (in.round) v = rounded(v, T{});
        write<T>(v, out, begin + i, smaller(kLanes, count - i));
      }
    }
  });
}

// The sum of x in the order in which torch adds a contiguous row: four accumulators side by side, of eight
// lanes each, moved up a level every so many additions. An RMS norm then has torch's bits.
typedef float Eight __attribute__((vector_size(32)));
constexpr int kAccumulators = 4, kLevels = 4;

template <typename V>
inline void torch_sums(const float* x, int64_t count, V& total) {
  constexpr int64_t kWidth = sizeof(V) / sizeof(float);
  const auto add = [x](V& sum, int64_t i) {
    V v;
    __builtin_memcpy(&v, x + i * kWidth, sizeof(v));
    sum += v;
  };
  const int64_t rounds = count / kAccumulators;
  int64_t bits = 1;
  while (bits < 62 && int64_t{1} << bits < rounds) ++bits;
  const int64_t power = larger(4, bits / kLevels), step = int64_t{1} << power;
  V sums[kLevels][kAccumulators] = {};
  int64_t i = 0;
  for (; i + step <= rounds;) {
    for (int64_t j = 0; j < step; ++j, ++i)
      for (int k = 0; k < kAccumulators; ++k) add(sums[0][k], i * kAccumulators + k);
    for (int level = 1; level < kLevels; ++level) {
      for (int k = 0; k < kAccumulators; ++k) {
        sums[level][k] += sums[level - 1][k];
        sums[level - 1][k] = V{};
      }
      if (i & (step - 1) << level * power) break;
    }
  }
  for (; i < rounds; ++i)
    for (int k = 0; k < kAccumulators; ++k) add(sums[0][k], i * kAccumulators + k);
  for (int level = 1; level < kLevels; ++level)
    for (int k = 0; k < kAccumulators; ++k) sums[0][k] += sums[level][k];
  for (i = rounds * kAccumulators; i < count; ++i) add(sums[0][0], i);
  for (int k = 1; k < kAccumulators; ++k) sums[0][0] += sums[0][k];
  total = sums[0][0];
}

float torch_sum(const float* x, int64_t count) {
  float total = 0;
  if (count < 8) {
    torch_sums(x, count, total);
    return total;
  }
  Eight lanes;
  torch_sums(x, count / 8, lanes);
  for (int64_t i = count / 8 * 8; i < count; ++i) total += x[i];
  for (int lane = 0; lane < 8; ++lane) total += lanes[lane];
  return total;
}

float largest(const float* x, int64_t count) {
  float top = x[0];
  for (int64_t i = 1; i < count; ++i)
    if (!(x[i] <= top) && top == top) top = x[i];
  return top;
}

// spare: room for a run.
template <typename T>
void reduced(const RowInstruction& in, const Place& to, const Place& a, float* spare) {
  const int64_t size = in.size[2];
  for_each_run<T>(in, to, a, a, [&](const Run& out, const Run& x, const Run&) {
    const float* run = reinterpret_cast<const float*>(x.data);
    if (x.kind != Kind::kFloat32 || x.stride != 1) {
      for (int64_t i = 0; i < size; i += kLanes) store(read<T>(x, i, smaller(kLanes, size - i)), spare + i);
      run = spare;
    }
    float value = in.op == RowOp::kMax ? largest(run, size) : torch_sum(run, size);
    if (in.op == RowOp::kMean) value = value / static_cast<float>(size);
    Vec v = broadcast(value);
    if (in.round) v = rounded(v, T{});
    write<T>(v, out, 0, 1);
  });
}

// spare: room for a run of Ranked.
template <typename T>
void ranked(const RowInstruction& in, const Place& to, const Place& a, Ranked* spare) {
  const int64_t size = in.size[2];
  for (int64_t i2 = 0; i2 < in.size[0]; ++i2) {
    const Run x = a.run<T>(i2, 0, true);
    for (int64_t i = 0; i < size; i += kLanes) {
      const int64_t count = smaller(kLanes, size - i);
      float lanes[kLanes];
      store(read<T>(x, i, count), lanes);
      for (int64_t lane = 0; lane < count; ++lane)
        spare[i + lane] = {lanes[lane], static_cast<int32_t>(i + lane)};
    }
    rank(spare, size, in.size[1]);
    for (int64_t i1 = 0; i1 < in.size[1]; ++i1)
      write<T>(broadcast(static_cast<float>(spare[i1].place)), to.run<T>(i2, i1, false), 0, 1);
  }
}

// A place outside of the run is the nearest one in it, of NaN the first.
template <typename T>
void picked(const RowInstruction& in, const Place& to, const Place& a, const Place& b) {
  const int64_t last = in.size[2] - 1;
  for_each_run<T>(in, to, a, b, [&](const Run& out, const Run& x, const Run& y) {
    const float place = read<T>(y, 0, 1)[0];
    const int64_t i = !(place > 0)                       ? 0
                      : place < static_cast<float>(last) ? static_cast<int64_t>(place)
                                                         : last;
    Vec v = read<T>(x, i, 1);
    if (in.round) v = rounded(v, T{});
    write<T>(v, out, 0, 1);
  });
}

Vec root(Vec x) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_sqrt_ps(bit_cast<__m512>(x)));
#elif defined(__AVX2__)
  return bit_cast<Vec>(_mm256_sqrt_ps(bit_cast<__m256>(x)));
#else
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
#endif
}

// What is no number stays, in either operand.
Vec maximum(Vec x, Vec y) { return select(x != x, x, select(x > y, x, y)); }
Vec minimum(Vec x, Vec y) { return select(x != x, x, select(x < y, x, y)); }

template <typename T>
void execute(const RowInstruction& in, const RowsArgs& args, int64_t node, float* scratch, float* spare) {
  const Place to = place<T>(in.to, args, node, scratch);
  if (!to.data) return;
  const Place a = place<T>(in.a, args, node, scratch);
  const Place b =
      in.b.kind == Kind::kNone ? Place{Kind::kNumber, 0, nullptr, {}} : place<T>(in.b, args, node, scratch);
  const auto with = [&](const auto& f) { elementwise<T>(in, to, a, b, f); };
  switch (in.op) {
    case RowOp::kCopy:
      return with([](Vec x, Vec) { return x; });
    case RowOp::kAdd:
      return with([](Vec x, Vec y) { return x + y; });
    case RowOp::kSub:
      return with([](Vec x, Vec y) { return x - y; });
    case RowOp::kMul:
      return with([](Vec x, Vec y) { return x * y; });
    case RowOp::kDiv:
      return with([](Vec x, Vec y) { return x / y; });
    case RowOp::kMaximum:
      return with([](Vec x, Vec y) { return maximum(x, y); });
    case RowOp::kMinimum:
      return with([](Vec x, Vec y) { return minimum(x, y); });
    case RowOp::kNeg:
      return with([](Vec x, Vec) { return -x; });
    case RowOp::kAbs:
      return with([](Vec x, Vec) { return bit_cast<Vec>(bit_cast<UIntVec>(x) & 0x7fffffffu); });
    case RowOp::kSqrt:
      return with([](Vec x, Vec) { return root(x); });
    case RowOp::kRsqrt:
      return with([](Vec x, Vec) { return 1.0f / root(x); });
    case RowOp::kReciprocal:
      return with([](Vec x, Vec) { return 1.0f / x; });
    case RowOp::kRelu:
      return with([](Vec x, Vec) { return maximum(x, Vec{}); });
    case RowOp::kMean:
    case RowOp::kSum:
    case RowOp::kMax:
      return reduced<T>(in, to, a, spare);
    case RowOp::kTop:
      return ranked<T>(in, to, a, reinterpret_cast<Ranked*>(spare));
    case RowOp::kPick:
      return picked<T>(in, to, a, b);
    default:
      return activated<T>(in, to, a, args.dtype);
  }
}

// Elements below which the nodes are not worth a second thread: it takes about a microsecond to hand them
// out. One of an activation takes the time of several.
constexpr int64_t kSharedElements = 1 << 13, kActivation = 4;

}  // namespace

void rows(const RowsArgs& a, const Parallel& parallel) {
  int64_t elements = 0, longest = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t* size = a.instructions[i].size;
    const int64_t each = a.instructions[i].op >= RowOp::kActivation ? kActivation : 1;
    elements += each * size[0] * size[1] * size[2];
    constexpr int64_t kRanked = sizeof(Ranked) / sizeof(float);
    longest = larger(longest, a.instructions[i].op == RowOp::kTop ? kRanked * size[2] : size[2]);
  }
  const int64_t nodes = a.nodes - a.first;
  const bool alone = elements * nodes < kSharedElements;
  with_type(a.dtype, [&](auto type) {
    parallel_tasks(alone ? Parallel{nullptr, 1} : parallel, nodes, [&](int64_t task) {
      Scratch scratch(a.scratch + longest + kLanes);
      for (int64_t i = 0; i < a.count; ++i)
        execute<decltype(type)>(a.instructions[i], a, a.first + task, scratch.data, scratch.data + a.scratch);
    });
  });
}

}  // namespace cerberus::CERBERUS_ISA
