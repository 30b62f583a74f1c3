#include "tree.h"

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <string>

namespace cerberus::search {
namespace {

// A node that could join the tree next: one whose parent, and whose better siblings, are in it already.
struct Candidate {
  double value;   // probability that every draft on its path is right
  int64_t order;  // when it became a candidate; breaks ties, so that equal inputs give equal trees
  int64_t parent;
  size_t depth;    // of the node itself, so it is a draft of head `depth`
  size_t sibling;  // how many of its siblings are better
};

// std::priority_queue keeps the greatest on top: greater value, else the earlier candidate.
bool operator<(const Candidate& a, const Candidate& b) {
  return a.value != b.value ? a.value < b.value : a.order > b.order;
}

// The drafts of one head, most accurate first, ties to the lower rank.
std::vector<size_t> by_accuracy(const double* accuracy, size_t drafts) {
  std::vector<size_t> ranks(drafts);
  std::iota(ranks.begin(), ranks.end(), size_t{0});
  std::stable_sort(ranks.begin(), ranks.end(), [&](size_t a, size_t b) { return accuracy[a] > accuracy[b]; });
  return ranks;
}

void check_accuracy(const double* accuracy, size_t heads, size_t drafts) {
  for (size_t i = 0; i < heads * drafts; ++i) {
    if (!(accuracy[i] >= 0.0 && accuracy[i] <= 1.0)) {  // not (a < 0 or a > 1): that would let a NaN through
      throw std::invalid_argument("best_tree: accuracy[" + std::to_string(i / drafts) + "][" +
                                  std::to_string(i % drafts) + "] must be in 0 .. 1, got " +
                                  std::to_string(accuracy[i]));
    }
  }
}

}  // namespace

// Best first: a node is worth the product of the accuracies on its path, so a child is never worth more than
// its parent, and taking the most valuable candidate again and again gives the `size` most valuable nodes of
// all. What they are worth together is the expected number of accepted drafts, because exactly the nodes of
// one path are accepted.
Tree best_tree(const double* accuracy, size_t heads, size_t drafts, int64_t size) {
  if (size < 1) throw std::invalid_argument("best_tree: size must be >= 1, got " + std::to_string(size));
  check_accuracy(accuracy, heads, drafts);

  std::vector<std::vector<size_t>> ranks;
  for (size_t head = 0; head < heads; ++head) ranks.push_back(by_accuracy(accuracy + head * drafts, drafts));

  Tree tree{{-1}, {0}};
  std::vector<double> values{1.0};
  std::priority_queue<Candidate> candidates;
  int64_t order = 0;
  const auto offer = [&](int64_t parent, size_t depth, size_t sibling) {
    if (depth > heads || sibling >= drafts) return;
    const double probability = accuracy[(depth - 1) * drafts + ranks[depth - 1][sibling]];
    candidates.push({values[parent] * probability, order++, parent, depth, sibling});
  };

  offer(0, 1, 0);
  while (static_cast<int64_t>(tree.parents.size()) < size && !candidates.empty()) {
    const Candidate best = candidates.top();
    candidates.pop();
    const auto node = static_cast<int64_t>(tree.parents.size());
    tree.parents.push_back(best.parent);
    tree.ranks.push_back(static_cast<int64_t>(ranks[best.depth - 1][best.sibling]));
    values.push_back(best.value);
    offer(node, best.depth + 1, 0);
    offer(best.parent, best.depth, best.sibling + 1);
  }
  return tree;
}

std::vector<int64_t> depths(const int64_t* parents, size_t nodes, const char* caller) {
  const std::string prefix = std::string(caller) + ": ";
  if (nodes == 0) throw std::invalid_argument(prefix + "parents must name at least the root, got 0 nodes");
  if (parents[0] != -1) {
    throw std::invalid_argument(prefix + "parents[0] must be -1, got " + std::to_string(parents[0]));
  }
  std::vector<int64_t> result(nodes, 0);
  for (size_t i = 1; i < nodes; ++i) {
    if (parents[i] < 0 || parents[i] >= static_cast<int64_t>(i)) {
      throw std::invalid_argument(prefix + "parents[" + std::to_string(i) + "] must be in 0 .. " +
                                  std::to_string(i - 1) + ", got " + std::to_string(parents[i]));
    }
    result[i] = result[parents[i]] + 1;
  }
  return result;
}

std::vector<int64_t> ancestors(const int64_t* parents, size_t nodes) {
  depths(parents, nodes, "ancestors");  // for its checks
  const size_t words = ancestor_words(nodes);
  std::vector<int64_t> masks(nodes * words, 0);
  for (size_t i = 0; i < nodes; ++i) {
    int64_t* row = &masks[i * words];
    if (i > 0) std::copy_n(&masks[parents[i] * words], words, row);
    row[i / 64] = static_cast<int64_t>(static_cast<uint64_t>(row[i / 64]) | uint64_t{1} << (i % 64));
  }
  return masks;
}

std::vector<int64_t> pack_tree(const int64_t* parents, const int64_t* tokens, const int64_t* ranks,
                               size_t nodes, size_t size, size_t batch, int64_t drafts) {
  if (nodes > size || (nodes < 2 && size > 1))
    throw std::invalid_argument(
        "pack_tree: size must be that of the tree, or more where it has a draft, got " +
        std::to_string(size));
  std::vector<int64_t> padded(size, 0), given(size, 0), sources(size, 0);
  std::copy_n(parents, nodes, padded.begin());
  std::copy_n(tokens, nodes, given.begin());
  const std::vector<int64_t> depth = depths(padded.data(), size, "pack_tree");
  for (size_t i = 1; i < size; ++i) {
    const size_t node = i < nodes ? i : 1;  // node 1 stands there, too
    const bool is_ranked = ranks && ranks[node] >= 0;
    sources[i] = is_ranked ? 1 + static_cast<int64_t>(size) + (depth[i] - 1) * drafts + ranks[node]
                           : 1 + static_cast<int64_t>(node);
  }
  const std::vector<int64_t> masks = ancestors(padded.data(), size);
  std::vector<int64_t> packed;
  packed.reserve(3 * size + masks.size() + batch * size);
  for (const auto* part :
       std::initializer_list<const std::vector<int64_t>*>{&padded, &depth, &sources, &masks})
    packed.insert(packed.end(), part->begin(), part->end());
  for (size_t row = 0; row < batch; ++row) packed.insert(packed.end(), given.begin(), given.end());
  return packed;
}

}  // namespace cerberus::search
