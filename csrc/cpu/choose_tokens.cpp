// One token per row of logits. A task owns a row.
//
// temperature 0: the largest logit. Otherwise the largest of logit / temperature + noise among the tokens
// that top_k and top_p keep, in double precision, since a rounding that differs between devices would be
// another token.
//   top_k  the k best, equal ones in order of id
//   top_p  of these the fewest best whose softmax sums to at least top_p
//   noise  -log(-log u), u = (word + 0.5) 2^-32, word = Philox4x32-10(counter = (id / 4, low position, high
//   position,
//          0), key = (low seed, high seed))[id % 4]: the same whatever else is in the call
// NaN is worse than everything else; a row of nothing but NaN gives token 0. Ties go to the lowest id.
//
// Only few tokens can win, so float32 vectors first tell which: the tokens worth sorting for top_k and top_p,
// and those whose noise could be large enough.
#include <cstdlib>

#include "cpu/kernels.h"
#include "cpu/philox.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// The kLanes logits from `id` on, NaN behind the last one.
template <typename T>
Vec logits_at(const T* logits, int64_t id, int64_t vocab) {
  if (id + kLanes <= vocab) return load(logits + id);
  Vec x = load_part(logits + id, vocab - id);
  for (int lane = static_cast<int>(vocab - id); lane < kLanes; ++lane) x[lane] = __builtin_nanf("");
  return x;
}

// The largest logit, -inf if there is none.
template <typename T>
float largest_logit(const T* logits, int64_t vocab) {
  constexpr int kChains = 4;  // a comparison waits for the one before
  Vec tops[kChains];
  for (Vec& top : tops) top = broadcast(-kInfinity);
  int64_t id = 0;
  for (; id + kChains * kLanes <= vocab; id += kChains * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      const Vec x = load(logits + id + i * kLanes);
      tops[i] = select(x > tops[i], x, tops[i]);  // never a NaN
    }
  }
  for (; id < vocab; id += kLanes) {
    const Vec x = logits_at(logits, id, vocab);
    tops[0] = select(x > tops[0], x, tops[0]);
  }
  for (int i = 1; i < kChains; ++i) tops[0] = select(tops[i] > tops[0], tops[i], tops[0]);
  return largest(tops[0]);
}

// The first token with that logit, 0 if there is none.
template <typename T>
int64_t first_with(float logit, const T* logits, int64_t vocab) {
  for (int64_t id = 0; id < vocab; id += kLanes) {
    const IntVec found = logits_at(logits, id, vocab) == broadcast(logit);
    for (int lane = 0; any(found) && lane < kLanes; ++lane)
      if (found[lane]) return id + lane;
  }
  return 0;
}

// The first token with the largest logit, which is looked for in one piece of the vocabulary alone.
template <typename T>
int64_t best_token(const T* logits, int64_t vocab) {
  constexpr int64_t kPiece = 2048;
  float top = -kInfinity;
  int64_t best = 0;
  for (int64_t begin = 0; begin < vocab; begin += kPiece) {
    const float here = largest_logit(logits + begin, smaller(kPiece, vocab - begin));
    if (here > top) {
      top = here;
      best = begin;
    }
  }
  // Nothing but NaN and -inf: any piece may hold the first -inf.
  if (top == -kInfinity) return first_with(top, logits, vocab);
  return best + first_with(top, logits + best, smaller(kPiece, vocab - best));
}

// The best token so far.
struct Choice {
  double temperature;
  int64_t id = -1;
  double value = 0;

  void consider(int64_t candidate, float logit, uint32_t word) {
    const double u = (word + 0.5) * 0x1p-32;
    const double noisy = logit / temperature - __builtin_log(-__builtin_log(u));
    if (id < 0 || noisy > value || (noisy == value && candidate < id)) {
      id = candidate;
      value = noisy;
    }
  }
};

uint32_t word_of(const ChooseTokensArgs& a, int64_t position, int64_t id) {
  uint32_t words[4];
  philox(a.seed, static_cast<uint64_t>(position), static_cast<uint32_t>(id / 4), words);
  return words[id % 4];
}

