#include "draft_search.h"

#include <algorithm>
#include <queue>
#include <stdexcept>
#include <string>

namespace cerberus::host {
namespace {

constexpr size_t kNone = static_cast<size_t>(-1);

// The paths as a trie: paths with a common beginning share its nodes. Node 0 is the root.
class Trie {
 public:
  struct Node {
    int64_t token;
    int64_t source;
    double chance;
    std::vector<size_t> children;
  };

  explicit Trie(const std::vector<PathGuess>& paths) {
    for (const PathGuess& path : paths) {
      size_t node = 0;
      for (size_t i = 0; i < path.length; ++i)
        node = child(node, path.tokens[i], path.chances[i], path.source);
    }
  }

  const Node& operator[](size_t node) const { return nodes_[node]; }

 private:
  // The child of `node` with this token; of two that guess it, the likelier one counts, of equals the
  // earlier.
  size_t child(size_t node, int64_t token, double chance, int64_t source) {
    for (const size_t other : nodes_[node].children) {
      Node& known = nodes_[other];
      if (known.token != token) continue;
      if (chance > known.chance) known.chance = chance, known.source = source;
      return other;
    }
    nodes_.push_back({token, source, chance, {}});
    nodes_[node].children.push_back(nodes_.size() - 1);
    return nodes_.size() - 1;
  }

  std::vector<Node> nodes_{{0, 0, 1.0, {}}};
};

// A node of the tree, and what is needed to find its children.
struct Place {
  size_t depth;
  size_t trie;    // its node in the trie, or kNone
  double others;  // what the chances of place guesses after it are multiplied with
};

struct Candidate {
  double chance;
  int64_t order;  // when it became a candidate; breaks ties, so that equal inputs give equal trees
  size_t parent;
  int64_t token;
  int64_t source;
  size_t trie;
  size_t rank;  // among the place guesses after its parent; kNone: it comes from the trie
};

bool operator<(const Candidate& a, const Candidate& b) {
  return a.chance != b.chance ? a.chance < b.chance : a.order > b.order;
}

class Search {
 public:
  Search(const PlaceGuesses& places, const std::vector<PathGuess>& paths, size_t deepest)
      : guesses_(places), trie_(paths), deepest_(deepest) {}

  Drafts run(size_t size) {
    add({1.0, 0, kNone, 0, 0, 0, kNone}, -1);
    while (drafts_.parents.size() < size && !candidates_.empty()) {
      const Candidate best = candidates_.top();
      candidates_.pop();
      if (best.rank != kNone) offer_guess(best.parent, best.rank + 1);
      add(best, static_cast<int64_t>(best.parent));
    }
    return std::move(drafts_);
  }

 private:
  void add(const Candidate& node, int64_t parent) {
    drafts_.parents.push_back(parent);
    drafts_.tokens.push_back(node.token);
    drafts_.sources.push_back(node.source);
    drafts_.chances.push_back(node.chance);
    places_.push_back({parent < 0 ? 0 : places_[parent].depth + 1, node.trie, 1.0});
    if (places_.back().depth < deepest_) offer_children(places_.size() - 1);
  }

  void offer_children(size_t node) {
    if (places_[node].trie != kNone) {
      double by_path = 0, by_place = 0;  // what the two kinds give the tokens of the paths
      for (const size_t child : trie_[places_[node].trie].children) {
        const Trie::Node& path = trie_[child];
        const size_t rank = rank_of(places_[node].depth, path.token);
        const double guessed = rank == kNone ? 0.0 : chance(places_[node].depth, rank);
        const bool path_likelier = path.chance >= guessed;
        offer(node, path_likelier ? path.chance : guessed, path.token,
              path_likelier ? path.source : source(places_[node].depth, rank), child, kNone);
        by_path += std::max(path.chance, guessed);
        by_place += guessed;
      }
      if (by_path > 0) places_[node].others = by_path < 1 ? (1 - by_path) / (1 - by_place) : 0.0;
    }
    offer_guess(node, 0);
  }

