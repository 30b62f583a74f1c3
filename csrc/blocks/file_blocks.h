// Blocks of weights as ggml's files have them, and the float32 numbers that they stand for: those of gguf's
// Python package, to the bit.
#pragma once

#include <cstdint>

namespace cerberus {

// By their numbers in a file.
enum class FileBlocks : int64_t {
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ4_K = 12,
  kQ6_K = 14
};

// Of one block.
struct BlockSize {
  int64_t weights, bytes;
};

// Zeros: no kind that is known here.
BlockSize block_size(FileBlocks kind);

// So many blocks, one behind the other.
void dequantize(FileBlocks kind, const uint8_t* blocks, int64_t count, float* weights);

}  // namespace cerberus
