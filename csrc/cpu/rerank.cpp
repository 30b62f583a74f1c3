// A head's drafts, weighed anew after each draft of the head before it. A task owns one head of one row. The
// children's rows are transposed first, so that the scores of a parent's children are in lanes of their own
// and nothing is summed across lanes but the softmax.
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int kMost = 32;                        // drafts; there are always lanes for so many
constexpr int kVectors = kMost / kLanes;         // that hold one number of each
constexpr int kTogether = kLanes == 16 ? 4 : 2;  // parents: as many sums as registers hold hide their latency
constexpr int64_t kSharedHeads = 16;             // fewer take less than it takes to wake a thread
constexpr float kNone = -__builtin_inff();

using Lanes = Vec[kVectors];

bool is_place(int64_t place, int64_t vocab) {
  return static_cast<uint64_t>(place) < static_cast<uint64_t>(vocab);
}

Vec finite_or_none(Vec x) { return select(x - x == 0, x, broadcast(kNone)); }

// Asks for a head's rows, which no cache has: all at once they are there in the time of a few.
template <typename T>
void prefetch(const RerankArgs& a, const void* table, const int64_t* ids) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < a.drafts; ++i)
    if (is_place(ids[i], a.vocab))
      for (int64_t at = 0; at < a.rank; at += kLine)
        __builtin_prefetch(static_cast<const T*>(table) + ids[i] * a.rank + at);
}

// One head's drafts as children of any parent.
struct Children {
  Lanes logprobs, prior;  // kNone where there is no draft
  float rest;
  Scratch columns;  // (r, kMost)

  explicit Children(int64_t rank) : columns(rank * kMost) {}
};

template <typename T>
void lay_out(const RerankArgs& a, int64_t first, int64_t head, Children& children) {
  float logprobs[kMost];
  for (int64_t i = 0; i < a.rank * kMost; ++i) children.columns.data[i] = 0;
  for (int64_t c = 0; c < kMost; ++c) {
    const int64_t place = c < a.drafts ? a.ids[first + c] : -1;
    logprobs[c] = is_place(place, a.vocab) ? a.logprobs[first + c] : kNone;
    if (!(logprobs[c] - logprobs[c] == 0)) {
      logprobs[c] = kNone;
      continue;
    }
    const T* from = static_cast<const T*>(a.children) + place * a.rank;
    for (int64_t i = 0; i < a.rank; ++i) children.columns.data[i * kMost + c] = to_float(from[i]);
  }
  Vec mass{};
  for (int v = 0; v < kVectors; ++v) {
    children.logprobs[v] = load(logprobs + v * kLanes);
    children.prior[v] = finite_or_none(children.logprobs[v] * a.slopes[head]);  // -inf and 0: no number
    mass += exp(children.logprobs[v]);
  }
  const float left = 1 - sum(mass);
  children.rest = a.slopes[head] * __builtin_logf(left > kLeastRest ? left : kLeastRest) + a.rest[head];
  if (!(children.rest - children.rest == 0)) children.rest = kNone;
}

void store_drafts(const Lanes& lanes, int64_t drafts, float* out) {
  float all[kMost];
  for (int v = 0; v < kVectors; ++v) store(lanes[v], all + v * kLanes);
  __builtin_memcpy(out, all, static_cast<size_t>(drafts) * sizeof(float));
}

// scores: of all children; those of no draft are kNone.
void softmax(const RerankArgs& a, Lanes& scores, float rest, float* out) {
  float top = rest;
  for (Vec& score : scores) {
    score = finite_or_none(score);
    const float here = largest(score);
    if (here > top) top = here;
  }
  if (top > kNone) {
    Vec mass{};
    for (const Vec& score : scores) mass += exp(score - top);
    const float log_mass = top + __builtin_logf(sum(mass) + exp(rest - top));
    for (Vec& score : scores) score -= log_mass;
  }
  store_drafts(scores, a.drafts, out);
}

template <typename T>
void rerank_head(const RerankArgs& a, int64_t task) {
  const int64_t head = task % (a.heads - 1), first = (task + task / (a.heads - 1) + 1) * a.drafts;
  const T* table = static_cast<const T*>(a.parents) + head * a.vocab * a.rank;
  float* out = a.conditional + task * a.drafts * a.drafts;
  prefetch<T>(a, a.children, a.ids + first);
  prefetch<T>(a, table, a.ids + first - a.drafts);
  Children children(a.rank);
  lay_out<T>(a, first, head, children);
  for (int64_t begin = 0; begin < a.drafts; begin += kTogether) {
    const T* rows[kTogether];
    bool known[kTogether];
    Lanes scores[kTogether];
    const int64_t count = smaller(kTogether, a.drafts - begin);
    for (int64_t p = 0; p < kTogether; ++p) {
      const int64_t place = p < count ? a.ids[first - a.drafts + begin + p] : -1;
      known[p] = is_place(place, a.vocab);
      rows[p] = known[p] ? table + place * a.rank : nullptr;
      for (int v = 0; v < kVectors; ++v) scores[p][v] = children.prior[v];
    }
    for (int64_t i = 0; i < a.rank; ++i) {
      const float* column = children.columns.data + i * kMost;
      for (int p = 0; p < kTogether; ++p) {
        const Vec of_parent = broadcast(known[p] ? to_float(rows[p][i]) : 0.0f);
        for (int v = 0; v < kVectors; ++v)
          scores[p][v] = multiply_add(of_parent, load(column + v * kLanes), scores[p][v]);
      }
    }
    for (int64_t p = 0; p < count; ++p) {
      float* to = out + (begin + p) * a.drafts;
      if (known[p]) {
        softmax(a, scores[p], children.rest, to);
      } else {
        store_drafts(children.logprobs, a.drafts, to);
      }
    }
  }
}

}  // namespace

void rerank(const RerankArgs& a, const Parallel& parallel) {
  const int64_t tasks = a.rows * (a.heads - 1);
  with_type(a.dtype, [&](auto type) {
    parallel_tasks(tasks < kSharedHeads ? Parallel{nullptr, 1} : parallel, tasks,
                   [&](int64_t task) { rerank_head<decltype(type)>(a, task); });
  });
}

}  // namespace cerberus::CERBERUS_ISA
