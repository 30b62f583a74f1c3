// One token per row of logits. A task owns a row.
//
// temperature 0: the largest logit. Otherwise the largest of logit / temperature + noise among the tokens that top_k and
// top_p keep, in double precision, since a rounding that differs between devices would be another token.
//   top_k  the k best, equal ones in order of id
//   top_p  of these the fewest best whose softmax sums to at least top_p
//   noise  -log(-log u), u = (word + 0.5) 2^-32, word = Philox4x32-10(counter = (id / 4, low position, high position,
//          0), key = (low seed, high seed))[id % 4]: the same whatever else is in the call
// NaN is worse than everything else; a row of nothing but NaN gives token 0. Ties go to the lowest id.
#include <cstdlib>

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {
namespace {

template <typename T>
int64_t largest(const T* logits, int64_t vocab) {
  int64_t best = 0;
  float top = -__builtin_inff();
  bool found = false;
  for (int64_t id = 0; id < vocab; ++id) {
    const float x = to_float(logits[id]);
    if (x > top || (!found && x == top)) {
      top = x;
      best = id;
      found = true;
    }
  }
  return best;
}

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
void philox(uint64_t seed, uint64_t position, uint32_t block, uint32_t (&words)[4]) {
  uint32_t c0 = block, c1 = static_cast<uint32_t>(position), c2 = static_cast<uint32_t>(position >> 32), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = 0xD2511F53ull * c0, second = 0xCD9E8D57ull * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Sorts as the logits do, best first, equal ones in order of id: the float's order-preserving image, inverted, above
// the id.
uint64_t rank(float logit, int64_t id) {
  const uint32_t bits = bit_cast<uint32_t>(logit == 0 ? 0.0f : logit);  // -0 equals 0
  const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint32_t>(id);
}

int compare_ranks(const void* a, const void* b) {
  const uint64_t x = *static_cast<const uint64_t*>(a), y = *static_cast<const uint64_t*>(b);
  return x < y ? -1 : x > y;
}

// Keeps of the tokens (sorted, best first) what top_k and top_p keep; returns how many.
template <typename T>
int64_t limit(const ChooseTokensArgs& a, const T* logits, const uint64_t* order, int64_t count) {
  if (a.top_k > 0) count = smaller(count, a.top_k);
  if (a.top_p >= 1 || count == 0) return count;
  const auto weight = [&](int64_t place) {
    const double x = to_float(logits[order[place] & 0xffffffffu]), top = to_float(logits[order[0] & 0xffffffffu]);
    return x == top ? 1.0 : __builtin_exp((x - top) / static_cast<double>(a.temperature));
  };
  double total = 0, before = 0;
  for (int64_t place = 0; place < count; ++place) total += weight(place);
  int64_t kept = 0;
  while (kept < count && (kept == 0 || before < static_cast<double>(a.top_p) * total)) before += weight(kept++);
  return kept;
}

template <typename T>
int64_t sample(const ChooseTokensArgs& a, const T* logits, int64_t position) {
  const bool limited = a.top_k > 0 || a.top_p < 1;
  Buffer<uint64_t> order(limited ? a.vocab : 0);
  int64_t count = 0;
  if (limited) {
    for (int64_t id = 0; id < a.vocab; ++id) {
      const float x = to_float(logits[id]);
      if (x == x) order.data[count++] = rank(x, id);
    }
    qsort(order.data, static_cast<size_t>(count), sizeof(uint64_t), compare_ranks);
    count = limit(a, logits, order.data, count);
  }
  int64_t best = -1;
  double top = 0;
  uint32_t words[4];
  int64_t block = -1;
  for (int64_t i = 0; i < (limited ? count : a.vocab); ++i) {
    const int64_t id = limited ? static_cast<int64_t>(order.data[i] & 0xffffffffu) : i;
    const double x = to_float(logits[id]);
    if (x != x) continue;
    if (id / 4 != block) {
      block = id / 4;
      philox(a.seed, static_cast<uint64_t>(position), static_cast<uint32_t>(block), words);
    }
    const double u = (words[id % 4] + 0.5) * 0x1p-32;
    const double noisy = x / static_cast<double>(a.temperature) - __builtin_log(-__builtin_log(u));
    if (best < 0 || noisy > top || (noisy == top && id < best)) {
      best = id;
      top = noisy;
    }
  }
  return best < 0 ? 0 : best;
}

}  // namespace

void choose_tokens(const ChooseTokensArgs& a, const Parallel& parallel) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_tasks(parallel, a.rows, [&](int64_t row) {
      const T* logits = static_cast<const T*>(a.logits) + row * a.vocab;
      a.tokens[row] = a.temperature == 0 ? largest(logits, a.vocab) : sample(a, logits, a.positions[row]);
    });
  });
}

}  // namespace cerberus::CERBERUS_ISA
