// The best draft tree of one step: which of the guesses of several sources the base model is to check.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cerberus::host {

// Guesses for each of the next places, whatever stands before them: the heads', and others of this kind.
// Row-major (places, guesses), best first; sources: who makes each of them.
struct PlaceGuesses {
  const int64_t* tokens = nullptr;
  const double* chances = nullptr;
  const int64_t* sources = nullptr;
  size_t places = 0;
  size_t guesses = 0;
};

// One guess of how the text goes on. chances[i]: that tokens[i] is right where those before it are.
struct PathGuess {
  const int64_t* tokens = nullptr;
  const double* chances = nullptr;
  size_t length = 0;
  int64_t source = 0;
};

// Node 0 is the root; a node's parent stands before it, and the first n nodes are the best n.
struct Drafts {
  std::vector<int64_t> parents;
  std::vector<int64_t> tokens;   // 0 for the root
  std::vector<int64_t> sources;  // who guessed it; 0 for the root
  std::vector<double> chances;   // that the node is accepted, its whole path being right; 1 for the root
};

// The `size` nodes, root included and none deeper than `deepest`, that are most likely to be accepted; fewer
// where there are no more guesses; one of chance 0 is none.
//
// A token that both kinds of guesses offer after a node is one node, as likely as the likelier of the two
// says. After a node of a path, the other guesses share what chance the path leaves them. Throws
// std::invalid_argument where size < 1 or deepest < 0, where a token is not in 0 .. vocabulary - 1, or a
// chance not in 0 .. 1.
Drafts best_drafts(const PlaceGuesses& places, const std::vector<PathGuess>& paths, int64_t vocabulary,
                   int64_t size, int64_t deepest);

}  // namespace cerberus::host
