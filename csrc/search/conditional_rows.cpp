#include "conditional_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "head_drafts.h"

namespace cerberus::search {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLeastRest = 1e-4f;  // as in args.h

float to_float(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

// Eight sums at a time: compilers may not reorder one.
float dot(const float* a, const float* b, size_t count) {
  constexpr size_t kSums = 8;
  float sums[kSums] = {};
  size_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (size_t j = 0; j < kSums; ++j) sums[j] += a[i + j] * b[i + j];
  for (; i < count; ++i) sums[0] += a[i] * b[i];
  return std::accumulate(sums, sums + kSums, 0.0f);
}

// Asks for a row of a table, which no cache has: all of them at once are there in the time of a few.
void prefetch(const uint16_t* row, size_t count) {
  constexpr size_t kLine = 32;
  for (size_t i = 0; i < count; i += kLine) __builtin_prefetch(row + i);
}

int64_t place_of(const ConditionalTables& tables, int64_t token) {
  if (token < 0 || static_cast<size_t>(token) >= tables.tokens) return -1;
  const int64_t place = tables.places[token];
  return place >= 0 && static_cast<size_t>(place) < tables.vocab ? place : -1;
}

size_t rank_of(const int64_t* tokens, size_t drafts, int64_t token) {
  return static_cast<size_t>(std::find(tokens, tokens + drafts, token) - tokens);
}

}  // namespace

DraftRow DraftRows::after(size_t depth, int64_t token) {
  if (depth >= drafts_.depths) return {};
  if (heads_ && depth > 0 && depth < heads_->tables->heads) {
    auto found = weighed_.find({depth, token});
    if (found == weighed_.end()) {
      std::vector<float> logprobs(heads_->drafts);
      if (logprobs_after(depth, token, logprobs))
        found = weighed_.emplace(std::make_pair(depth, token), weigh(depth, logprobs)).first;
    }
    if (found != weighed_.end()) {
      const Weighed& row = found->second;
      return {row.tokens.data(), row.probabilities.data(), row.proposers.data(), row.tokens.size()};
    }
  }
  const size_t first = depth * drafts_.drafts;
  return {drafts_.tokens + first, drafts_.probabilities + first, drafts_.proposers + first, drafts_.drafts};
}

const DraftRows::Children& DraftRows::children_of(size_t head) {
  const auto [found, is_new] = children_.try_emplace(head);
  Children& children = found->second;
  if (!is_new) return children;
  const ConditionalTables& tables = *heads_->tables;
  const size_t drafts = heads_->drafts, rank = tables.rank, first = head * drafts;
  std::vector<const uint16_t*> rows(drafts);
  for (size_t c = 0; c < drafts; ++c) {
    const int64_t place = place_of(tables, heads_->tokens[first + c]);
    if (place < 0 || !std::isfinite(heads_->logprobs[first + c])) continue;
    rows[c] = tables.children + static_cast<size_t>(place) * rank;
    prefetch(rows[c], rank);
  }
  const float slope = tables.slopes[head - 1];
  float mass = 0;
  children.rows.resize(drafts * rank);
  children.prior.assign(drafts, kNone);
  for (size_t c = 0; c < drafts; ++c) {
    if (!rows[c]) continue;
    mass += std::exp(heads_->logprobs[first + c]);
    const float prior = slope * heads_->logprobs[first + c];
    if (std::isfinite(prior)) children.prior[c] = prior;
    for (size_t i = 0; i < rank; ++i) children.rows[c * rank + i] = to_float(rows[c][i]);
  }
  const float rest = slope * std::log(std::max(1 - mass, kLeastRest)) + tables.rest[head - 1];
  children.rest = std::isfinite(rest) ? rest : kNone;
  return children;
}

// What `ops.rerank` gives for one parent: of head `head`, counted from 0, after the token in row `parent` of
// its table.
void DraftRows::rerank(size_t head, int64_t parent, std::vector<float>& logprobs) {
  const ConditionalTables& tables = *heads_->tables;
  const size_t rank = tables.rank;
  const uint16_t* from = tables.parents + ((head - 1) * tables.vocab + static_cast<size_t>(parent)) * rank;
  prefetch(from, rank);
  const Children& children = children_of(head);
  std::vector<float> row(rank);
  for (size_t i = 0; i < rank; ++i) row[i] = to_float(from[i]);
  float top = children.rest;
  for (size_t c = 0; c < logprobs.size(); ++c) {
    const float score = children.prior[c] + dot(row.data(), children.rows.data() + c * rank, rank);
    logprobs[c] = std::isfinite(score) ? score : kNone;
    top = std::max(top, logprobs[c]);
  }
  if (top == kNone) return;
  float sum = std::exp(children.rest - top);
  for (const float score : logprobs) sum += std::exp(score - top);
  const float whole = top + std::log(sum);
  for (float& score : logprobs) score -= whole;
}

// The log-probabilities of head depth + 1's drafts after `token`, which stands at this depth; false: they
// stay as they are, since the draft vocabulary has no such token.
bool DraftRows::logprobs_after(size_t depth, int64_t token, std::vector<float>& logprobs) {
  const size_t drafts = heads_->drafts;
  const int64_t parent = place_of(*heads_->tables, token);
  if (parent < 0) return false;
  const size_t rank = heads_->after ? rank_of(heads_->tokens + (depth - 1) * drafts, drafts, token) : drafts;
  if (rank < drafts) {
    std::copy_n(heads_->after + ((depth - 1) * drafts + rank) * drafts, drafts, logprobs.begin());
  } else {
    rerank(depth, parent, logprobs);
  }
  return true;
}

DraftRows::Weighed DraftRows::weigh(size_t depth, const std::vector<float>& logprobs) const {
  const size_t first = depth * drafts_.drafts;
  const int64_t* tokens = drafts_.tokens + first;
  const int64_t* proposers = drafts_.proposers + first;
  struct Entry {
    size_t draft;
    float logprob;
    double probability;
  };
  std::vector<Entry> own, others;
  for (size_t i = 0; i < drafts_.drafts; ++i) {
    const double probability = drafts_.probabilities[first + i];
    if (proposers[i] != heads_->proposer) {
      others.push_back({i, 0, probability});
    } else if (probability > 0) {  // else it is no draft
      const size_t rank = rank_of(heads_->tokens + depth * heads_->drafts, heads_->drafts, tokens[i]);
      if (rank < heads_->drafts)
        own.push_back({i, std::isfinite(logprobs[rank]) ? logprobs[rank] : kNone, 0});
    }
  }
  std::stable_sort(own.begin(), own.end(),
                   [](const Entry& a, const Entry& b) { return a.logprob > b.logprob; });
  // A correction that turns the order round says that a head knows nothing: then all its drafts are alike.
  double least = 1;
  for (Entry& entry : own)
    least = entry.probability =
        std::min(least, probability_of(entry.logprob, heads_->platt ? heads_->platt + 2 * depth : nullptr));
  if (!others.empty()) {
    own.insert(own.end(), others.begin(), others.end());
    std::stable_sort(own.begin(), own.end(),
                     [](const Entry& a, const Entry& b) { return a.probability > b.probability; });
  }
  Weighed row;
  for (const Entry& entry : own) {
    row.tokens.push_back(tokens[entry.draft]);
    row.probabilities.push_back(entry.probability);
    row.proposers.push_back(proposers[entry.draft]);
  }
  return row;
}

}  // namespace cerberus::search
