// Packs weights in blocks of one kind, and says how many bytes that takes.
#include "cpu/pack_blocks.h"

#include "cpu/byte_weights.h"
#include "cpu/four_bits.h"
#include "cpu/kernels.h"

namespace cerberus::CERBERUS_ISA {
namespace {

// 0: this level has no such kind.
int64_t tile_bytes(Packing packing, int64_t size) {
  if (packing == Packing::kFourBits) return four_bit_tile_bytes(size);
  if (packing == Packing::kBytes) return byte_tile_bytes(size);
  return 0;
}

}  // namespace

int64_t block_bytes(Packing packing, int64_t rows, int64_t size) {
  if (size % kBlock) return 0;
  if (packing == Packing::kBytes)
    return byte_tiles_bytes(rows, size) + 2 * packed_elements(DType::kBFloat16, rows, size);
  return (rows + kPackedWeights - 1) / kPackedWeights * tile_bytes(packing, size);
}

void pack_blocks(const PackBlocksArgs& a, const Parallel& parallel) {
  const BFloat16* weight = static_cast<const BFloat16*>(a.weight);
  char* packed = static_cast<char*>(a.packed);
  const int64_t tile = tile_bytes(a.packing, a.size);
  const auto pack_row = a.packing == Packing::kBytes ? pack_in_bytes : pack_in_four_bits;
  if (a.first == 0)  // the last tile may have rows that nothing is copied to
    __builtin_memset(packed + (a.all - 1) / kPackedWeights * tile, 0, static_cast<size_t>(tile));
  parallel_tasks(parallel, a.rows, [&](int64_t row) {
    if (__atomic_load_n(a.fits, __ATOMIC_RELAXED) == 0) return;
    if (!pack_row(weight + row * a.size, a.size, a.first + row, packed))
      __atomic_store_n(a.fits, 0, __ATOMIC_RELAXED);
  });
  if (a.packing == Packing::kBytes && *a.fits != 0)
    pack_weights({DType::kBFloat16, a.rows, a.size, a.first, a.all, a.weight,
                  packed + byte_tiles_bytes(a.all, a.size)},
                 parallel);
}

}  // namespace cerberus::CERBERUS_ISA