  // Offers the place guess of this rank after `node`, or the next that is no child from the trie and no
  // repetition.
  void offer_guess(size_t node, size_t rank) {
    const auto [depth, trie, others] = places_[node];
    if (depth >= guesses_.places) return;
    for (; rank < guesses_.guesses; ++rank) {
      const int64_t token = guesses_.tokens[depth * guesses_.guesses + rank];
      if (rank_of(depth, token) != rank || follows(trie, token)) continue;
      offer(node, chance(depth, rank) * others, token, source(depth, rank), kNone, rank);
      return;
    }
  }

  void offer(size_t parent, double chance, int64_t token, int64_t source, size_t trie, size_t rank) {
    const double accepted = drafts_.chances[parent] * chance;
    if (accepted > 0) candidates_.push({accepted, order_++, parent, token, source, trie, rank});
  }

  bool follows(size_t trie, int64_t token) const {
    if (trie == kNone) return false;
    const std::vector<size_t>& children = trie_[trie].children;
    return std::any_of(children.begin(), children.end(), [&](size_t c) { return trie_[c].token == token; });
  }

  // The first rank at which the token is guessed for the place after `depth` guesses, or kNone.
  size_t rank_of(size_t depth, int64_t token) const {
    if (depth >= guesses_.places) return kNone;
    const int64_t* row = guesses_.tokens + depth * guesses_.guesses;
    const int64_t* found = std::find(row, row + guesses_.guesses, token);
    return found == row + guesses_.guesses ? kNone : static_cast<size_t>(found - row);
  }

  double chance(size_t depth, size_t rank) const { return guesses_.chances[depth * guesses_.guesses + rank]; }

  int64_t source(size_t depth, size_t rank) const {
    return guesses_.sources[depth * guesses_.guesses + rank];
  }

  const PlaceGuesses& guesses_;
  const Trie trie_;
  const size_t deepest_;
  Drafts drafts_;
  std::vector<Place> places_;
  std::priority_queue<Candidate> candidates_;
  int64_t order_ = 0;
};

void check(const int64_t* tokens, const double* chances, size_t count, int64_t vocabulary) {
  for (size_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocabulary) {
      throw std::invalid_argument("best_drafts: tokens must be in 0 .. " + std::to_string(vocabulary - 1) +
                                  ", got " + std::to_string(tokens[i]));
    }
    if (!(chances[i] >= 0.0 && chances[i] <= 1.0)) {  // not (c < 0 or c > 1): that would let a NaN through
      throw std::invalid_argument("best_drafts: chances must be in 0 .. 1, got " +
                                  std::to_string(chances[i]));
    }
  }
}

}  // namespace

// Best first: a node is worth the product of the chances on its path, so a child is never worth more than its
// parent, and taking the best candidate again and again gives the best nodes of all. Place guesses are best
// first after every node, so only the best one not yet taken has to be a candidate.
Drafts best_drafts(const PlaceGuesses& places, const std::vector<PathGuess>& paths, int64_t vocabulary,
                   int64_t size, int64_t deepest) {
  if (size < 1) throw std::invalid_argument("best_drafts: size must be >= 1, got " + std::to_string(size));
  if (deepest < 0) {
    throw std::invalid_argument("best_drafts: deepest must be >= 0, got " + std::to_string(deepest));
  }
  check(places.tokens, places.chances, places.places * places.guesses, vocabulary);
  for (size_t i = 0; i < places.places * places.guesses; ++i) {
    if (i % std::max<size_t>(places.guesses, 1) && places.chances[i] > places.chances[i - 1]) {
      throw std::invalid_argument("best_drafts: the guesses of a place must be best first");
    }
  }
  for (const PathGuess& path : paths) check(path.tokens, path.chances, path.length, vocabulary);
  return Search(places, paths, static_cast<size_t>(deepest)).run(static_cast<size_t>(size));
}

}  // namespace cerberus::host
