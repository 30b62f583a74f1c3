// What followed the contexts of a text, and how often. Plain C++.
//
// A context is up to `max_match` tokens that stand before a token of the text. They are kept in a compressed
// tree that is read backwards: an edge from the root is the last token of a context, the next one the token
// before it. Contexts that have occurred at the same places share a node, so a token of the text adds at most
// two nodes: one where its context parts from all earlier ones, if that is in the middle of an edge, and a
// leaf. That leaf stands for all longer contexts, which are unique so far, and is cut at `max_match` tokens:
// a text of one repeated token has max_match nodes, however long it is.
//
// A suffix automaton has the same nodes (they are its suffix links), but has to keep contexts of every
// length, and a table of hashed n-grams needs max_match entries per token wherever a text repeats itself.
// Here the work per token is at most max_match comparisons and two look-ups per node on the path, of which
// ordinary text has few. Keys are compared, not only their hashes: answers are exact.
//
// bench/test_suffix_bench.py, 100 000 tokens: 66 bytes per word of English, 6 per repeated token, at most 111
// (four tokens at random). On a busy Epyc core 0.5 to 1.2 microseconds to append a word, 0.3 to 0.5 a
// repeated token, 1.1 to 2 one of four at random.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "id_table.h"

namespace cerberus::search {

using Token = int32_t;  // >= 0

// The `size` tokens before `end`, counted backwards: [0] is the last one.
struct Context {
  const Token* end;
  size_t size;

  Token operator[](size_t back) const { return *(end - 1 - back); }
};

struct Match {
  size_t length = 0;  // tokens, 0: none
  Token next = -1;    // the token that followed most often, of several the one that did so last; -1: no match
};

class ContextTree {
 public:
  // `before`: tokens that are context of the first one, but whose own contexts are not kept.
  ContextTree(size_t max_match, Context before);

  // Adds `token` to the text and to what has followed its contexts. Returns the match of the text before it.
  // If memory runs out, std::bad_alloc leaves everything as it was.
  Match append(Token token);

  // The tokens to come have no context before them.
  void end_document() { context_size_ = 0; }

  // The longest of the last tokens of `context` that stand before a token of the text.
  Match match(Context context) const;

  // The context of the next token.
  Context context() const { return {text_.data() + text_.size(), context_size_}; }

  size_t size() const { return text_.size() - before_; }  // tokens appended
  size_t bytes() const;

 private:
  // All contexts that end with the same tokens at the same places, from one token longer than the parent's
  // to `depth` tokens.
  struct Node {
    uint32_t end;  // one of these places: the contexts are text_[.. end)
    uint32_t depth;
    uint32_t parent;
    Token next;       // Match::next
    uint32_t count;   // how often `next` has followed
    uint32_t counts;  // the first of its Counts, kNone as long as nothing but `next` has followed
  };

  struct Count {
    uint32_t node;
    Token token;
    uint32_t count;  // how often `token` has followed `node`
    uint32_t more;   // the next one of the same node, or kNone
  };

  // Where the longest match of a context ends: `depth` tokens deep, at `node` or inside the edge that leads
  // to it.
  struct MatchEnd {
    uint32_t node;
    size_t depth;
  };

  static constexpr uint32_t kRoot = 0;

  MatchEnd walk(Context context, std::vector<uint32_t>* path) const;
  Match match_at(MatchEnd end) const;

  Token first_token(uint32_t node) const;  // of the edge from its parent
  uint32_t& child_slot(uint32_t parent, Token token);
  uint32_t& count_slot(uint32_t node, Token token);
  void reserve(uint32_t to_split);
  uint32_t add_node(const Node& node);
  uint32_t split(uint32_t below, size_t depth);
  uint32_t add_count(uint32_t node, Token token, uint32_t count);
  void count(uint32_t id, Token token);

  size_t max_match_;
  size_t before_;
  size_t context_size_;  // of the last tokens of text_: those of the document, at most max_match
  std::vector<Token> text_;
  std::vector<Node> nodes_;
  std::vector<Count> counts_;
  IdTable children_;            // nodes, by parent and first token
  IdTable counts_table_;        // counts, by node and token
  std::vector<uint32_t> path_;  // of `append`: the nodes whose contexts the new token follows
};

}  // namespace cerberus::search
