// step_rows: the row instructions of a step (step/step.h), a block for each node.
//
// The block does one instruction after the other, with a barrier between them: nothing of another node is
// read. Instructions lie in global memory, one array for all stages; while the block does one, its first
// threads copy the next to shared memory. Values in between are float32 in the node's scratch, in shared
// memory too, and are rounded where the model rounds them: as on the CPU (cpu/rows.cpp), except that
//   - sums and means are taken in another order: by thread, by lane, by warp; the order depends on the sizes
//   alone
//   - activations are float32's of CUDA, a few units in the last place off, for float32 models, too
//   - of equal largest elements (RowOp::kTop) the first ones are taken.
#include <cfloat>
#include <cmath>

#include "copy.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "step_kernels.h"

namespace cerberus {
namespace {

using Kind = RowOperand::Kind;
using Row = RowOperand::Row;

constexpr int kRowThreads = 512, kRowWarps = kRowThreads / kLanes;
constexpr int kAtOnce = 4;  // elements of a thread that are under way together

// ---------------------------------------------------------------- where an operand lies for a node

struct Place {
  Kind kind;  // kNumber, kFloat32 or kModel
  float number;
  char* data;  // null: nothing is written
  int64_t stride[3];

  template <typename T>
  __device__ float read(int64_t at) const {
    if (kind == Kind::kNumber) return number;
    if (kind == Kind::kModel) return to_float(reinterpret_cast<const T*>(data)[at]);
    return reinterpret_cast<const float*>(data)[at];
  }
  template <typename T>
  __device__ void write(int64_t at, float value) const {
    if (kind == Kind::kModel) {
      reinterpret_cast<T*>(data)[at] = from_float<T>(value);
    } else {
      reinterpret_cast<float*>(data)[at] = value;
    }
  }
  // Of the run at (i2, i1), its first element.
  __device__ int64_t run(int i2, int i1) const { return i2 * stride[0] + i1 * stride[1]; }
};

__device__ inline int64_t nearest_row(int64_t row, int64_t rows) {
  return row < 0 ? 0 : row < rows ? row : rows - 1;
}

template <typename T>
__device__ inline Place place(const RowOperand& o, const StepRowsArgs& a, int node, float* scratch) {
  Place found = {o.kind, o.number, nullptr, {o.stride[0], o.stride[1], o.stride[2]}};
  if (o.kind == Kind::kNone) found.kind = Kind::kNumber;
  if (o.kind == Kind::kNone || o.kind == Kind::kNumber) return found;
  if (o.kind == Kind::kScratch) {
    found.kind = Kind::kFloat32;
    found.data = reinterpret_cast<char*>(scratch + o.offset);
    return found;
  }
  int64_t row = 0;
  if (o.row == Row::kNode) row = node;
  if (o.row == Row::kPosition) row = nearest_row(a.positions[node], o.rows);
  if (o.row == Row::kToken) row = nearest_row(a.tokens[node], o.rows);
  if (o.row == Row::kSlot) {
    const int64_t length = *a.length;
    row = length + node;
    if (length < 0 || row >= o.rows) return found;
  }
  const int64_t size = o.kind == Kind::kModel ? sizeof(T) : sizeof(float);
  found.data = static_cast<char*>(o.data) + (row * o.row_stride + o.offset) * size;
  return found;
}

// ---------------------------------------------------------------- elements

// Rounded to T where the instruction says so.
template <typename T>
__device__ inline float rounded(float x, bool rounds) {
  return rounds ? to_float(from_float<T>(x)) : x;
}

// What is no number stays, in either operand.
__device__ inline float larger(float x, float y) { return is_nan(x) || x > y ? x : y; }
__device__ inline float smaller(float x, float y) { return is_nan(x) || x < y ? x : y; }

__host__ __device__ constexpr RowOp of(Activation kind) {
  return static_cast<RowOp>(static_cast<int32_t>(RowOp::kActivation) + static_cast<int32_t>(kind));
}

// 1 / (1 + e^-x), from e^-|x|, which does not overflow.
__device__ inline float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// sin(x + quarters pi / 2), to 2e-7 for |x| up to 1e9: cosf and sinf keep an array in local memory for large
// x.
__device__ inline float sine(float x, double quarters) {
  const double turns = rint(x * 0.63661977236758134);
  const double reduced =
      fma(-turns, 6.123233995736766e-17, fma(-turns, 1.5707963267948966, static_cast<double>(x)));
  const float r = static_cast<float>(reduced), z = r * r;
  const double quadrant = turns + quarters - 4.0 * floor((turns + quarters) * 0.25);
  const float sin =
      r + r * z * (-0.16666667f + z * (0.0083333333f + z * (-1.9841270e-4f + z * 2.7557319e-6f)));
  const float cos = 1.0f + z * (-0.5f + z * (0.041666667f + z * (-0.0013888889f + z * 2.4801587e-5f)));
  const float either = quadrant == 1.0 || quadrant == 3.0 ? cos : sin;
  return quadrant >= 2.0 ? -either : either;
}

// x[i] = op(x[i], y[i])
__device__ inline void compute(RowOp op, float (&x)[kAtOnce], const float (&y)[kAtOnce]) {
  const auto each = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) x[i] = f(x[i], y[i]);
  };
  switch (op) {
    case RowOp::kAdd:
      return each([](float v, float w) { return v + w; });
    case RowOp::kSub:
      return each([](float v, float w) { return v - w; });
    case RowOp::kMul:
      return each([](float v, float w) { return v * w; });
    case RowOp::kDiv:
      return each([](float v, float w) { return v / w; });
    case RowOp::kMaximum:
      return each([](float v, float w) { return larger(v, w); });
    case RowOp::kMinimum:
      return each([](float v, float w) { return smaller(v, w); });
    case RowOp::kNeg:
      return each([](float v, float) { return -v; });
    case RowOp::kAbs:
      return each([](float v, float) { return fabsf(v); });
    case RowOp::kSqrt:
      return each([](float v, float) { return sqrtf(v); });
    case RowOp::kRsqrt:
      return each([](float v, float) { return 1.0f / sqrtf(v); });
    case RowOp::kReciprocal:
      return each([](float v, float) { return 1.0f / v; });
    case RowOp::kRelu:
      return each([](float v, float) { return larger(v, 0.0f); });
    case of(Activation::kSilu):
      return each([](float v, float) { return v * sigmoid(v); });
    case of(Activation::kGelu):  // erfc, not 1 + erf, which cancels where x is negative
      return each([](float v, float) { return 0.5f * v * erfcf(v * -0.70710678f); });
    case of(Activation::kGeluTanh):  // 0.5 x (1 + tanh u) is x sigmoid(2 u)
      return each([](float v, float) { return v * sigmoid(1.59576912f * (v + 0.044715f * v * v * v)); });
    case of(Activation::kTanh):
      return each([](float v, float) { return tanhf(v); });
    case of(Activation::kSigmoid):
      return each([](float v, float) { return sigmoid(v); });
    case of(Activation::kExp):
      return each([](float v, float) { return expf(v); });
    case of(Activation::kErf):
      return each([](float v, float) { return erff(v); });
    case of(Activation::kSoftplus):
      return each([](float v, float) { return larger(v, 0.0f) + log1pf(expf(-fabsf(v))); });
    case of(Activation::kCos):
      return each([](float v, float) { return sine(v, 1.0); });
    case of(Activation::kSin):
      return each([](float v, float) { return sine(v, 0.0); });
    default:  // kCopy
      return;
  }
}

