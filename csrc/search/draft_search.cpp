#include "draft_search.h"

#include <algorithm>
#include <queue>
#include <stdexcept>
#include <string>

namespace cerberus::search {
namespace {

constexpr size_t kNone = static_cast<size_t>(-1);

// The paths as a trie: paths with a common beginning share its nodes. Node 0 is the root.
class Trie {
 public:
  struct Node {
    int64_t token;
    int64_t proposer;
    double probability;
    std::vector<size_t> children;
  };

  explicit Trie(const std::vector<PathDraft>& paths) {
    for (const PathDraft& path : paths) {
      size_t node = 0;
      for (size_t i = 0; i < path.length; ++i)
        node = child(node, path.tokens[i], path.probabilities[i], path.proposer);
    }
  }

  const Node& operator[](size_t node) const { return nodes_[node]; }

 private:
  // The child of `node` with this token; of two that draft it, the likelier one counts, of equals the
  // earlier.
  size_t child(size_t node, int64_t token, double probability, int64_t proposer) {
    for (const size_t other : nodes_[node].children) {
      Node& known = nodes_[other];
      if (known.token != token) continue;
      if (probability > known.probability) known.probability = probability, known.proposer = proposer;
      return other;
    }
    nodes_.push_back({token, proposer, probability, {}});
    nodes_[node].children.push_back(nodes_.size() - 1);
    return nodes_.size() - 1;
  }

  std::vector<Node> nodes_{{0, 0, 1.0, {}}};
};

// A node of the tree, and what is needed to find its children.
struct Expanded {
  size_t depth;
  size_t trie;   // its node in the trie, or kNone
  double share;  // what the probabilities of the next depth's drafts are multiplied with
  DraftRow row;  // these drafts
};

struct Candidate {
  double probability;
  int64_t order;  // when it became a candidate; breaks ties, so that equal inputs give equal trees
  size_t parent;
  int64_t token;
  int64_t proposer;
  size_t trie;
  size_t rank;  // among the drafts after its parent; kNone: it comes from the trie
};

bool operator<(const Candidate& a, const Candidate& b) {
  return a.probability != b.probability ? a.probability < b.probability : a.order > b.order;
}

class Search {
 public:
  Search(const DepthDrafts& drafts, const std::vector<PathDraft>& paths, size_t max_depth,
         const HeadDrafts* heads)
      : rows_(drafts, heads), trie_(paths), max_depth_(max_depth) {}

  BestDrafts run(size_t size) {
    add({1.0, 0, kNone, 0, 0, 0, kNone}, -1);
    while (tree_.parents.size() < size && !candidates_.empty()) {
      const Candidate best = candidates_.top();
      candidates_.pop();
      if (best.rank != kNone) offer_draft(best.parent, best.rank + 1);
      add(best, static_cast<int64_t>(best.parent));
    }
    return std::move(tree_);
  }

 private:
  void add(const Candidate& node, int64_t parent) {
    tree_.parents.push_back(parent);
    tree_.tokens.push_back(node.token);
    tree_.proposers.push_back(node.proposer);
    tree_.probabilities.push_back(node.probability);
    expanded_.push_back({parent < 0 ? 0 : expanded_[parent].depth + 1, node.trie, 1.0, {}});
    Expanded& added = expanded_.back();
    if (added.depth >= max_depth_) return;
    added.row = rows_.after(added.depth, node.token);
    offer_children(expanded_.size() - 1);
  }

  void offer_children(size_t node) {
    const DraftRow row = expanded_[node].row;
    if (expanded_[node].trie != kNone) {
      double by_path = 0, by_depth = 0;  // what the two kinds give the tokens of the paths
      for (const size_t child : trie_[expanded_[node].trie].children) {
        const Trie::Node& path = trie_[child];
        const size_t rank = rank_of(row, path.token);
        const double drafted = rank == kNone ? 0.0 : row.probabilities[rank];
        const bool path_likelier = path.probability >= drafted;
        offer(node, path_likelier ? path.probability : drafted, path.token,
              path_likelier ? path.proposer : row.proposers[rank], child, kNone);
        by_path += std::max(path.probability, drafted);
        by_depth += drafted;
      }
      if (by_path > 0) expanded_[node].share = by_path < 1 ? (1 - by_path) / (1 - by_depth) : 0.0;
    }
    offer_draft(node, 0);
  }

