#include "suffix_index.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace cerberus::search {
namespace {

int64_t checked(const std::string& what, int64_t value, int64_t min, int64_t max) {
  if (value < min || value > max) {
    throw std::invalid_argument(what + " must be in " + std::to_string(min) + " .. " + std::to_string(max) +
                                ", got " + std::to_string(value));
  }
  return value;
}

void check_tokens(const std::string& what, const int64_t* tokens, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] > SuffixIndex::kMaxToken) {  // only then is the name put together
      checked(what + "[" + std::to_string(i) + "]", tokens[i], 0, SuffixIndex::kMaxToken);
    }
  }
}

Match longer(Match young, Match old) { return old.length > young.length ? old : young; }

}  // namespace

SuffixIndex::SuffixIndex(int64_t max_match, int64_t max_tokens)
    : max_match_(checked("SuffixIndex: max_match", max_match, 1, kMaxMatch)),
      max_tokens_(checked("SuffixIndex: max_tokens", max_tokens, 2, kMaxTokens)),
      young_(static_cast<size_t>(max_match), {nullptr, 0}),
      record_(static_cast<size_t>(2 * (max_match + 1)), 0) {}

void SuffixIndex::extend(const int64_t* tokens, size_t count) {
  check_tokens("SuffixIndex.extend: tokens", tokens, count);
  for (size_t i = 0; i < count; ++i) append(static_cast<Token>(tokens[i]));
}

void SuffixIndex::append(Token token) {
  if (young_.size() == static_cast<size_t>(max_tokens_ / 2)) {
    ContextTree next(static_cast<size_t>(max_match_), young_.context());
    old_ = std::move(young_);
    young_ = std::move(next);
  }
  const Match past = old_ ? old_->match(young_.context()) : Match{};
  const Match match = longer(young_.append(token), past);
  ++record_[2 * match.length];
  if (match.next == token) ++record_[2 * match.length + 1];
}

Continuation SuffixIndex::propose(int64_t length) const {
  const Context context = young_.context();
  return draft_from({context.end - context.size, context.end},
                    checked("SuffixIndex.propose: length", length, 0, kMaxDrafts));
}

Continuation SuffixIndex::propose_after(const int64_t* tail, size_t count, int64_t length) const {
  check_tokens("SuffixIndex.propose_after: tail", tail, count);
  const size_t used = std::min(count, static_cast<size_t>(max_match_));
  return draft_from({tail + (count - used), tail + count},
                    checked("SuffixIndex.propose_after: length", length, 0, kMaxDrafts));
}

Continuation SuffixIndex::draft_from(std::vector<Token> text, int64_t length) const {
  Continuation drafts;
  while (static_cast<int64_t>(drafts.tokens.size()) < length) {
    const Context context{text.data() + text.size(), text.size()};
    const Match match = longer(young_.match(context), old_ ? old_->match(context) : Match{});
    if (match.length == 0) break;
    drafts.tokens.push_back(match.next);
    drafts.matches.push_back(static_cast<int64_t>(match.length));
    text.push_back(match.next);
  }
  return drafts;
}

size_t SuffixIndex::bytes() const {
  return sizeof(*this) + young_.bytes() + (old_ ? old_->bytes() : 0) + record_.capacity() * sizeof(int64_t);
}

}  // namespace cerberus::search
