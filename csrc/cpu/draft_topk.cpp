// The P largest of log_softmax(projection @ state). A task owns one part of the vocabulary: logits of a few
// rows at a time in the L1 cache, of which it keeps maximum, sum of exponentials and the P best. Then the
// parts are merged in order.
#include "cpu/eight_bits.h"
#include "cpu/kernels.h"
#include "cpu/parts.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int64_t kRowsAtOnce = 16;
constexpr int64_t kSharedEntries = 1 << 14;  // of parts' lists: fewer are merged by one thread

// Puts (logit, id) into the descending list; of equal logits the one that came first stays first. NaN never
// enters.
void insert(float logit, int32_t id, int64_t drafts, float* logits, int32_t* ids) {
  if (!(logit > logits[drafts - 1]) && ids[drafts - 1] >= 0) return;
  if (logit != logit) return;
  int64_t place = drafts - 1;
  for (; place > 0 && (ids[place - 1] < 0 || logit > logits[place - 1]); --place) {
    logits[place] = logits[place - 1];
    ids[place] = ids[place - 1];
  }
  logits[place] = logit;
  ids[place] = id;
}

void clear(int64_t drafts, float* logits, int32_t* ids) {
  for (int64_t i = 0; i < drafts; ++i) {
    logits[i] = -__builtin_inff();
    ids[i] = -1;
  }
}

// Maximum and sum of e^(x - maximum); x is followed by room for a whole vector.
void softmax_sums(float* x, int64_t count, float& top, float& mass) {
  for (int64_t i = count; i % kLanes; ++i) x[i] = -__builtin_inff();
  Vec tops = broadcast(-__builtin_inff());
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec here = load(x + i);
    tops = select(here > tops, here, tops);  // never a NaN
  }
  top = largest(tops);
  const float shift = top == -__builtin_inff() ? 0.0f : top;
  Vec sums{};
  for (int64_t i = 0; i < count; i += kLanes) sums += exp(load(x + i) - shift);
  mass = sum(sums);
}

// Inserts what may belong to the list of all parts: vectors tell which few numbers are worth a look. What is
// less than `limit` cannot be among the best of all. x is followed by -inf,
// or whatever, up to a whole vector.
void insert_all(const float* x, int64_t count, int64_t begin, float limit, int64_t drafts, float* best,
                int32_t* ids) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec here = load(x + i);
    const IntVec wanted = (here >= limit) & (ids[drafts - 1] < 0 ? here == here : here > best[drafts - 1]);
    if (!any(wanted)) continue;
    for (int64_t lane = 0; lane < smaller(kLanes, count - i); ++lane)
      if (x[i + lane] >= limit)
        insert(x[i + lane], static_cast<int32_t>(begin + i + lane), drafts, best, ids);
  }
}

// The P best logits of every row that parts have found so far: what is less than the last of them is not
// worth a look. Which parts those are is left to chance; what is found in the end is not.
struct Seen {
  int64_t drafts;
  Scratch best, limits;     // (rows, P), (rows,)
  Buffer<uint8_t> is_busy;  // (rows,)

  Seen(int64_t rows, int64_t drafts) : drafts(drafts), best(rows * drafts), limits(rows), is_busy(rows) {
    for (int64_t i = 0; i < rows * drafts; ++i) best.data[i] = -__builtin_inff();
    for (int64_t row = 0; row < rows; ++row) {
      limits.data[row] = -__builtin_inff();
      is_busy.data[row] = 0;
    }
  }

  float limit(int64_t row) const {
    float found;
    __atomic_load(limits.data + row, &found, __ATOMIC_RELAXED);
    return found;
  }

