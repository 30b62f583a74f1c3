// f(x) of every element.
//
// Every element goes through the same instructions, wherever it lies: a task owns a fixed range of elements
// and takes them through a buffer that is filled up with zeros, so that there are no last elements.
//
// Of float32 in float64, rounded once, because most of these functions lose digits on the way: x e^-x of a
// large x, say. Of 16-bit types in float32, arranged so that the error stays far below half a unit of theirs
// (test_activation.py says how far); cos and sin are libm's for all.
#include <cmath>

#include "cpu/activate.h"
#include "cpu/kernels.h"
#include "cpu/tanh.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {
namespace {

// Of float beside those of double here, which would hide them.
using CERBERUS_ISA::broadcast;
using CERBERUS_ISA::exp;
using CERBERUS_ISA::select;
using CERBERUS_ISA::tanh;

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

// --- float32, for 16-bit types ---

Vec magnitude(Vec x) { return bit_cast<Vec>(bit_cast<UIntVec>(x) & 0x7fffffffu); }

// e^x to 1e-7 of itself, and as near as subnormals are where it is one; NaN stays. vec.h's is cut off at
// both ends.
Vec wide_exp(Vec x) {
  const Vec low = broadcast(-104.0f), high = broadcast(89.0f);  // 0 and infinity, once rounded
  const Vec within = select(x < low, low, select(x > high, high, x));
  const Vec round = broadcast(12582912.0f);  // 1.5 * 2^23, as in vec.h
  const Vec shifted = multiply_add(within, broadcast(1.44269504f), round);
  const Vec n = shifted - round;
  const Vec r = multiply_add(n, broadcast(2.12194440e-4f), multiply_add(n, broadcast(-0.693359375f), within));
  Vec y = broadcast(1.0f / 5040);
  y = multiply_add(y, r, broadcast(1.0f / 720));
  y = multiply_add(y, r, broadcast(1.0f / 120));
  y = multiply_add(y, r, broadcast(1.0f / 24));
  y = multiply_add(y, r, broadcast(1.0f / 6));
  y = multiply_add(y, r, broadcast(0.5f));
  y = multiply_add(y, r, broadcast(1.0f));
  y = multiply_add(y, r, broadcast(1.0f));
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_scalef_ps(bit_cast<__m512>(y), bit_cast<__m512>(n)));
#else
  // Two halves of n: 2^n itself may be no float. The first product is exact.
  const UIntVec whole = bit_cast<UIntVec>(shifted) - bit_cast<UIntVec>(round);
  const UIntVec half = bit_cast<UIntVec>(bit_cast<IntVec>(whole) >> 1);
  return y * bit_cast<Vec>((half + 127u) << 23) * bit_cast<Vec>((whole - half + 127u) << 23);
#endif
}

// 1 / (1 + e^-x), from e^-|x|, which does not overflow.
Vec sigmoid(Vec x) {
  const Vec e = wide_exp(-magnitude(x));
  return select(x < 0.0f, e, broadcast(1.0f)) / (1.0f + e);
}
Vec silu(Vec x) { return x * sigmoid(x); }
Vec gelu_tanh(Vec x) {
  const float root = 1.59576912f;  // 2 sqrt(2 / pi)
  return x * sigmoid(x * multiply_add(x * x, broadcast(0.044715f * root), broadcast(root)));
}

// log(1 + e^x) = max(x, 0) + 2 artanh(e / (2 + e)) with e = e^-|x|; the series is in squares of at most 1/9.
Vec softplus(Vec x) {
  const Vec e = wide_exp(-magnitude(x)), y = e / (2.0f + e), z = y * y;
  Vec sum = broadcast(1.0f / 15);
#pragma GCC unroll 7
  for (int odd = 13; odd > 0; odd -= 2) sum = multiply_add(sum, z, broadcast(1.0f / static_cast<float>(odd)));
  return multiply_add(y + y, sum, select(x < 0.0f, Vec{}, x));
}

// erfc(y), y >= 0, of which `square` is y^2 and `rest` what y^2 was rounded by: e^-(y^2) times a polynomial
// in t = 2 / (2 + y) for e^(y^2) erfc(y), fitted here for the smallest relative error (4e-8).
Vec erfc(Vec y, Vec square, Vec rest) {
  const Vec t = 2.0f / (2.0f + y);
  Vec p = broadcast(-0.05914912f);
  p = multiply_add(p, t, broadcast(0.284966886f));
  p = multiply_add(p, t, broadcast(-0.488013297f));
  p = multiply_add(p, t, broadcast(0.279000014f));
  p = multiply_add(p, t, broadcast(-0.0272700246f));
  p = multiply_add(p, t, broadcast(0.202960297f));
  p = multiply_add(p, t, broadcast(0.243034452f));
  p = multiply_add(p, t, broadcast(0.282384872f));
  p = multiply_add(p, t, broadcast(0.282085866f));
  return multiply_add(-rest, p, p) * t * wide_exp(-square);
}

// x erfc(-x / sqrt(2)) / 2; beyond 16 the tail is 0.
Vec gelu(Vec x) {
  const Vec limit = broadcast(16.0f);
  const Vec y = select(magnitude(x) < limit, magnitude(x), limit), square = y * y;
  const Vec rest = multiply_add(y, y, -square);
  const Vec tail = 0.5f * erfc(y * 0.707106781f, 0.5f * square, 0.5f * rest);
  return x * select(x < 0.0f, tail, 1.0f - tail);
}

