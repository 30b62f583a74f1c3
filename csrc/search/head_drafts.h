// What the heads draft, as the probabilities that their drafts are right.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cerberus::search {

// Of a log-probability, corrected by a head's slope and shift where `line` is not null, as `reading` of
// drafting/platt.py; 0 where there is no such number.
double probability_of(float logprob, const double* line);

// ids, logprobs (heads, drafts), platt (heads, 2) or null -> tokens, probabilities (heads, drafts), each row
// best first. What is no draft, for its id or its probability, comes last, as token 0 of probability 0.
void read_drafts(const int64_t* ids, const float* logprobs, const double* platt, size_t heads, size_t drafts,
                 int64_t vocabulary, int64_t* tokens, double* probabilities);

}  // namespace cerberus::search
