#include "conditional_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

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
float dot(const uint16_t* a, const uint16_t* b, size_t count) {
  constexpr size_t kSums = 8;
  float sums[kSums] = {};
  size_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (size_t j = 0; j < kSums; ++j) sums[j] += to_float(a[i + j]) * to_float(b[i + j]);
  for (; i < count; ++i) sums[0] += to_float(a[i]) * to_float(b[i]);
  return std::accumulate(sums, sums + kSums, 0.0f);
}

// `reading` of drafting/platt.py.
double probability_of(float logprob, const double* line) {
  double probability = 0;
  const double log = std::min(static_cast<double>(logprob), 0.0);
  if (!line) {
    probability = std::exp(log);
  } else {
    const double finite = std::min(std::max(log, -60.0), -1e-9);
    const double logit = finite - std::log(-std::expm1(finite));
    probability = 1 / (1 + std::exp(-(line[0] * logit + line[1])));
  }
  return std::isfinite(logprob) && std::isfinite(probability) ? probability : 0.0;
}

int64_t place_of(const ConditionalTables& tables, int64_t token) {
  if (token < 0 || static_cast<size_t>(token) >= tables.tokens) return -1;
  const int64_t place = tables.places[token];
  return place >= 0 && static_cast<size_t>(place) < tables.vocab ? place : -1;
}

size_t rank_of(const int64_t* tokens, size_t drafts, int64_t token) {
  return static_cast<size_t>(std::find(tokens, tokens + drafts, token) - tokens);
}

// What `ops.rerank` gives for one parent: of head `head`, counted from 0, after the token in row `parent` of
// its table.
void rerank(const HeadDrafts& heads, size_t head, int64_t parent, std::vector<float>& logprobs) {
  const ConditionalTables& tables = *heads.tables;
  const uint16_t* row =
      tables.parents + ((head - 1) * tables.vocab + static_cast<size_t>(parent)) * tables.rank;
  const float slope = tables.slopes[head - 1];
  float mass = 0, top = kNone;
  for (size_t c = 0; c < heads.drafts; ++c) {
    const float prior = heads.logprobs[head * heads.drafts + c];
    const int64_t place = place_of(tables, heads.tokens[head * heads.drafts + c]);
    logprobs[c] = kNone;
    if (place < 0 || !std::isfinite(prior)) continue;
    mass += std::exp(prior);
    const float score =
        slope * prior + dot(row, tables.children + static_cast<size_t>(place) * tables.rank, tables.rank);
    if (std::isfinite(score)) logprobs[c] = score;
    top = std::max(top, logprobs[c]);
  }
  float rest = slope * std::log(std::max(1 - mass, kLeastRest)) + tables.rest[head - 1];
  if (!std::isfinite(rest)) rest = kNone;
  top = std::max(top, rest);
  if (top == kNone) return;
  float sum = std::exp(rest - top);
  for (const float score : logprobs) sum += std::exp(score - top);
  for (float& score : logprobs) score -= top + std::log(sum);
}

}  // namespace

DraftRow DraftRows::after(size_t depth, int64_t token) {
  if (depth >= drafts_.depths) return {};
  if (heads_ && depth > 0 && depth < heads_->tables->heads) {
    const auto known = weighed_.find({depth, token});
    if (known == weighed_.end()) {
      std::vector<float> logprobs(heads_->drafts);
      if (logprobs_after(depth, token, logprobs)) {
        const Weighed& row = weighed_[{depth, token}] = weigh(depth, logprobs);
        return {row.tokens.data(), row.probabilities.data(), row.proposers.data(), row.tokens.size()};
      }
    } else {
      const Weighed& row = known->second;
      return {row.tokens.data(), row.probabilities.data(), row.proposers.data(), row.tokens.size()};
    }
  }
  const size_t first = depth * drafts_.drafts;
  return {drafts_.tokens + first, drafts_.probabilities + first, drafts_.proposers + first, drafts_.drafts};
}

// The log-probabilities of head depth + 1's drafts after `token`, which stands at this depth; false: they
// stay as they are, since the draft vocabulary has no such token.
bool DraftRows::logprobs_after(size_t depth, int64_t token, std::vector<float>& logprobs) const {
  const size_t drafts = heads_->drafts;
  const int64_t parent = place_of(*heads_->tables, token);
  if (parent < 0) return false;
  const size_t rank = rank_of(heads_->tokens + (depth - 1) * drafts, drafts, token);
  if (rank < drafts) {
    std::copy_n(heads_->conditional + ((depth - 1) * drafts + rank) * drafts, drafts, logprobs.begin());
  } else {
    rerank(*heads_, depth, parent, logprobs);
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
      if (rank < heads_->drafts) own.push_back({i, logprobs[rank], 0});
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
