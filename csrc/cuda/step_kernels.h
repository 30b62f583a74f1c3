// The kernels of a step (step/device_step.h) beside those of the ops: products that write to a part of a row,
// grouped products, row instructions. As in kernels.h, each enqueues its work on `stream` of the current
// device and returns the error of the launch; nothing is allocated, copied or synchronized. No torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "args.h"

namespace cerberus {

constexpr int kMaxProductParts = 8;           // of one launch
constexpr int64_t kMaxProductSize = 1 << 25;  // I of a product, see kMaxRowStates
constexpr int64_t kMaxRankedSize = 1 << 12;   // n0 of RowOp::kTop: an element is compared with all others
constexpr int64_t kMaxSharedScratch = 96
                                      << 10;  // bytes of a node's scratch; more of it lies in global memory

// output[m, first + o] = input[m] @ weight[o] + bias[o], rounded once.
struct ProductPart {
  const void* weight;  // (O, I), or packed
  const void* bias;    // (O,) or null
  int64_t out_size, first;
};

// Products that read one input: one launch. What an output is depends on its row of the input and on `tiles`
// alone, to the last bit, not on the other rows nor on how many there are.
struct StepProductArgs {
  DType dtype;
  Packing packing;                   // of all weights: kNone, or in blocks, of bfloat16 (device_blocks.h)
  int64_t tiles;                     // product_tiles of all products that have the bits of one launch
  int64_t rows, in_size, out_width;  // M, I, elements of a row of the output
  const void* input;                 // (M, I)
  void* output;                      // (M, out_width)
  int64_t count;                     // of parts
  ProductPart parts[kMaxProductParts];
};
// Of a part.
constexpr int64_t product_tiles(int64_t out_size) { return (out_size + 15) / 16; }
cudaError_t step_product_cuda(const StepProductArgs& a, cudaStream_t stream);

// output[m, j] = input[m, j] @ weight[chosen[m, j]]^T + bias[chosen[m, j]]; 0 where chosen is none of 0 .. G
// - 1. Row-invariant as a product.
struct StepGroupedArgs {
  DType dtype;
  int64_t rows, each, in_size, out_size, groups;  // M, J, I, O, G
  bool shared;                                    // one input row for all that a row names
  const void* input;                              // (M, shared ? 1 : J, I)
  const void* weight;                             // (G, O, I)
  const void* bias;                               // (G, O) or null
  const float* chosen;                            // (M, J), whole numbers
  void* output;                                   // (M, J, O)
};
cudaError_t step_grouped_cuda(const StepGroupedArgs& a, cudaStream_t stream);

// The row instructions of a stage for each node. See step_rows.cu for what they compute.
struct StepRowsArgs {
  DType dtype;
  int64_t nodes, count, scratch;       // N, of instructions, floats per node
  const RowInstruction* instructions;  // in the device's memory, as are the addresses in them
  const int64_t* positions;            // (N,)
  const int64_t* tokens;               // (N,)
  const int64_t* length;               // (1,): node n is in slot length + n
  float* memory;  // (N, scratch) where a node's is larger than kMaxSharedScratch, else null
};
cudaError_t step_rows_cuda(const StepRowsArgs& a, cudaStream_t stream);

}  // namespace cerberus
