// The keys that a node of tree_attention sees, by position: the committed ones, of which position p lies in
// slot p, then those of its path, of which the n-th lies in the slot of its n-th ancestor.
#pragma once

#include <cstdint>

#include "args.h"
#include "reduce.cuh"

namespace cerberus {

// Positions [low, high).
struct Span {
  int low, high;
};

// What a node sees. Below position `straight` every key that it sees lies in the slot of its position.
struct NodeView {
  Span span;
  int straight;
};

// The lowest `count` bits.
__device__ inline uint64_t low_bits(int64_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

__device__ inline int clamped(int64_t position) {
  return position < 0 ? 0 : position < INT32_MAX ? static_cast<int>(position) : INT32_MAX;
}

// Nodes without a slot, behind the last one or in a cache that is too small, count for a node's position, but
// are not seen: the last ones of a path.
__device__ inline NodeView view_of(const TreeAttentionArgs& a, int64_t length, int node) {
  const int64_t* path = a.ancestors + node * a.words;
  const int64_t free = a.capacity - length, slots = a.nodes < free ? a.nodes : free;
  int64_t nodes = 0, seen = 0, straight = 0;  // on the path; of them with a slot; first ones without a gap
#pragma unroll 4
  for (int64_t w = 0; w < a.words; ++w) {
    const uint64_t word = static_cast<uint64_t>(path[w]);
    nodes += count_bits(word);
    seen += count_bits(word & low_bits(slots - w * 64));
    if (straight == w * 64) straight += count_bits(word & ~(word + 1));
  }
  NodeView view;
  view.span.low = a.window > 0 ? clamped(length + nodes - a.window) : 0;
  view.span.high = clamped(length < a.capacity ? length + seen : a.capacity);
  view.straight = straight < seen ? clamped(length + straight) : INT32_MAX;
  return view;
}

// The n-th of the bits that are set, which are more than n.
__device__ inline int nth_bit(uint64_t word, int n) {
  int at = 0;
#pragma unroll
  for (int width = 32; width > 0; width /= 2) {
    const int below = count_bits((word >> at) & low_bits(width));
    if (n < below) continue;
    n -= below;
    at += width;
  }
  return at;
}

// The slot of a position that the node sees.
__device__ inline int slot_of(const TreeAttentionArgs& a, int64_t length, int node, int position) {
  if (position < length) return position;
  const int64_t* path = a.ancestors + node * a.words;
  int n = position - static_cast<int>(length);
#pragma unroll 1
  for (int64_t w = 0; w < a.words; ++w) {
    const uint64_t word = static_cast<uint64_t>(path[w]);
    const int count = count_bits(word);
    if (n < count) return static_cast<int>(length + w * 64) + nth_bit(word, n);
    n -= count;
  }
  return 0;
}

}  // namespace cerberus
