// The best candidates seen so far, kept sorted over the lanes of a warp, and the softmax sum that goes with
// them.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "copy.cuh"
#include "reduce.cuh"

namespace cerberus {

// A token id and its logit. Orders as results do: best first, ties to the lowest id.
struct Candidate {
  float logit;
  int32_t id;
};
__device__ inline Candidate no_candidate() { return {-INFINITY, INT32_MAX}; }
__device__ inline bool is_better(Candidate a, Candidate b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// Lane l holds the l-th best candidate that the warp has seen; 32 are kept, `places` of them are wanted.
struct BestCandidates {
  Candidate kept = no_candidate();

  // Every lane brings one candidate; true where one was good enough. After the first few rounds almost none
  // is, and a round is one vote. A logit that is not a number counts as the worst.
  __device__ bool offer(Candidate offered, int places) {
    if (is_nan(offered.logit)) offered.logit = -INFINITY;
    uint32_t waiting = ballot(is_better(offered, shuffle(kept, places - 1)));
    const bool any = waiting != 0;
    while (waiting != 0) {
      const Candidate candidate = shuffle(offered, lowest_bit(waiting));
      waiting &= waiting - 1;
      // The list is sorted, so those that are better are its first ones; the others move down by one.
      const int place = count_bits(ballot(is_better(kept, candidate)));
      const Candidate above = shuffle_up(kept, 1);
      if (lane_index() == place) kept = candidate;
      if (lane_index() > place) kept = above;
    }
    return any;
  }
};

// sum e^(x - max) over the x seen so far.
struct SoftmaxSum {
  float max, sum;

  __device__ void add(float x) {
    if (x > max) {
      sum *= expf(max - x);
      max = x;
    }
    sum += expf(x - max);
  }
};
// Of nothing. A maximum of -inf would make the first distance from it not a number.
__device__ inline SoftmaxSum no_softmax_sum() { return {-FLT_MAX, 0.0f}; }

struct MergeSoftmaxSums {
  __device__ SoftmaxSum operator()(SoftmaxSum a, SoftmaxSum b) const {
    SoftmaxSum merged;
    merged.max = a.max > b.max ? a.max : b.max;
    merged.sum = a.sum * expf(a.max - merged.max) + b.sum * expf(b.max - merged.max);
    return merged;
  }
};

}  // namespace cerberus
