// f(x) of every element, in float64 between a float32 argument and a result that is rounded once.
//
// Every element goes through the same instructions, wherever it lies: a task owns a fixed range of elements
// and takes them through a buffer that is filled up with zeros, so that there are no last elements. float64,
// because most of these functions lose digits on the way: x e^-x of a large x, 1 + erf(x) of a negative one.
#include <cmath>

#include "cpu/activate.h"
#include "cpu/kernels.h"
#include "cpu/tanh.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int64_t kPerTask = 4096;  // some microseconds: worth waking a thread for
constexpr int kBuffer = 256;        // a multiple of every level's lanes

constexpr int kDoubles = kLanes / 2;
typedef float Floats __attribute__((vector_size(4 * kDoubles)));
typedef double Doubles __attribute__((vector_size(8 * kDoubles)));
typedef int64_t Longs __attribute__((vector_size(8 * kDoubles)));
typedef uint64_t Bits __attribute__((vector_size(8 * kDoubles)));

constexpr uint64_t kSign = uint64_t{1} << 63;

Doubles broadcast(double x) { return x - Doubles{}; }

Doubles select(Longs condition, Doubles yes, Doubles no) {
  return bit_cast<Doubles>((condition & bit_cast<Longs>(yes)) | (~condition & bit_cast<Longs>(no)));
}

Doubles magnitude(Doubles x) { return bit_cast<Doubles>(bit_cast<Bits>(x) & ~kSign); }

// e^x to 1e-11 of itself. 0 below -200, infinite above 200, where float32 holds neither e^x nor e^-x.
Doubles exp(Doubles x) {
  const Doubles low = broadcast(-200.0), high = broadcast(200.0);
  const Doubles within = select(x < low, low, select(x > high, high, x));
  const Doubles round = broadcast(0x1.8p52);  // adding it rounds; the low bits hold the integer
  const Doubles shifted = within * 1.4426950408889634 + round;
  const Doubles r = within - (shifted - round) * 0.6931471805599453;
  Doubles y = broadcast(1.0 / 362880);
  y = y * r + 1.0 / 40320;
  y = y * r + 1.0 / 5040;
  y = y * r + 1.0 / 720;
  y = y * r + 1.0 / 120;
  y = y * r + 1.0 / 24;
  y = y * r + 1.0 / 6;
  y = y * r + 0.5;
  y = y * r + 1.0;
  y = y * r + 1.0;
  const Bits power = (bit_cast<Bits>(shifted) - bit_cast<Bits>(round) + 1023u) << 52;
  const Doubles result = y * bit_cast<Doubles>(power);
  return select(x < low, Doubles{}, select(x > high, broadcast(__builtin_inf()), select(x == x, result, x)));
}

// log(1 + x) of 0 <= x <= 1: 2 artanh(x / (2 + x)), whose series is in squares of at most 1/9.
Doubles log1p(Doubles x) {
  const Doubles y = x / (x + 2.0), z = y * y;
  Doubles sum = broadcast(1.0 / 21);
#pragma GCC unroll 10
  for (int odd = 19; odd > 0; odd -= 2) sum = sum * z + 1.0 / odd;
  return 2.0 * y * sum;
}

Doubles silu(Doubles x) { return x / (1.0 + exp(-x)); }

Doubles sigmoid(Doubles x) { return 1.0 / (1.0 + exp(-x)); }

// 0.5 x (1 + tanh u) is x sigmoid(2 u).
Doubles gelu_tanh(Doubles x) {
  const double twice_root = 1.5957691216057308;  // 2 sqrt(2 / pi)
  return x / (1.0 + exp(-twice_root * (x + 0.044715 * x * x * x)));
}

Doubles tanh(Doubles x) {
  const Doubles y = magnitude(x), e = exp(-2.0 * y);
  // 1 - e cancels where x is small.
  const Doubles series = y - y * y * y * (1.0 / 3), whole = (1.0 - e) / (1.0 + e);
  const Doubles result = select(y < 0x1p-10, series, whole);
  return bit_cast<Doubles>(bit_cast<Bits>(result) | (bit_cast<Bits>(x) & kSign));
}

Doubles softplus(Doubles x) { return select(x > 0.0, x, Doubles{}) + log1p(exp(-magnitude(x))); }

template <typename Function>
void vectors(float* x, const Function& function) {
  for (int i = 0; i < kBuffer; i += kDoubles) {
    Floats narrow;
    __builtin_memcpy(&narrow, x + i, sizeof(narrow));
    narrow = __builtin_convertvector(function(__builtin_convertvector(narrow, Doubles)), Floats);
    __builtin_memcpy(x + i, &narrow, sizeof(narrow));
  }
}