template <typename T>
__device__ inline void elementwise(const RowInstruction& in, const Place& to, const Place& a,
                                   const Place& b) {
  const unsigned n1 = static_cast<unsigned>(in.size[1]), n0 = static_cast<unsigned>(in.size[2]);
  const unsigned runs = static_cast<unsigned>(in.size[0]) * n1, all = runs * n0;
  const auto at = [&](const Place& p, unsigned i) {
    if (runs == 1) return i * p.stride[2];
    const unsigned run = i / n0, i2 = run / n1;
    return p.run(static_cast<int>(i2), static_cast<int>(run - i2 * n1)) + (i - run * n0) * p.stride[2];
  };
  for (unsigned first = threadIdx.x; first < all; first += kAtOnce * kRowThreads) {
    float x[kAtOnce] = {}, y[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const unsigned element = first + i * kRowThreads;
      if (element >= all) break;
      x[i] = a.read<T>(at(a, element));
      y[i] = b.read<T>(at(b, element));
    }
    compute(in.op, x, y);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const unsigned element = first + i * kRowThreads;
      if (element >= all) break;
      to.write<T>(at(to, element), rounded<T>(x[i], in.round));
    }
  }
}

// ---------------------------------------------------------------- runs

struct Larger {
  __device__ float operator()(float x, float y) const { return larger(x, y); }
};

// combine() over each run: a warp takes one after the other; the only one there is, the whole block.
template <typename T, typename Combine>
__device__ inline void reduce_runs(const RowInstruction& in, const Place& to, const Place& a, float nothing,
                                   Combine combine) {
  const int n1 = static_cast<int>(in.size[1]), n0 = static_cast<int>(in.size[2]);
  const int runs = static_cast<int>(in.size[0]) * n1;
  const auto part = [&](int64_t begin, int first, int step) {
    float value = nothing;
    for (int i = first; i < n0; i += step) value = combine(value, a.read<T>(begin + i * a.stride[2]));
    return value;
  };
  const auto finish = [&](int64_t at, float value) {
    if (in.op == RowOp::kMean) value /= static_cast<float>(n0);
    to.write<T>(at, rounded<T>(value, in.round));
  };
  if (runs == 1) {
    const float value = block_reduce<kRowThreads>(part(0, threadIdx.x, kRowThreads), combine);
    if (threadIdx.x == 0) finish(0, value);
    return;
  }
  for (int run = warp_index(); run < runs; run += kRowWarps) {
    const int i2 = run / n1, i1 = run - i2 * n1;
    const float value = warp_reduce(part(a.run(i2, i1), lane_index(), kLanes), combine);
    if (lane_index() == 0) finish(to.run(i2, i1), value);
  }
}

