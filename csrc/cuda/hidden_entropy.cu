// hidden_entropy: log(sum e^x) - sum p x of a row, in one pass over it.
//
// One block owns one row. A thread keeps the running maximum m, s = sum e^(x-m) and t = sum e^(x-m) (x-m) of
// its elements; the threads' triples are then merged. The entropy is log s - t / s, in which m itself no
// longer appears, so that a large common offset of the row costs no accuracy.
#include <cfloat>

#include "args.h"
#include "copy.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace cerberus {
namespace {

constexpr int kThreads = 256;  // 8 elements of 2 bytes each: one load per thread covers D = 2048

struct Moments {
  float max, sum, moment;

  // From deviations from `max` to deviations from the larger `to`.
  __device__ void rescale(float to) {
    const float factor = expf(max - to);
    // At factor 0 the distance may be infinite, and infinity times 0 is not a number.
    moment = factor > 0.0f ? factor * (moment + (max - to) * sum) : 0.0f;
    sum *= factor;
    max = to;
  }
  __device__ void add(float x) {
    if (x > max) rescale(x);
    const float weight = expf(x - max);
    sum += weight;
    moment += weight > 0.0f ? weight * (x - max) : weight;  // 0 log 0 is 0; not a number stays so
  }
};

struct Merge {
  __device__ Moments operator()(Moments a, Moments b) const {
    if (b.max > a.max) a.rescale(b.max);
    if (a.max > b.max) b.rescale(a.max);
    a.sum += b.sum;
    a.moment += b.moment;
    return a;
  }
};

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, 1) hidden_entropy_kernel(const HiddenEntropyArgs a) {
  wait_for_previous_launch();
  allow_next_launch();
  const T* hidden = static_cast<const T*>(a.hidden) + blockIdx.x * a.size;
  Moments moments = {-FLT_MAX, 0.0f, 0.0f};  // -inf would make the first distance not a number
  for_each_in_row<kThreads, kVector>(hidden, a.size, [&](int64_t, float x) { moments.add(x); });
  moments = block_reduce<kThreads>(moments, Merge{});
  if (threadIdx.x == 0) a.entropy[blockIdx.x] = logf(moments.sum) - moments.moment / moments.sum;
}

}  // namespace

cudaError_t hidden_entropy_cuda(const HiddenEntropyArgs& a, cudaStream_t stream) {
  return dispatch_vector(
      a.dtype, a.size,
      [&](auto element, auto vector) {
        return launch(hidden_entropy_kernel<decltype(element), vector()>, overlapping(a.rows, kThreads),
                      stream, a);
      },
      a.hidden);
}

}  // namespace cerberus