  // found: a part's list. Nothing is noted while another part does it: that only costs a few looks more.
  void note(int64_t row, const float* found) {
    if (__atomic_test_and_set(is_busy.data + row, __ATOMIC_ACQUIRE)) return;
    float* list = best.data + row * drafts;
    for (int64_t i = 0; i < drafts && found[i] > list[drafts - 1]; ++i) {
      int64_t place = drafts - 1;
      for (; place > 0 && found[i] > list[place - 1]; --place) list[place] = list[place - 1];
      list[place] = found[i];
    }
    __atomic_store(limits.data + row, list + drafts - 1, __ATOMIC_RELAXED);
    __atomic_clear(is_busy.data + row, __ATOMIC_RELEASE);
  }
};

template <typename T, typename Blocks>
void part(const DraftTopkArgs& a, const Blocks& blocks, Seen& seen, int64_t index) {
  const int64_t begin = index * kDraftTopkPart, count = smaller(kDraftTopkPart, a.vocab - begin);
  constexpr int64_t stride = kDraftTopkPart + kLanes;
  float logits[kRowsAtOnce * stride];
  for (int64_t row = 0; row < a.rows; row += kRowsAtOnce) {
    const int64_t rows = smaller(kRowsAtOnce, a.rows - row);
    blocks.multiply(row, rows, 0, begin, begin + count, Output<T>{nullptr, logits, stride, nullptr});
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t slot = (row + m) * a.parts + index;
      float* best = a.part_logits + slot * a.drafts;
      int32_t* ids = a.part_ids + slot * a.drafts;
      clear(a.drafts, best, ids);
      softmax_sums(logits + m * stride, count, a.part_max[slot], a.part_sum[slot]);
      insert_all(logits + m * stride, count, begin, seen.limit(row + m), a.drafts, best, ids);
      seen.note(row + m, best);
    }
  }
}

void merge(const DraftTopkArgs& a, int64_t row) {
  float top = -__builtin_inff();
  for (int64_t i = row * a.parts; i < (row + 1) * a.parts; ++i)
    if (a.part_max[i] > top) top = a.part_max[i];
  double mass = 0;
  float best[32];
  int32_t ids[32];
  clear(a.drafts, best, ids);
  for (int64_t i = row * a.parts; i < (row + 1) * a.parts; ++i) {
    mass += static_cast<double>(a.part_sum[i]) * exp(a.part_max[i] - top);
    for (int64_t draft = 0; draft < a.drafts; ++draft) {
      const int64_t from = i * a.drafts + draft;
      if (a.part_ids[from] < 0) break;
      if (ids[a.drafts - 1] >= 0 && !(a.part_logits[from] > best[a.drafts - 1]))
        break;  // nor are the next ones
      insert(a.part_logits[from], a.part_ids[from], a.drafts, best, ids);
    }
  }
  const float log_mass = static_cast<float>(__builtin_log(mass));
  for (int64_t draft = 0; draft < a.drafts; ++draft) {
    a.ids[row * a.drafts + draft] = ids[draft] < 0 ? 0 : ids[draft];  // fewer numbers than drafts: NaN logits
    a.logprobs[row * a.drafts + draft] = best[draft] - top - log_mass;
  }
}

template <typename T, typename Blocks>
void all_parts(const DraftTopkArgs& a, const Parallel& parallel) {
  Blocks blocks(a.projection, a.vocab, a.size, a.rows);
  for (int64_t row = 0; row < a.rows; ++row) blocks.lay(row, static_cast<const T*>(a.states) + row * a.size);
  Seen seen(a.rows, a.drafts);
  parallel_tasks(parallel, a.parts, [&](int64_t index) { part<T>(a, blocks, seen, index); });
}

}  // namespace

void draft_topk(const DraftTopkArgs& a, const Parallel& parallel) {
  if (a.rows == 0) return;
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    (a.eight_bits ? all_parts<T, EightBitBlocks<T>> : all_parts<T, DenseBlocks<T>>)(a, parallel);
  });
  // A few microseconds: less than it takes to wake a thread.
  const bool is_short = a.rows * a.parts * a.drafts < kSharedEntries;
  parallel_tasks(is_short ? Parallel{nullptr, 1} : parallel, a.rows, [&](int64_t row) { merge(a, row); });
}

}  // namespace cerberus::CERBERUS_ISA
