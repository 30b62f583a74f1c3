#include "head_drafts.h"

#include <algorithm>
#include <cmath>

namespace cerberus::search {

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
  return std::isfinite(log) && std::isfinite(probability) ? probability : 0.0;
}

void read_drafts(const int64_t* ids, const float* logprobs, const double* platt, size_t heads, size_t drafts,
                 int64_t vocabulary, int64_t* tokens, double* probabilities) {
  std::fill_n(tokens, heads * drafts, 0);
  std::fill_n(probabilities, heads * drafts, 0.0);
  for (size_t head = 0; head < heads; ++head) {
    const size_t first = head * drafts;
    size_t to = first;
    // A correction that turns the order round would say that a head knows nothing: then all its drafts are
    // alike.
    double least = 1;
    for (size_t i = first; i < first + drafts; ++i) {
      const double probability = probability_of(logprobs[i], platt ? platt + 2 * head : nullptr);
      if (ids[i] < 0 || ids[i] >= vocabulary || !(probability > 0)) continue;
      tokens[to] = ids[i];
      probabilities[to++] = least = std::min(least, probability);
    }
  }
}

}  // namespace cerberus::search
