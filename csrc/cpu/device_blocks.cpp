// Packs weights for the CUDA kernels, see blocks/device_blocks.h: d, m and q as they are found for this
// processor's own products, and again a comparison of every weight with what the kernels will make of it.
#include "blocks/device_blocks.h"

#include "cpu/byte_weights.h"
#include "cpu/few_bits.h"
#include "cpu/kernels.h"

namespace cerberus::CERBERUS_ISA {
namespace {

// A step of one weight row, as its codes are in a chunk: of bytes q + 128, else q.
struct Codes {
  uint8_t of[kBlock];
};

// One weight row in a tile of its own, packed for this processor.
template <Packing kPacking>
class PackedRow {
  static constexpr int kBits = few_bits(kPacking);

 public:
  explicit PackedRow(int64_t size)
      : size_(size), tile_(kBits ? few_bit_tile_bytes(kBits, size) : byte_tile_bytes(kPacking, size)) {}

  bool pack(const BFloat16* weight) {
    if constexpr (kBits == 0) return pack_in_bytes<kPacking>(weight, size_, 0, tile_.data);
    if constexpr (kBits != 0) return pack_in_few_bits<kBits>(weight, size_, 0, tile_.data);
  }

  Codes codes(int64_t step) const {
    Codes codes;
    for (int i = 0; i < kBlock / 2; ++i) {
      uint32_t even, odd;
      if constexpr (kBits == 0) {
        const char* q = tile_.data + step * kPackedWeights * kBlock;
        constexpr bool kInPairs = ByteWeights<Row<BFloat16>, kPacking>::kInPairs;
        even = static_cast<uint8_t>(q[kInPairs ? i : 2 * i] + 128);
        odd = static_cast<uint8_t>(q[kInPairs ? i + kBlock / 2 : 2 * i + 1] + 128);
      } else if constexpr (kBits == 5) {
        uint32_t both;
        __builtin_memcpy(&both, tile_.data + step * 64 + 4 * i, sizeof(both));
        even = both & 31;
        odd = both >> 5 & 31;
      } else {
        const uint8_t both = static_cast<uint8_t>(tile_.data[four_bit_code_place(step, 0) + 4 * i]);
        even = both & 15;
        odd = both >> 4;
      }
      codes.of[2 * i] = static_cast<uint8_t>(even);
      codes.of[2 * i + 1] = static_cast<uint8_t>(odd);
    }
    return codes;
  }
  // d, or both of them, of bytes; d and m of few bits.
  void scales(int64_t step, float (&to)[2]) const {
    constexpr int kScales = kBits == 0 ? byte_scales(kPacking) : 2;
    const int64_t codes = kBits == 0 ? byte_code_bytes(size_) : few_bit_code_bytes(kBits, size_);
    to[1] = 0;
    __builtin_memcpy(to, tile_.data + codes + step * kPackedWeights * kScales * sizeof(float),
                     kScales * sizeof(float));
  }

