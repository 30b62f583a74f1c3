// The CPU kernels, below the choice of the instruction set. No torch.
#pragma once

#include <string>

#include "args.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace cerberus {

// void <op>_cpu(const <Op>Args&, const Parallel&) of every op.
#define CERBERUS_DECLARE(name, Name, schema) \
  void name##_cpu(const Name##Args& args, const Parallel& parallel);
CERBERUS_OPS(CERBERUS_DECLARE)
#undef CERBERUS_DECLARE

// Of steps: the attention of several texts; the row instructions; a product whose `weight` is packed, to the
// bits of linear; packing, and how many elements that takes. 0: this level has no packed products, and the
// other two are not to be called.
void tree_attentions_cpu(const TreeAttentionsArgs& args, const Parallel& parallel);
void rows_cpu(const RowsArgs& args, const Parallel& parallel);
void packed_linear_cpu(const LinearArgs& args, const Parallel& parallel);
void pack_weights_cpu(const PackWeightsArgs& args, const Parallel& parallel);
int64_t packed_elements_cpu(DType dtype, int64_t rows, int64_t size);

// The same for bfloat16 weights in blocks of fewer bits, where they can be given so to the bit. 0 bytes: this
// level, or such a size, has none of that packing.
void block_linear_cpu(const LinearArgs& args, Packing packing, const Parallel& parallel);
void pack_blocks_cpu(const PackBlocksArgs& args, const Parallel& parallel);
int64_t block_bytes_cpu(Packing packing, int64_t rows, int64_t size);

// The same for the CUDA kernels, into zeros, of all rows at once: blocks/device_blocks.h. Whether this
// processor can, whatever the level is.
bool packs_device_blocks();
void pack_device_blocks_cpu(const PackBlocksArgs& args, const Parallel& parallel);

// What drafts depend on, in eight bits, which every level has: a product with them, packing, how many bytes
// that takes; and the heads' drafts by such weights.
void eight_bit_linear_cpu(const LinearArgs& args, const Parallel& parallel);
void pack_eight_bits_cpu(const PackEightBitsArgs& args, const Parallel& parallel);
int64_t eight_bit_bytes_cpu(int64_t rows, int64_t size);
void draft_cpu(const DraftArgs& args, const Parallel& parallel);

// Asks the system for pages of 2 MiB under the memory: translating addresses of 4 KiB pages costs a virtual
// machine a third of its bandwidth. What has been written to already is moved there at once, where the system
// can do so.
void prefer_large_pages_cpu(void* memory, int64_t bytes);

// Into how many parts draft_topk splits a vocabulary of that size: by the size alone, so that a row's bits
// depend neither on the other rows nor on the number of threads.
int64_t draft_topk_parts_cpu(int64_t vocab);

// The level of the instruction set that the kernels use: the best one of this CPU, or CERBERUS_ISA where
// that is set. Throws std::runtime_error if CERBERUS_ISA names none that runs here.
std::string cpu_isa();

}  // namespace cerberus