  // Offers the draft of this rank after `node`, or the next that is no child from the trie and
  // no repetition.
  void offer_draft(size_t node, size_t rank) {
    const auto [depth, trie, share, row] = expanded_[node];
    for (; rank < row.size; ++rank) {
      const int64_t token = row.tokens[rank];
      if (rank_of(row, token) != rank || follows(trie, token)) continue;
      offer(node, row.probabilities[rank] * share, token, row.proposers[rank], kNone, rank);
      return;
    }
  }

  void offer(size_t parent, double probability, int64_t token, int64_t proposer, size_t trie, size_t rank) {
    const double accepted = tree_.probabilities[parent] * probability;
    if (accepted > 0) candidates_.push({accepted, order_++, parent, token, proposer, trie, rank});
  }

  bool follows(size_t trie, int64_t token) const {
    if (trie == kNone) return false;
    const std::vector<size_t>& children = trie_[trie].children;
    return std::any_of(children.begin(), children.end(), [&](size_t c) { return trie_[c].token == token; });
  }

  // The first rank at which the token is drafted, or kNone.
  static size_t rank_of(const DraftRow& row, int64_t token) {
    const int64_t* at = std::find(row.tokens, row.tokens + row.size, token);
    return at == row.tokens + row.size ? kNone : static_cast<size_t>(at - row.tokens);
  }

  DraftRows rows_;
  const Trie trie_;
  const size_t max_depth_;
  BestDrafts tree_;
  std::vector<Expanded> expanded_;
  std::priority_queue<Candidate> candidates_;
  int64_t order_ = 0;
};

void check(const int64_t* tokens, const double* probabilities, size_t count, int64_t vocabulary) {
  for (size_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocabulary) {
      throw std::invalid_argument("best_drafts: tokens must be in 0 .. " + std::to_string(vocabulary - 1) +
                                  ", got " + std::to_string(tokens[i]));
    }
    if (!(probabilities[i] >= 0.0 &&
          probabilities[i] <= 1.0)) {  // not (p < 0 or p > 1): that would let a NaN through
      throw std::invalid_argument("best_drafts: probabilities must be in 0 .. 1, got " +
                                  std::to_string(probabilities[i]));
    }
  }
}

}  // namespace

// Best first: a node is worth the product of the probabilities on its path, so a child is never worth more
// than its parent, and taking the best candidate again and again gives the best nodes of all. The drafts of a
// depth are best first after every node, so only the best one not yet taken has to be a candidate.
BestDrafts best_drafts(const DepthDrafts& drafts, const std::vector<PathDraft>& paths, int64_t vocabulary,
                       int64_t size, int64_t max_depth, const HeadDrafts* heads) {
  if (size < 1) throw std::invalid_argument("best_drafts: size must be >= 1, got " + std::to_string(size));
  if (max_depth < 0) {
    throw std::invalid_argument("best_drafts: max_depth must be >= 0, got " + std::to_string(max_depth));
  }
  check(drafts.tokens, drafts.probabilities, drafts.depths * drafts.drafts, vocabulary);
  for (size_t i = 0; i < drafts.depths * drafts.drafts; ++i) {
    if (i % std::max<size_t>(drafts.drafts, 1) && drafts.probabilities[i] > drafts.probabilities[i - 1]) {
      throw std::invalid_argument("best_drafts: the drafts of a depth must be best first");
    }
  }
  for (const PathDraft& path : paths) check(path.tokens, path.probabilities, path.length, vocabulary);
  return Search(drafts, paths, static_cast<size_t>(max_depth), heads).run(static_cast<size_t>(size));
}

}  // namespace cerberus::search
