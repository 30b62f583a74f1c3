// Registers what makes numbers of a file's blocks. CPU only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "blocks/file_blocks.h"
#include "check.h"
#include "cpu/team.h"

namespace cerberus {
namespace {

constexpr int64_t kBlocksOfTask = 1024;

void dequantize_blocks(Tensor blocks, int64_t kind, Tensor weights) {
  Check check("dequantize_blocks");
  const BlockSize size = block_size(static_cast<FileBlocks>(kind));
  check.that(size.bytes > 0, "kind", "2, 3, 6, 7, 8, 12 or 14", kind);
  check.integer(blocks, "blocks", 2, "(R, n)", ScalarType::Byte);
  check.on_cpu(blocks, "blocks");
  const int64_t rows = blocks.size(0), of_row = blocks.size(1) / size.bytes;
  check.that(blocks.size(1) % size.bytes == 0, "blocks",
             "(R, n) with n a multiple of " + std::to_string(size.bytes), blocks.size(1));
  check.floating(weights, "weights", 2, "(R, I)");
  check.sizes(weights, "weights", "(R, I)", {rows, of_row * size.weights});
  if (weights.scalar_type() != ScalarType::Float)
    check.fail("weights", "torch.float32", dtype_text(weights.scalar_type()));

  struct Work {
    FileBlocks kind;
    BlockSize size;
    const uint8_t* blocks;
    float* weights;
    int64_t count;
  };
  const Work work{static_cast<FileBlocks>(kind), size, static_cast<const uint8_t*>(blocks.const_data_ptr()),
                  static_cast<float*>(weights.mutable_data_ptr()), rows * of_row};
  const auto body = [](const void* state, int64_t task) {
    const Work& w = *static_cast<const Work*>(state);
    const int64_t first = task * kBlocksOfTask, count = std::min(w.count - first, kBlocksOfTask);
    dequantize(w.kind, w.blocks + first * w.size.bytes, count, w.weights + first * w.size.weights);
  };
  team(torch::stable::get_num_threads()).run((work.count + kBlocksOfTask - 1) / kBlocksOfTask, body, &work);
}

}  // namespace
}  // namespace cerberus

STABLE_TORCH_LIBRARY_FRAGMENT(cerberus_ext, m) {
  m.def("dequantize_blocks(Tensor blocks, int kind, Tensor(a!) weights) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cerberus_ext, CompositeExplicitAutograd, m) {
  m.impl("dequantize_blocks", TORCH_BOX(&cerberus::dequantize_blocks));
}
