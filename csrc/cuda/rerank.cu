// rerank: a head's drafts, weighed anew after each draft of the head before it, by a softmax over them and
// the rest.
//
// One block owns one head of one row. A lane owns a child, of which there are no more than lanes; a warp owns
// every kWarps-th parent, all of them at once, so that a child's row is read once. A parent's row is the same
// for all lanes. Maximum and sum of the softmax are the warp's.
#include <cmath>

#include "args.h"
#include "copy.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace cerberus {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kLanes;
constexpr int kEach = kLanes / kWarps;  // parents of a warp: there are no more than kLanes in all

__device__ bool is_finite(float x) { return x - x == 0.0f; }

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, 1) rerank_kernel(const RerankArgs a) {
  wait_for_previous_launch();
  allow_next_launch();
  const float none = -INFINITY;
  const unsigned heads = static_cast<unsigned>(a.heads - 1);
  const int64_t head = blockIdx.x % heads, row = blockIdx.x / heads;
  const int64_t first = (row * a.heads + head + 1) * a.drafts;
  const int child = lane_index();
  const bool offered = child < a.drafts;
  const auto place_of = [&](int64_t at) -> int64_t {
    const int64_t place = offered ? a.ids[at] : -1;
    return place >= 0 && place < a.vocab ? place : -1;
  };
  const int64_t place = place_of(first + child), parent = place_of(first - a.drafts + child);
  float logprob = place >= 0 ? a.logprobs[first + child] : none;
  if (!is_finite(logprob)) logprob = none;
  const bool is_draft = logprob > none;

  const T* children = static_cast<const T*>(a.children) + (is_draft ? place : 0) * a.rank;
  const T* table = static_cast<const T*>(a.parents) + head * a.vocab * a.rank;
  int64_t parents[kEach];
  float scores[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    parents[i] = shuffle(parent, warp_index() + i * kWarps);
    scores[i] = 0.0f;
  }
  for (int64_t at = 0; at < a.rank; at += kVector) {
    float of_child[kVector];
    load_if<kVector>(is_draft, children + at).unpack(of_child);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      float of_parent[kVector];
      load_if<kVector>(parents[i] >= 0, table + (parents[i] >= 0 ? parents[i] : 0) * a.rank + at)
          .unpack(of_parent);
#pragma unroll
      for (int j = 0; j < kVector; ++j) scores[i] = fmaf(of_parent[j], of_child[j], scores[i]);
    }
  }

  const float slope = a.slopes[head];
  const float left = 1.0f - warp_reduce(is_draft ? expf(logprob) : 0.0f, Sum{});
  float rest = slope * logf(left > kLeastRest ? left : kLeastRest) + a.rest[head];
  if (!is_finite(rest)) rest = none;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t number = warp_index() + i * kWarps;
    if (number >= a.drafts) break;  // the same for all lanes
    float score = is_draft ? slope * logprob + scores[i] : none;
    if (!is_finite(score)) score = none;
    const float top = Max{}(warp_reduce(score, Max{}), rest);
    const float shift = top > none ? top : 0.0f;
    const float mass = warp_reduce(expf(score - shift), Sum{}) + expf(rest - shift);
    const float found = score > none ? score - shift - logf(mass) : none;
    if (offered)
      a.conditional[(blockIdx.x * a.drafts + number) * a.drafts + child] = parents[i] >= 0 ? found : logprob;
  }
}

}  // namespace

cudaError_t rerank_cuda(const RerankArgs& a, cudaStream_t stream) {
  return dispatch_vector(
      a.dtype, a.rank,
      [&](auto element, auto vector) {
        return launch(rerank_kernel<decltype(element), vector()>,
                      overlapping(a.rows * (a.heads - 1), kThreads), stream, a);
      },
      a.parents, a.children);
}

}  // namespace cerberus
