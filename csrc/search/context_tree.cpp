#include "context_tree.h"

#include <algorithm>

namespace cerberus::search {
namespace {

// Room for `size` elements. Grows by a half, because there are thousands of trees and memory counts.
template <typename T>
void make_room(std::vector<T>& vector, size_t size) {
  if (size > vector.capacity()) vector.reserve(std::max(size, vector.capacity() + vector.capacity() / 2));
}

template <typename T>
size_t bytes_of(const std::vector<T>& vector) {
  return vector.capacity() * sizeof(T);
}

uint64_t hash_of_token(uint32_t node, Token token) { return hash_of(node, static_cast<uint32_t>(token)); }

}  // namespace

ContextTree::ContextTree(size_t max_match, Context before)
    : max_match_(max_match),
      before_(before.size),
      context_size_(before.size),
      text_(before.end - before.size, before.end),
      nodes_{{0, 0, kNone, -1, 0, kNone}} {}

// `path` gets the nodes whose longest context is among the last tokens of `context`, from the root, which it
// leaves out, downwards.
ContextTree::MatchEnd ContextTree::walk(Context context, std::vector<uint32_t>* path) const {
  const size_t longest = std::min(context.size, max_match_);
  MatchEnd match{kRoot, 0};
  while (match.depth < longest) {
    const uint32_t parent = match.node;
    const Token token = context[match.depth];
    const uint32_t child = children_.find(hash_of_token(parent, token), [&](uint32_t id) {
      return nodes_[id].parent == parent && first_token(id) == token;
    });
    if (child == kNone) break;
    const Context known{text_.data() + nodes_[child].end, nodes_[child].depth};
    const size_t stop = std::min(known.size, longest);
    match.node = child;
    do {
      ++match.depth;
    } while (match.depth < stop && known[match.depth] == context[match.depth]);
    if (match.depth < known.size) break;  // inside the edge
    if (path != nullptr) path->push_back(child);
  }
  return match;
}

Match ContextTree::match_at(MatchEnd end) const { return {end.depth, nodes_[end.node].next}; }

Match ContextTree::match(Context context) const { return match_at(walk(context, nullptr)); }

Match ContextTree::append(Token token) {
  const Context context = this->context();
  path_.clear();
  const MatchEnd end = walk(context, &path_);
  const Match match = match_at(end);
  const bool inside = end.depth < nodes_[end.node].depth;  // of an edge
  reserve(inside ? end.node : kNone);                      // from here on nothing can fail

  uint32_t last = path_.empty() ? kRoot : path_.back();
  if (inside) {
    last = split(end.node, end.depth);
    path_.push_back(last);
  }
  for (const uint32_t node : path_) count(node, token);
  if (end.depth < context.size) {
    add_node(
        {static_cast<uint32_t>(text_.size()), static_cast<uint32_t>(context.size), last, token, 1, kNone});
  }
  text_.push_back(token);
  context_size_ = std::min(context_size_ + 1, max_match_);
  return match;
}

// Room for all that one `append` may add. `to_split`: the node whose contexts it tells apart, or kNone.
void ContextTree::reserve(uint32_t to_split) {
  size_t counts = 2 * (path_.size() + 1);  // a node's second token brings the first one's count along
  if (to_split != kNone) {
    for (uint32_t id = nodes_[to_split].counts; id != kNone; id = counts_[id].more) ++counts;
  }
  make_room(path_, path_.size() + 1);
  make_room(text_, text_.size() + 1);
  make_room(nodes_, nodes_.size() + 2);
  children_.reserve(nodes_.size() + 2,
                    [this](uint32_t id) { return hash_of_token(nodes_[id].parent, first_token(id)); });
  make_room(counts_, counts_.size() + counts);
  counts_table_.reserve(counts_.size() + counts,
                        [this](uint32_t id) { return hash_of_token(counts_[id].node, counts_[id].token); });
}

// The first token, read backwards, that a node's contexts have beyond its parent's.
Token ContextTree::first_token(uint32_t node) const {
  return text_[nodes_[node].end - 1 - nodes_[nodes_[node].parent].depth];
}

uint32_t& ContextTree::child_slot(uint32_t parent, Token token) {
  return children_.slot(hash_of_token(parent, token),
                        [&](uint32_t id) { return nodes_[id].parent == parent && first_token(id) == token; });
}

uint32_t ContextTree::add_node(const Node& node) {
  const auto id = static_cast<uint32_t>(nodes_.size());
  nodes_.push_back(node);
  child_slot(node.parent, first_token(id)) = id;
  return id;
}

// Puts a node for the contexts of `below` of up to `depth` tokens between it and its parent. They have
// occurred at the same places so far, so the same tokens have followed them.
uint32_t ContextTree::split(uint32_t below, size_t depth) {
  const auto id = static_cast<uint32_t>(nodes_.size());
  child_slot(nodes_[below].parent, first_token(below)) = id;
  nodes_.push_back(nodes_[below]);
  nodes_[id].depth = static_cast<uint32_t>(depth);
  nodes_[id].counts = kNone;
  for (uint32_t i = nodes_[below].counts; i != kNone; i = counts_[i].more) {
    add_count(id, counts_[i].token, counts_[i].count);
  }
  nodes_[below].parent = id;
  child_slot(id, first_token(below)) = below;
  return id;
}

uint32_t& ContextTree::count_slot(uint32_t node, Token token) {
  return counts_table_.slot(hash_of_token(node, token), [&](uint32_t id) {
    return counts_[id].node == node && counts_[id].token == token;
  });
}

uint32_t ContextTree::add_count(uint32_t node, Token token, uint32_t count) {
  const auto id = static_cast<uint32_t>(counts_.size());
  count_slot(node, token) = id;
  counts_.push_back({node, token, count, nodes_[node].counts});
  nodes_[node].counts = id;
  return id;
}

// `token` has followed the contexts of `id` once more.
void ContextTree::count(uint32_t id, Token token) {
  Node& node = nodes_[id];
  if (node.counts == kNone) {
    if (node.next == token) {
      ++node.count;
      return;
    }
    add_count(id, node.next, node.count);
  }
  uint32_t known = count_slot(id, token);
  if (known == kNone) known = add_count(id, token, 0);
  const uint32_t times = ++counts_[known].count;
  if (times >= node.count) {  // of equally frequent ones the latest
    node.next = token;
    node.count = times;
  }
}

size_t ContextTree::bytes() const {
  return bytes_of(text_) + bytes_of(nodes_) + bytes_of(counts_) + bytes_of(path_) + children_.bytes() +
         counts_table_.bytes();
}

}  // namespace cerberus::search
