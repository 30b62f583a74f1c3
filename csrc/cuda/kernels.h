// The CUDA implementations of the ops: what bind_cuda.cpp calls. No torch.
//
// Each takes the prepared arguments, enqueues its work on `stream` of the current device and returns at once.
// Nothing is allocated, copied or synchronized. Empty calls launch nothing. The result is the error of the
// launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "args.h"
#include "ops.h"

namespace cerberus {

// What the kernels are written for; bind_cuda.cpp says so where a call asks for more.
constexpr int64_t kMaxChosenVocab = INT32_MAX;  // choose_tokens: V
constexpr int64_t kMaxRowStates = 1 << 25;      // head_stack: K * D; draft_topk: D
constexpr int64_t kMaxHeadSize = 256;           // tree_attention: E
constexpr int64_t kMaxVerifyNodes = 32768;      // verify_tree: N

// Into how many pieces draft_topk splits the vocabulary on a device with so many multiprocessors:
// DraftTopkArgs::parts.
int64_t draft_topk_parts(int64_t multiprocessors);

// Into how many pieces tree_attention splits the slots of a cache: TreeAttentionArgs::splits.
int64_t tree_attention_splits(int64_t capacity);

// cudaError_t <op>_cuda(const <Op>Args&, cudaStream_t) of every op that runs on CUDA.
#define CERBERUS_DECLARE(name, Name, schema) \
  cudaError_t name##_cuda(const Name##Args& a, cudaStream_t stream);
CERBERUS_OPS_OF_EVERY_DEVICE(CERBERUS_DECLARE)
#undef CERBERUS_DECLARE

}  // namespace cerberus
