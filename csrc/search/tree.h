// Tree search and tree validation on the host. Plain C++: module.cpp binds it to Python.
//
// A tree is its `parents`: node 0 is the root, parents[0] = -1, and parents[i] < i for every other node.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cerberus::search {

struct Tree {
  std::vector<int64_t> parents;
  std::vector<int64_t> ranks;  // node i at depth d is draft ranks[i] of head d; 0 for the root
};

// The tree of `size` nodes, root included, with the largest expected number of accepted drafts, where
// accuracy[d * drafts + r] is the probability that draft r of head d + 1 is right, independent of the other
// heads. Fewer nodes only where all `heads` x `drafts` paths together have fewer. Throws
// std::invalid_argument.
Tree best_tree(const double* accuracy, size_t heads, size_t drafts, int64_t size);

// Nodes between each node and the root: 0 for the root. Throws std::invalid_argument, which names `caller`.
std::vector<int64_t> depths(const int64_t* parents, size_t nodes, const char* caller = "depths");

// Row-major (nodes, ceil(nodes / 64)): bit j of row i is set where node j is on the path root .. i, i
// included.
std::vector<int64_t> ancestors(const int64_t* parents, size_t nodes);

// What a step reads of a tree, padded to `size` nodes with repetitions of node 1: parents, depths, sources
// (size,), ancestors (size, W), and tokens, `batch` times (size,). sources: where a node's token is: 0: it is
// the pending one; 1 + i: token i; 1 + size + d * drafts + r: draft r of head d + 1. ranks: r of each node,
// less than 0 where it is none of theirs; or null. Throws std::invalid_argument.
std::vector<int64_t> pack_tree(const int64_t* parents, const int64_t* tokens, const int64_t* ranks,
                               size_t nodes, size_t size, size_t batch, int64_t drafts);

inline size_t ancestor_words(size_t nodes) { return (nodes + 63) / 64; }

}  // namespace cerberus::search
