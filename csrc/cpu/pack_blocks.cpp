// Packs weights in blocks of one kind, and says how many bytes that takes.
#include "cpu/pack_blocks.h"

#include "cpu/byte_weights.h"
#include "cpu/few_bits.h"
#include "cpu/kernels.h"

namespace cerberus::CERBERUS_ISA {
namespace {

// 0: this level has no such kind.
int64_t tile_bytes(Packing packing, int64_t size) {
  if (few_bits(packing)) return few_bit_tile_bytes(few_bits(packing), size);
  return is_bytes(packing) ? byte_tile_bytes(packing, size) : 0;
}

}  // namespace

int64_t block_bytes(Packing packing, int64_t rows, int64_t size) {
  if (size % kBlock) return 0;
  if (is_bytes(packing))
    return byte_tiles_bytes(packing, rows, size) + 2 * packed_elements(DType::kBFloat16, rows, size);
  return (rows + kPackedWeights - 1) / kPackedWeights * tile_bytes(packing, size);
}

void pack_blocks(const PackBlocksArgs& a, const Parallel& parallel) {
  const BFloat16* weight = static_cast<const BFloat16*>(a.weight);
  char* packed = static_cast<char*>(a.packed);
  const int64_t tile = tile_bytes(a.packing, a.size);
  const auto pack_row = a.packing == Packing::kFourBits   ? pack_in_few_bits<4>
                        : a.packing == Packing::kFiveBits ? pack_in_few_bits<5>
                        : a.packing == Packing::kBytes    ? pack_in_bytes<Packing::kBytes>
                                                          : pack_in_bytes<Packing::kBytesOf16>;
  if (a.first == 0)  // the last tile may have rows that nothing is copied to
    __builtin_memset(packed + (a.all - 1) / kPackedWeights * tile, 0, static_cast<size_t>(tile));
  // A tile is one thread's: its rows may share words.
  const int64_t first_tile = a.first / kPackedWeights, end = a.first + a.rows;
  parallel_tasks(parallel, (end + kPackedWeights - 1) / kPackedWeights - first_tile, [&](int64_t i) {
    const int64_t begin = (first_tile + i) * kPackedWeights;
    for (int64_t row = larger(a.first, begin); row < smaller(end, begin + kPackedWeights); ++row) {
      if (__atomic_load_n(a.fits, __ATOMIC_RELAXED) == 0) return;
      if (!pack_row(weight + (row - a.first) * a.size, a.size, row, packed))
        __atomic_store_n(a.fits, 0, __ATOMIC_RELAXED);
    }
  });
  if (is_bytes(a.packing) && *a.fits != 0)
    pack_weights({DType::kBFloat16, a.rows, a.size, a.first, a.all, a.weight,
                  packed + byte_tiles_bytes(a.packing, a.all, a.size)},
                 parallel);
}

}  // namespace cerberus::CERBERUS_ISA
