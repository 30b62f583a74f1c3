// Which drafts there are after a node of a draft tree: those of its depth, of which the heads' are weighed
// anew by the node's own token where heads are conditional (drafting/conditional.py has the formula).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

namespace cerberus::search {

// Drafts for each depth, whatever the path there is: the heads', and others of this kind. Row-major (depths,
// drafts), row d for nodes of depth d + 1, best first; proposers: who makes each of them.
struct DepthDrafts {
  const int64_t* tokens = nullptr;
  const double* probabilities = nullptr;
  const int64_t* proposers = nullptr;
  size_t depths = 0;
  size_t drafts = 0;
};

// The tables of conditional drafts in bfloat16: what `ops.rerank` reads, for any token.
// Letters: K heads, P drafts of each, V vocabulary, Vd draft vocabulary, r rank.
struct ConditionalTables {
  const uint16_t* parents = nullptr;                  // (K - 1, Vd, r)
  const uint16_t* children = nullptr;                 // (Vd, r)
  const int64_t* places = nullptr;                    // (V,): a token's row of the tables, or -1
  const float* slopes = nullptr;                      // (K - 1,)
  const float* rest = nullptr;                        // (K - 1,)
  size_t heads = 0, vocab = 0, rank = 0, tokens = 0;  // K, Vd, r, V
};

// What conditional heads have drafted at one step.
struct HeadDrafts {
  const ConditionalTables* tables = nullptr;
  const int64_t* tokens = nullptr;  // (K, P); another number than a token: no draft
  const float* logprobs = nullptr;  // (K, P)
  const float* after = nullptr;     // (K - 1, P, P): of `ops.rerank`, or null: by the tables alone
  const double* platt = nullptr;  // (K, 2): slope and shift of each head, or null: probabilities as they are
  size_t drafts = 0;              // P
  int64_t proposer = 0;           // whose drafts they are
};

// The drafts after one node, best first.
struct DraftRow {
  const int64_t* tokens = nullptr;
  const double* probabilities = nullptr;
  const int64_t* proposers = nullptr;
  size_t size = 0;
};

class DraftRows {
 public:
  // heads: null, or of conditional drafts. Both are read as long as this lives.
  DraftRows(const DepthDrafts& drafts, const HeadDrafts* heads) : drafts_(drafts), heads_(heads) {}

  // After a node of this depth with this token; valid as long as this lives.
  DraftRow after(size_t depth, int64_t token);

 private:
  struct Weighed {
    std::vector<int64_t> tokens, proposers;
    std::vector<double> probabilities;
  };

  // One head's drafts as children of any parent.
  struct Children {
    std::vector<float> rows;   // (P, r): of the table
    std::vector<float> prior;  // (P,): slope times logprob; -inf: no draft
    float rest = 0;
  };

  bool logprobs_after(size_t depth, int64_t token, std::vector<float>& logprobs);
  const Children& children_of(size_t head);
  void rerank(size_t head, int64_t parent, std::vector<float>& logprobs);
  Weighed weigh(size_t depth, const std::vector<float>& logprobs) const;

  const DepthDrafts& drafts_;
  const HeadDrafts* heads_;
  std::map<std::pair<size_t, int64_t>, Weighed> weighed_;  // by depth and token
  std::map<size_t, Children> children_;                    // by head
};

}  // namespace cerberus::search
