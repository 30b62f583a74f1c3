// How does a text go on, judging by its own past? Plain C++: bind_suffix_index.cpp binds it to Python.
//
// The match of a text is the longest run of its last tokens, of at most max_match, that stands before a token
// of what is indexed; the draft is the token that has followed it most often, of several the one that did so
// last.
//
// Memory is bounded by forgetting: tokens go to a young tree until it holds max_tokens / 2; then it becomes
// the old one, in place of the one before, and a new one begins. Of the matches in both the longer one
// counts, the young one's where they are equally long.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "context_tree.h"

namespace cerberus::search {

// tokens[i] is the draft after the text and tokens[.. i), made from a match of matches[i] tokens.
struct Continuation {
  std::vector<int64_t> tokens;
  std::vector<int64_t> matches;
};

// Everything throws std::invalid_argument, which names the argument, and then has changed nothing.
class SuffixIndex {
 public:
  static constexpr int64_t kMaxMatch = 1024;               // the work per token grows with it
  static constexpr int64_t kMaxTokens = int64_t{1} << 30;  // nodes and counts are numbered with 32 bits
  static constexpr int64_t kMaxToken = INT32_MAX;
  static constexpr int64_t kMaxDrafts = int64_t{1} << 20;

  // max_match: 1 .. kMaxMatch; max_tokens: 2 .. kMaxTokens.
  SuffixIndex(int64_t max_match, int64_t max_tokens);

  // Appends tokens, each 0 .. kMaxToken. Only if memory runs out, some of them may have been appended.
  void extend(const int64_t* tokens, size_t count);

  // The tokens to come belong to another text: no match reaches from one into the other.
  void end_document() { young_.end_document(); }

  // At most `length` drafts, 0 .. kMaxDrafts, of what follows the text; fewer where nothing matches.
  Continuation propose(int64_t length) const;

  // The same after any tokens, of which the last max_match count.
  Continuation propose_after(const int64_t* tail, size_t count, int64_t length) const;

  // (max_match + 1, 2) row-major: how often there was a match of m tokens before a token was appended, and
  // how often that token was the draft.
  const std::vector<int64_t>& record() const { return record_; }

  size_t size() const { return young_.size() + (old_ ? old_->size() : 0); }  // tokens not forgotten
  int64_t max_match() const { return max_match_; }
  int64_t max_tokens() const { return max_tokens_; }
  size_t bytes() const;

 private:
  void append(Token token);
  Continuation draft_from(std::vector<Token> text, int64_t length) const;

  int64_t max_match_;
  int64_t max_tokens_;
  ContextTree young_;
  std::optional<ContextTree> old_;
  std::vector<int64_t> record_;
};

}  // namespace cerberus::search
