// The best draft tree of one step: which of the drafts of several proposers the target model is to check.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "conditional_rows.h"

namespace cerberus::search {

// One draft of how the text goes on. probabilities[i]: that tokens[i] is right where those before it are.
struct PathDraft {
  const int64_t* tokens = nullptr;
  const double* probabilities = nullptr;
  size_t length = 0;
  int64_t proposer = 0;
};

// Node 0 is the root; a node's parent stands before it, and the first n nodes are the best n.
struct BestDrafts {
  std::vector<int64_t> parents;
  std::vector<int64_t> tokens;        // 0 for the root
  std::vector<int64_t> proposers;     // who drafted it; 0 for the root
  std::vector<double> probabilities;  // that the node is accepted, its whole path being right; 1 for the root
};

// The `size` nodes, root included and none deeper than `max_depth`, that are most likely to be accepted;
// fewer where there are no more drafts; one of probability 0 is none.
//
// A token that both kinds of drafts offer after a node is one node, as likely as the likelier of the two
// says. After a node of a path, the other drafts share the probability that the path leaves.
//
// heads: null, or the heads' own drafts where they are conditional: those of `drafts` that are theirs, by
// proposer and token, are then weighed anew after every node deeper than the root.
//
// Throws std::invalid_argument where size < 1 or max_depth < 0, where a token is not in 0 .. vocabulary - 1,
// or a probability not in 0 .. 1.
BestDrafts best_drafts(const DepthDrafts& drafts, const std::vector<PathDraft>& paths, int64_t vocabulary,
                       int64_t size, int64_t max_depth, const HeadDrafts* heads = nullptr);

}  // namespace cerberus::search
