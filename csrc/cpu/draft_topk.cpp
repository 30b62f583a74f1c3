// The P largest of log_softmax(projection @ state). A task owns one part of the vocabulary: logits of a few
// rows at a time in the L1 cache, of which it keeps maximum, sum of exponentials and the P best. Then the
// parts are merged in order.
#include "cpu/kernels.h"
#include "cpu/parts.h"
#include "cpu/product.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int64_t kRowsAtOnce = 16;

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
  top = -__builtin_inff();
  for (int64_t i = 0; i < count; ++i)
    if (x[i] > top) top = x[i];
  const float shift = top == -__builtin_inff() ? 0.0f : top;
  for (int64_t i = count; i % kLanes; ++i) x[i] = -__builtin_inff();
  Vec sums{};
  for (int64_t i = 0; i < count; i += kLanes) sums += exp(load(x + i) - shift);
  mass = sum(sums);
}

template <typename T>
void part(const DraftTopkArgs& a, const Row<T>* states, int64_t index) {
  const int64_t begin = index * kDraftTopkPart, count = smaller(kDraftTopkPart, a.vocab - begin);
  constexpr int64_t stride = kDraftTopkPart + kLanes;
  float logits[kRowsAtOnce * stride];
  for (int64_t row = 0; row < a.rows; row += kRowsAtOnce) {
    const int64_t rows = smaller(kRowsAtOnce, a.rows - row);
    rows_times_weights(states + row * a.size, a.size, rows,
                       static_cast<const T*>(a.projection) + begin * a.size, 0, count, a.size,
                       Output<T>{nullptr, logits, stride, nullptr});
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t slot = (row + m) * a.parts + index;
      float* best = a.part_logits + slot * a.drafts;
      int32_t* ids = a.part_ids + slot * a.drafts;
      clear(a.drafts, best, ids);
      for (int64_t n = 0; n < count; ++n)
        insert(logits[m * stride + n], static_cast<int32_t>(begin + n), a.drafts, best, ids);
      softmax_sums(logits + m * stride, count, a.part_max[slot], a.part_sum[slot]);
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
      insert(a.part_logits[from], a.part_ids[from], a.drafts, best, ids);
    }
  }
  const float log_mass = static_cast<float>(__builtin_log(mass));
  for (int64_t draft = 0; draft < a.drafts; ++draft) {
    a.ids[row * a.drafts + draft] = ids[draft] < 0 ? 0 : ids[draft];  // fewer numbers than drafts: NaN logits
    a.logprobs[row * a.drafts + draft] = best[draft] - top - log_mass;
  }
}

}  // namespace

void draft_topk(const DraftTopkArgs& a, const Parallel& parallel) {
  if (a.rows == 0) return;
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    Buffer<Row<T>> scratch(row_scratch<T>(a.rows * a.size));
    const Row<T>* states = as_rows(static_cast<const T*>(a.states), a.rows * a.size, scratch.data);
    parallel_tasks(parallel, a.parts, [&](int64_t index) { part<T>(a, states, index); });
  });
  parallel_tasks(parallel, a.rows, [&](int64_t row) { merge(a, row); });
}

}  // namespace cerberus::CERBERUS_ISA
