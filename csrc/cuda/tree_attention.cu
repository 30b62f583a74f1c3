// tree_attention: softmax(score) v, where node i sees the committed slots and the slots of its ancestors.
// score: scale q k, or softcap tanh(scale q k / softcap); a sink is one more logit, without a value.
//
// Split-KV flash attention. One launch owns tiles of query rows times pieces of the positions
// (tree_attention.cuh): on tensor cores for bf16 and fp16 (tree_attention_mma.cuh), else with fused
// multiply-adds (tree_attention_fma.cuh). Where there is more than one piece, a second launch puts them
// together (tree_attention_combine.cuh), and begins while the first is ending.
#include "args.h"
#include "kernels.h"
#include "launch.cuh"
#include "tree_attention.cuh"
#include "tree_attention_combine.cuh"
#include "tree_attention_fma.cuh"
#include "tree_attention_mma.cuh"

namespace cerberus {
namespace {

// The main kernel of a call.
struct Plan {
  int rows;  // of a tile
  int threads;
  int64_t shared_bytes;

  int64_t blocks(const TreeAttentionArgs& a) const {  // of one piece
    return a.rows * a.kv_heads * divide_up(a.nodes * (a.query_heads / a.kv_heads), rows);
  }
};

bool on_tensor_cores(const TreeAttentionArgs& a) {
  return a.dtype != DType::kFloat32 && a.head_size % 8 == 0 && is_aligned16(a.query) &&
         is_aligned16(a.keys) && is_aligned16(a.values);
}

// f(kernel, plan, T{})
template <typename F>
cudaError_t with_kernel(const TreeAttentionArgs& a, F&& f) {
  if (!on_tensor_cores(a)) {
    return with_fma_shape(a, [&](auto element, auto vector, auto columns) {
      using Tile = FmaTile<columns()>;
      const Plan plan = {Tile::kTile, kFmaThreads, 0};
      return f(tree_attention_fma_kernel<decltype(element), vector(), columns()>, plan, element);
    });
  }
  return dispatch_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, float>) {
      return cudaErrorInvalidValue;
    } else {
      return with_mma_shape<T>(a, [&](auto shape) {
        using Shape = decltype(shape);
        const Plan plan = {Shape::kRows, Shape::kThreads, Shape::kSharedBytes};
        return f(tree_attention_mma_kernel<Shape>, plan, element);
      });
    }
  });
}

}  // namespace

int64_t tree_attention_splits(int64_t capacity) {
  int splits = 1;
  while (splits < kMaxSplits && first_of_piece(splits) < capacity) ++splits;
  return splits;
}

cudaError_t tree_attention_cuda(const TreeAttentionArgs& a, cudaStream_t stream) {
  if (a.head_size > kMaxHeadSize || a.splits != tree_attention_splits(a.capacity))
    return cudaErrorInvalidValue;
  if (a.nodes * a.query_heads > INT32_MAX || a.capacity > INT32_MAX) return cudaErrorInvalidValue;
  if (a.rows == 0 || a.nodes == 0 || a.query_heads == 0) return cudaSuccess;
  return with_kernel(a, [&](auto kernel, const Plan& plan, auto element) {
    const Launch how = overlapping(plan.blocks(a) * a.splits, plan.threads, plan.shared_bytes);
    const cudaError_t error = launch(kernel, how, stream, a);
    if (error != cudaSuccess || a.splits == 1) return error;
    return launch_combine<decltype(element)>(a, stream);
  });
}

}  // namespace cerberus
