// The best draft tree of one step: which of the drafts of several proposers the target model is to check.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cerberus::search {

// Drafts for each depth, whatever the path there is: the heads', and others of this kind. Row-major (depths,
// drafts), row d for nodes of depth d + 1, best first; proposers: who makes each of them.
struct DepthDrafts {
  const int64_t* tokens = nullptr;
  const double* probabilities = nullptr;
  const int64_t* proposers = nullptr;
  size_t depths = 0;
  size_t drafts = 0;
};

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
// says. After a node of a path, the other drafts share the probability that the path leaves. Throws
// std::invalid_argument where size < 1 or max_depth < 0, where a token is not in 0 .. vocabulary - 1, or a
// probability not in 0 .. 1.
BestDrafts best_drafts(const DepthDrafts& drafts, const std::vector<PathDraft>& paths, int64_t vocabulary,
                       int64_t size, int64_t max_depth);

}  // namespace cerberus::search