// An element's place among the largest is how many come before it.
template <typename T>
__device__ inline void ranked(const RowInstruction& in, const Place& to, const Place& a) {
  const int n0 = static_cast<int>(in.size[2]), all = static_cast<int>(in.size[0]) * n0;
  for (int i = threadIdx.x; i < all; i += kRowThreads) {
    const int i2 = i / n0, mine = i - i2 * n0;
    const int64_t begin = a.run(i2, 0);
    const float x = a.read<T>(begin + mine * a.stride[2]);
    int before = 0;
    for (int other = 0; other < n0 && before < in.size[1]; ++other) {
      const float y = a.read<T>(begin + other * a.stride[2]);
      const bool is_larger = is_nan(y) ? !is_nan(x) : y > x, is_equal = is_nan(y) ? is_nan(x) : y == x;
      before += is_larger || (is_equal && other < mine);
    }
    if (before < in.size[1]) to.write<T>(to.run(i2, before), static_cast<float>(mine));
  }
}

// A place outside of the run is the nearest one in it, of NaN the first.
template <typename T>
__device__ inline void picked(const RowInstruction& in, const Place& to, const Place& a, const Place& b) {
  const int n1 = static_cast<int>(in.size[1]), runs = static_cast<int>(in.size[0]) * n1;
  const int64_t last = in.size[2] - 1;
  for (int run = threadIdx.x; run < runs; run += kRowThreads) {
    const int i2 = run / n1, i1 = run - i2 * n1;
    const float place = b.read<T>(b.run(i2, i1));
    const int64_t i = !(place > 0.0f)                    ? 0
                      : place < static_cast<float>(last) ? static_cast<int64_t>(place)
                                                         : last;
    to.write<T>(to.run(i2, i1), rounded<T>(a.read<T>(a.run(i2, i1) + i * a.stride[2]), in.round));
  }
}

template <typename T>
__device__ inline void execute(const RowInstruction& in, const StepRowsArgs& args, int node, float* scratch) {
  const Place to = place<T>(in.to, args, node, scratch);
  if (!to.data) return;  // for all threads alike
  const Place a = place<T>(in.a, args, node, scratch), b = place<T>(in.b, args, node, scratch);
  switch (in.op) {
    case RowOp::kMean:
    case RowOp::kSum:
      return reduce_runs<T>(in, to, a, 0.0f, Sum{});
    case RowOp::kMax:
      return reduce_runs<T>(in, to, a, -INFINITY, Larger{});
    case RowOp::kTop:
      return ranked<T>(in, to, a);
    case RowOp::kPick:
      return picked<T>(in, to, a, b);
    default:
      return elementwise<T>(in, to, a, b);
  }
}

// ---------------------------------------------------------------- a node's instructions

// To shared memory, by the first threads.
__device__ inline void fetch(RowInstruction& to, const RowInstruction& from) {
  constexpr unsigned kWords = sizeof(RowInstruction) / sizeof(uint64_t);
  static_assert(sizeof(RowInstruction) % sizeof(uint64_t) == 0 && kWords <= kRowThreads, "a word each");
  if (threadIdx.x < kWords)
    reinterpret_cast<uint64_t*>(&to)[threadIdx.x] = reinterpret_cast<const uint64_t*>(&from)[threadIdx.x];
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, 1) step_rows_kernel(const StepRowsArgs a) {
  __shared__ RowInstruction instructions[2];  // the one that is done, and the next
  wait_for_previous_launch();
  allow_next_launch();
  const int node = static_cast<int>(blockIdx.x), count = static_cast<int>(a.count);
  float* scratch = a.memory ? a.memory + node * a.scratch : nullptr;
  if (!a.memory && a.scratch > 0) scratch = dynamic_shared<float>();
  fetch(instructions[0], a.instructions[0]);
  __syncthreads();
  for (int i = 0; i < count; ++i) {
    if (i + 1 < count) fetch(instructions[(i + 1) % 2], a.instructions[i + 1]);
    execute<T>(instructions[i % 2], a, node, scratch);
    __syncthreads();
  }
}

}  // namespace

cudaError_t step_rows_cuda(const StepRowsArgs& a, cudaStream_t stream) {
  const int64_t shared_bytes = a.memory ? 0 : a.scratch * static_cast<int64_t>(sizeof(float));
  if (shared_bytes > kMaxSharedScratch || a.count > INT32_MAX) return cudaErrorInvalidValue;
  if (a.count == 0) return cudaSuccess;
  return dispatch_dtype(a.dtype, [&](auto element) {
    return launch(step_rows_kernel<decltype(element)>, overlapping(a.nodes, kRowThreads, shared_bytes),
                  stream, a);
  });
}

}  // namespace cerberus