// Taylor's series where |x| < 1/2, so that small ones keep their digits.
Vec erf(Vec x) {
  const Vec limit = broadcast(5.0f);  // beyond that 1
  const Vec y = select(magnitude(x) < limit, magnitude(x), limit), square = y * y;
  Vec small = broadcast(-1.0f / 1320);
  small = multiply_add(small, square, broadcast(1.0f / 216));
  small = multiply_add(small, square, broadcast(-1.0f / 42));
  small = multiply_add(small, square, broadcast(0.1f));
  small = multiply_add(small, square, broadcast(-1.0f / 3));
  small = multiply_add(small, square, broadcast(1.0f)) * (y * 1.12837917f);  // 2 / sqrt(pi)
  const Vec large = 1.0f - erfc(y, square, multiply_add(y, y, -square));
  const Vec result = select(y < 0.5f, small, large);
  const UIntVec sign = bit_cast<UIntVec>(x) & 0x80000000u;
  return select(x == x, bit_cast<Vec>(bit_cast<UIntVec>(result) | sign), x);
}

// --- all elements ---

// x[i] = f(x[i]) for the first `count` of the buffer's elements; those behind, up to a whole vector, become
// anything.
template <typename Function>
void doubles(float* x, int count, const Function& function) {
  for (int i = 0; i < count; i += kDoubles) {
    Floats narrow;
    __builtin_memcpy(&narrow, x + i, sizeof(narrow));
    narrow = __builtin_convertvector(function(__builtin_convertvector(narrow, Doubles)), Floats);
    __builtin_memcpy(x + i, &narrow, sizeof(narrow));
  }
}

template <typename Function>
void floats(float* x, int count, const Function& function) {
  for (int i = 0; i < count; i += kLanes) store(function(load(x + i)), x + i);
}

template <typename Function>
void scalars(float* x, int count, const Function& function) {
  for (int i = 0; i < count; ++i) x[i] = static_cast<float>(function(x[i]));
}

// An overloaded function of vectors as an object.
#define ON(Vector, function) [](Vector x) { return function(x); }

void apply_in_float64(Activation kind, float* x, int count) {
  switch (kind) {
    case Activation::kSilu:
      return doubles(x, count, ON(Doubles, silu));
    case Activation::kGelu:  // erfc, not 1 + erf, which cancels where x is negative
      return scalars(x, count, [](double v) { return 0.5 * v * ::erfc(v * -0.7071067811865476); });
    case Activation::kGeluTanh:
      return doubles(x, count, ON(Doubles, gelu_tanh));
    case Activation::kTanh:
      return doubles(x, count, ON(Doubles, tanh));
    case Activation::kSigmoid:
      return doubles(x, count, ON(Doubles, sigmoid));
    case Activation::kExp:
      return doubles(x, count, ON(Doubles, exp));
    case Activation::kErf:
      return scalars(x, count, [](double v) { return ::erf(v); });
    case Activation::kSoftplus:
      return doubles(x, count, ON(Doubles, softplus));
    case Activation::kCos:
      return scalars(x, count, [](float v) { return ::cosf(v); });
    case Activation::kSin:
      return scalars(x, count, [](float v) { return ::sinf(v); });
  }
}

void apply_in_float32(Activation kind, float* x, int count) {
  switch (kind) {
    case Activation::kSilu:
      return floats(x, count, ON(Vec, silu));
    case Activation::kGelu:
      return floats(x, count, ON(Vec, gelu));
    case Activation::kGeluTanh:
      return floats(x, count, ON(Vec, gelu_tanh));
    case Activation::kTanh:
      return floats(x, count, ON(Vec, tanh));
    case Activation::kSigmoid:
      return floats(x, count, ON(Vec, sigmoid));
    case Activation::kExp:
      return floats(x, count, ON(Vec, wide_exp));
    case Activation::kErf:
      return floats(x, count, ON(Vec, erf));
    case Activation::kSoftplus:
      return floats(x, count, ON(Vec, softplus));
    default:  // cos and sin
      return apply_in_float64(kind, x, count);
  }
}
#undef ON

void apply(Activation kind, DType dtype, float* x, int count) {
  (dtype == DType::kFloat32 ? apply_in_float64 : apply_in_float32)(kind, x, count);
}

// Calls body(first element, how many) for all, a buffer at a time.
template <typename Body>
void in_buffers(int64_t begin, int64_t end, const Body& body) {
  for (int64_t i = begin; i < end; i += kBuffer) body(i, static_cast<int>(smaller(kBuffer, end - i)));
}

}  // namespace

void activate(Activation kind, DType dtype, const float* in, int64_t count, float* out) {
  in_buffers(0, count, [&](int64_t begin, int some) {
    float x[kBuffer + kLanes];
    __builtin_memset(x + some / kLanes * kLanes, 0, sizeof(Vec));  // what fills up the last vector
    __builtin_memcpy(x, in + begin, sizeof(float) * some);
    apply(kind, dtype, x, some);
    __builtin_memcpy(out + begin, x, sizeof(float) * some);
  });
}

void activation(const ActivationArgs& a, const Parallel& parallel) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_tasks(parallel, (a.count + kPerTask - 1) / kPerTask, [&](int64_t task) {
      in_buffers(task * kPerTask, smaller(a.count, (task + 1) * kPerTask), [&](int64_t begin, int count) {
        T narrow[kBuffer] = {};
        float x[kBuffer];
        __builtin_memcpy(narrow, static_cast<const T*>(a.input) + begin, sizeof(T) * count);
        for (int i = 0; i < count; i += kLanes) store(load(narrow + i), x + i);
        apply(a.kind, a.dtype, x, count);
        for (int i = 0; i < count; i += kLanes) from_floats<kLanes>(x + i, narrow + i);
        __builtin_memcpy(static_cast<T*>(a.output) + begin, narrow, sizeof(T) * count);
      });
    });
  });
}

}  // namespace cerberus::CERBERUS_ISA