template <typename Function>
void scalars(float* x, int count, const Function& function) {
  for (int i = 0; i < count; ++i) x[i] = static_cast<float>(function(x[i]));
}

// x[i] = f(x[i]) for the first `count` of the buffer's elements; the others become anything.
void apply(Activation kind, float* x, int count) {
  switch (kind) {
    case Activation::kSilu:
      return vectors(x, silu);
    case Activation::kGelu:  // erfc, not 1 + erf, which cancels where x is negative
      return scalars(x, count, [](double v) { return 0.5 * v * ::erfc(v * -0.7071067811865476); });
    case Activation::kGeluTanh:
      return vectors(x, gelu_tanh);
    case Activation::kTanh:
      return vectors(x, static_cast<Doubles (*)(Doubles)>(tanh));
    case Activation::kSigmoid:
      return vectors(x, sigmoid);
    case Activation::kExp:
      return vectors(x, static_cast<Doubles (*)(Doubles)>(exp));
    case Activation::kErf:
      return scalars(x, count, [](double v) { return ::erf(v); });
    case Activation::kSoftplus:
      return vectors(x, softplus);
    case Activation::kCos:
      return scalars(x, count, [](float v) { return ::cosf(v); });
    case Activation::kSin:
      return scalars(x, count, [](float v) { return ::sinf(v); });
  }
}

// The functions whose float32 arithmetic loses nothing that 16 bits could show: to some 1e-6 of the result.
// x sigmoid(u)
Vec with_sigmoid(Vec x, Vec u) {
  const Vec usual = x / (1.0f + CERBERUS_ISA::exp(-u));
  const IntVec tiny = u < -80.0f;  // e^-u would be infinite, but the result is none that float32 cannot hold
  if (!any(tiny)) return usual;
  const Vec root = CERBERUS_ISA::exp(0.5f * u);
  return CERBERUS_ISA::select(tiny, x * root * root, usual);
}
Vec narrow_gelu_tanh(Vec x) { return with_sigmoid(x, x * (1.5957691216f + 0.07135481283f * x * x)); }

template <typename Function>
void narrow_vectors(float* x, const Function& function) {
  for (int i = 0; i < kBuffer; i += kLanes) store(function(load(x + i)), x + i);
}

// apply for a dtype: 16 bits are half as many instructions for twice as many lanes.
void apply(Activation kind, DType dtype, float* x, int count) {
  if (dtype != DType::kFloat32) {
    if (kind == Activation::kSilu) return narrow_vectors(x, [](Vec v) { return with_sigmoid(v, v); });
    if (kind == Activation::kSigmoid)
      return narrow_vectors(x, [](Vec v) { return with_sigmoid(CERBERUS_ISA::broadcast(1.0f), v); });
    if (kind == Activation::kGeluTanh) return narrow_vectors(x, narrow_gelu_tanh);
    if (kind == Activation::kTanh) return narrow_vectors(x, static_cast<Vec (*)(Vec)>(CERBERUS_ISA::tanh));
  }
  apply(kind, x, count);
}

}  // namespace

void activate(Activation kind, DType dtype, const float* in, int64_t count, float* out) {
  for (int64_t begin = 0; begin < count; begin += kBuffer) {
    float x[kBuffer] = {};
    const int some = static_cast<int>(smaller(kBuffer, count - begin));
    __builtin_memcpy(x, in + begin, sizeof(float) * some);
    apply(kind, dtype, x, some);
    __builtin_memcpy(out + begin, x, sizeof(float) * some);
  }
}

void activation(const ActivationArgs& a, const Parallel& parallel) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_tasks(parallel, (a.count + kPerTask - 1) / kPerTask, [&](int64_t task) {
      const int64_t end = smaller(a.count, (task + 1) * kPerTask);
      for (int64_t begin = task * kPerTask; begin < end; begin += kBuffer) {
        const int count = static_cast<int>(smaller(kBuffer, end - begin));
        T narrow[kBuffer] = {};
        float x[kBuffer];
        __builtin_memcpy(narrow, static_cast<const T*>(a.input) + begin, sizeof(T) * count);
        for (int i = 0; i < kBuffer; i += kLanes) store(load(narrow + i), x + i);
        apply(a.kind, a.dtype, x, count);
        for (int i = 0; i < kBuffer; i += kLanes) from_floats<kLanes>(x + i, narrow + i);
        __builtin_memcpy(static_cast<T*>(a.output) + begin, narrow, sizeof(T) * count);
      }
    });
  });
}

}  // namespace cerberus::CERBERUS_ISA