// Every token takes part. The noise of most is too small by far: -log u > 1 - u, so that a token can only win
// where 1 - u < e^-(best value - logit / temperature).
template <typename T>
int64_t sample_all(const ChooseTokensArgs& a, const T* logits, int64_t position) {
  constexpr int64_t kChunk = 64;
  const float top = largest_logit(logits, a.vocab);
  const int64_t likely = first_with(top, logits, a.vocab);
  if (!(to_float(logits[likely]) == top)) return 0;  // nothing but NaN
  Choice best{a.temperature};
  best.consider(likely, top, word_of(a, position, likely));
  for (int64_t begin = 0; begin < a.vocab; begin += kChunk) {
    const float lead = static_cast<float>(top / best.temperature - best.value);
    float limit[kChunk];  // of 1 - u
    for (int64_t i = 0; i < kChunk && begin + i < a.vocab; i += kLanes) {
      Vec x = (logits_at(logits, begin + i, a.vocab) - top) / a.temperature + lead;
      x = select(x > 80.0f, broadcast(80.0f), x);
      store(exp(x) * 1.001f, limit + i);  // more than any rounding above
    }
    const int64_t end = smaller(a.vocab, begin + kChunk);
    for (int64_t first = begin; first < end; first += 4) {
      uint32_t words[4];
      philox(a.seed, static_cast<uint64_t>(position), static_cast<uint32_t>(first / 4), words);
      for (int64_t id = first; id < smaller(end, first + 4); ++id) {
        const uint32_t word = words[id % 4];
        const float rest = static_cast<float>(~word) * 0x1p-32f;  // 1 - u, a little less
        if (rest >= limit[id - begin]) continue;
        const float x = to_float(logits[id]);
        if (x == x) best.consider(id, x, word);
      }
    }
  }
  return best.id;
}

// Sorts as the logits do, best first, equal ones in order of id: the float's order-preserving image,
// inverted, above the id.
uint64_t rank(float logit, int64_t id) {
  const uint32_t bits = bit_cast<uint32_t>(logit == 0 ? 0.0f : logit);  // -0 equals 0
  const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint32_t>(id);
}

int compare_ranks(const void* a, const void* b) {
  const uint64_t x = *static_cast<const uint64_t*>(a), y = *static_cast<const uint64_t*>(b);
  return x < y ? -1 : x > y;
}

// The tokens of a row in buckets by their distance from the largest logit, in units of 1 / kPerNat. The best
// buckets that certainly hold all the tokens that top_k and top_p keep are the only ones worth sorting.
struct Buckets {
  static constexpr int kCount = 512;
  static constexpr float kPerNat = 16;
  int64_t tokens[kCount + 1];  // the last one: NaN
  double mass[kCount + 1];     // sum of e^-distance

  static IntVec of(Vec logits, float top, float scale) {
    Vec distance = (top - logits) * scale;
    distance = select(distance < float{kCount - 1}, distance, broadcast(kCount - 1));
    const IntVec missing = logits != logits;
    return (~missing & __builtin_convertvector(distance, IntVec)) | (missing & kCount);
  }

  template <typename T>
  void fill(const T* logits, int64_t vocab, float top, float scale) {
    __builtin_memset(this, 0, sizeof(*this));
    for (int64_t id = 0; id < vocab; id += kLanes) {
      const Vec x = logits_at(logits, id, vocab);
      const IntVec bucket = of(x, top, scale);
      const Vec e = exp((x - top) * (scale / kPerNat));
      for (int lane = 0; lane < kLanes; ++lane) {
        tokens[bucket[lane]] += 1;
        mass[bucket[lane]] += e[lane];
      }
    }
  }