 private:
  int64_t size_;
  Buffer<char> tile_;
};

// Whether the kernels make these weights: by the same arithmetic.
template <Packing kPacking>
bool are_made(const BFloat16* weight, const Codes& codes, const float (&scales)[2]) {
  for (int i = 0; i < kBlock; ++i) {
    float made;
    if constexpr (few_bits(kPacking) != 0) {
      made = __builtin_fmaf(scales[0], static_cast<float>(kFewBitsFrom + codes.of[i]), scales[1]);
    } else {
      made = scales[byte_scales(kPacking) == 2 ? i / 16 : 0] * static_cast<float>(codes.of[i] - 128);
    }
    BFloat16 rounded;
    from_float(made, rounded);
    const bool are_zeros = few_bits(kPacking) != 0 && ((rounded.bits | weight[i].bits) & 0x7fff) == 0;
    if (rounded.bits != weight[i].bits && !are_zeros) return false;
  }
  return true;
}

// Finds d and m as they are packed, of few bits, and whether the kernels make the weights of them. Those that
// this processor found count q from the middle; of the packed m, which is larger, float32 has fewer numbers:
// too few for a weight that is nearly nothing. So some d beside that one are tried, each of them with the m
// nearest to what leaves this weight as it is.
template <Packing kPacking>
bool find_scales(const BFloat16* weight, const Codes& codes, float (&scales)[2]) {
  if constexpr (few_bits(kPacking) == 0) return are_made<kPacking>(weight, codes, scales);
  constexpr int kTries = 64, kMiddle = kPacking == Packing::kFiveBits ? 16 : 8;
  int least = 0;
  for (int i = 1; i < kBlock; ++i)
    if ((weight[i].bits & 0x7fff) < (weight[least].bits & 0x7fff)) least = i;
  const double q = codes.of[least], value = scales[1] + scales[0] * (q - kMiddle);
  const uint32_t first = (bit_cast<uint32_t>(scales[0]) + 4) & ~7u;  // of which float32 has every multiple
  for (int i = 0; i < kTries; ++i) {
    scales[0] = bit_cast<float>(first + (i % 2 ? i / 2 + 1 : -i / 2));
    scales[1] = static_cast<float>(value - scales[0] * (q + kFewBitsFrom));
    if (are_made<kPacking>(weight, codes, scales)) return true;
  }
  return false;
}

// Row `row` of a chunk.
template <Packing kPacking>
void put(const Codes& codes, const float (&scales)[2], int row, char* chunk) {
  constexpr DeviceChunk kChunk = device_chunk(kPacking);
  constexpr int kBits = few_bits(kPacking);
  const int g = row % 8, is_second = row / 8;
  for (int t = 0; t < 4; ++t) {
    const uint8_t* q = codes.of + 8 * t;
    const int lane = 4 * g + t;
    if constexpr (kBits != 0) {
      uint8_t* low = reinterpret_cast<uint8_t*>(chunk) + 8 * lane + 4 * is_second;
      for (int i = 0; i < 4; ++i) low[i] = static_cast<uint8_t>((q[2 * i] & 15) | (q[2 * i + 1] & 15) << 4);
      if constexpr (kBits == 5) {
        int high = 0;
        for (int i = 0; i < 4; ++i) high |= q[2 * i] >> 4 << i | q[2 * i + 1] >> 4 << (4 + i);
        chunk[kChunk.high + 2 * lane + is_second] = static_cast<char>(high);
      }
    } else {
      uint8_t* to = reinterpret_cast<uint8_t*>(chunk) + 16 * lane + 8 * is_second;
      for (int i = 0; i < 8; ++i) to[i / 2 + i % 2 * 4] = q[i];
    }
  }
  if constexpr (kBits != 0) {
    __builtin_memcpy(chunk + kChunk.scales + 16 * g + 8 * is_second, scales, sizeof(scales));
  } else {
    for (int half = 0; half < byte_scales(kPacking); ++half)
      __builtin_memcpy(chunk + kChunk.scales + 64 * half + 8 * g + 4 * is_second, scales + half,
                       sizeof(float));
  }
}

// The rows of one tile. Returns whether all weights are given to the bit.
template <Packing kPacking>
bool pack_tile(const PackBlocksArgs& a, int64_t tile) {
  constexpr int kChunkBytes = device_chunk(kPacking).bytes;
  const int64_t first = tile * kBlockTileRows, rows = smaller(kBlockTileRows, a.rows - first);
  const BFloat16* weight = static_cast<const BFloat16*>(a.weight) + first * a.size;
  const int64_t steps = a.size / kBlock;
  char* chunks = static_cast<char*>(a.packed) + tile * steps * kChunkBytes;
  PackedRow<kPacking> own(a.size);
  for (int64_t row = 0; row < rows; ++row, weight += a.size) {
    if (!own.pack(weight)) return false;
    for (int64_t step = 0; step < steps; ++step) {
      const Codes codes = own.codes(step);
      float scales[2];
      own.scales(step, scales);
      if (!find_scales<kPacking>(weight + step * kBlock, codes, scales)) return false;
      put<kPacking>(codes, scales, static_cast<int>(row), chunks + step * kChunkBytes);
    }
  }
  return true;
}

}  // namespace

void pack_device_blocks(const PackBlocksArgs& a, const Parallel& parallel) {
  const auto pack = a.packing == Packing::kFourBits   ? pack_tile<Packing::kFourBits>
                    : a.packing == Packing::kFiveBits ? pack_tile<Packing::kFiveBits>
                    : a.packing == Packing::kBytes    ? pack_tile<Packing::kBytes>
                                                      : pack_tile<Packing::kBytesOf16>;
  parallel_tasks(parallel, (a.rows + kBlockTileRows - 1) / kBlockTileRows, [&](int64_t tile) {
    if (__atomic_load_n(a.fits, __ATOMIC_RELAXED) != 0 && !pack(a, tile))
      __atomic_store_n(a.fits, 0, __ATOMIC_RELAXED);
  });
}

}  // namespace cerberus::CERBERUS_ISA
