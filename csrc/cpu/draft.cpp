// The heads' drafts: anchor, head_stack, draft_topk by the kernels of the chosen level; then tokens in the
// place of the projection's rows, -1 where a draft's probability is 0 or no number.
#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {
namespace {

template <typename T>
void make_anchors(const DraftArgs& a, T* anchors) {
  const int64_t size = a.stack.size;
  const float scale = to_float(*static_cast<const T*>(a.anchor_scale));
  for (int64_t row = 0; row < a.stack.rows; ++row) {
    const int64_t token = larger(0, smaller(a.tokens - 1, a.pending[row]));
    const T* embedding = static_cast<const T*>(a.embeddings) + token * size;
    for (int64_t i = 0; i < size; ++i) from_float(to_float(embedding[i]) * scale, anchors[row * size + i]);
  }
}

}  // namespace

void draft(const DraftArgs& a, const Parallel& parallel) {
  if (a.anchor_scale)
    with_type(a.stack.dtype, [&](auto type) {
      make_anchors(a, static_cast<decltype(type)*>(const_cast<void*>(a.stack.anchor)));
    });
  head_stack_cpu(a.stack, parallel);
  draft_topk_cpu(a.topk, parallel);
  for (int64_t i = 0; i < a.topk.rows * a.topk.drafts; ++i) {
    int64_t& id = a.topk.ids[i];
    if (a.vocabulary) id = a.vocabulary[id];
    if (a.topk.logprobs[i] - a.topk.logprobs[i] != 0) id = -1;
  }
}

}  // namespace cerberus::CERBERUS_ISA