  // One bucket more than the sums ask for: the masses are rounded.
  int last_needed(int64_t top_k, double top_p) const {
    double total = 0;
    for (int i = 0; i < kCount; ++i) total += mass[i];
    int64_t seen = 0;
    double summed = 0;
    for (int i = 0; i < kCount; ++i) {
      seen += tokens[i];
      summed += mass[i];
      if (top_k > 0 ? seen >= top_k : summed >= top_p * total) return i + 1 < kCount ? i + 1 : i;
    }
    return kCount - 1;
  }

  double total() const {
    double sum = 0;
    for (int i = 0; i < kCount; ++i) sum += mass[i];
    return sum;
  }
};

template <typename T>
int64_t sample_limited(const ChooseTokensArgs& a, const T* logits, int64_t position) {
  // top_k counts tokens, so that their distance in logits serves; top_p sums masses, and these depend on the
  // temperature.
  const float top = largest_logit(logits, a.vocab),
              scale = Buckets::kPerNat / (a.top_k > 0 ? 1.0f : a.temperature);
  Buckets buckets;
  int last = Buckets::kCount - 1;
  // Infinities have no distance: then everything is sorted.
  const bool measurable = top - top == 0 && scale - scale == 0;
  if (measurable) {
    buckets.fill(logits, a.vocab, top, scale);
    last = buckets.last_needed(a.top_k, a.top_p);
  }
  Buffer<uint64_t> order(a.vocab);
  int64_t count = 0;
  for (int64_t id = 0; id < a.vocab; id += kLanes) {
    const Vec x = logits_at(logits, id, a.vocab);
    const IntVec wanted = measurable ? Buckets::of(x, top, scale) <= last : x == x;
    if (!any(wanted)) continue;
    for (int lane = 0; lane < kLanes; ++lane)
      if (wanted[lane]) order.data[count++] = rank(x[lane], id + lane);
  }
  qsort(order.data, static_cast<size_t>(count), sizeof(uint64_t), compare_ranks);

  const auto id_of = [&](int64_t place) { return static_cast<int64_t>(order.data[place] & 0xffffffffu); };
  if (a.top_k > 0) count = smaller(count, a.top_k);
  if (a.top_p < 1 && count > 0) {
    const auto weight = [&](int64_t place) {
      const double x = to_float(logits[id_of(place)]);
      return x == top ? 1.0 : __builtin_exp((x - top) / static_cast<double>(a.temperature));
    };
    double total = 0, before = 0;
    if (a.top_k == 0 && measurable) {
      total = buckets.total();
    } else {
      for (int64_t place = 0; place < count; ++place) total += weight(place);
    }
    int64_t kept = 0;
    while (kept < count && (kept == 0 || before < static_cast<double>(a.top_p) * total))
      before += weight(kept++);
    count = kept;
  }
  Choice best{a.temperature};
  for (int64_t place = 0; place < count; ++place) {
    const int64_t id = id_of(place);
    best.consider(id, to_float(logits[id]), word_of(a, position, id));
  }
  return best.id < 0 ? 0 : best.id;
}

}  // namespace

void choose_tokens(const ChooseTokensArgs& args, const Parallel& parallel) {
  ChooseTokensArgs a = args;
  if (a.numbers && a.temperature != 0) {
    a.seed = static_cast<uint64_t>(a.numbers[0]);
    a.top_k = a.numbers[1];
    const uint64_t bits = static_cast<uint64_t>(a.numbers[2]);
    a.temperature = bit_cast<float>(static_cast<uint32_t>(bits));
    a.top_p = bit_cast<float>(static_cast<uint32_t>(bits >> 32));
  }
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_tasks(parallel, a.rows, [&](int64_t row) {
      const T* logits = static_cast<const T*>(a.logits) + row * a.vocab;
      if (a.temperature == 0) {
        a.tokens[row] = best_token(logits, a.vocab);
      } else if (a.top_k == 0 && a.top_p >= 1) {
        a.tokens[row] = sample_all(a, logits, a.positions[row]);
      } else {
        a.tokens[row] = sample_limited(a, logits, a.positions[row]);
      }
    });
  });
}

}  // namespace cerberus::CERBERUS_ISA
