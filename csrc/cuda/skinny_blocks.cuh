// Products of weights in blocks (blocks/device_blocks.h): skinny.cuh with another way for the weights to come
// to the lanes. What a lane gets of a chunk are the bfloat16 weights that the model has, in the same order,
// so that the sums are those of the dense product, to the last bit.
//
// A chunk, 32 columns of a tile, lies in one piece: a warp copies it 16 bytes a lane. In four bits that is
// 384 bytes instead of 1 KiB, hence more stages: 61 KB of a multiprocessor are on their way while a chunk is
// waited for. A weight takes three instructions, of bytes four.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "blocks/device_blocks.h"
#include "copy.cuh"
#include "reduce.cuh"
#include "skinny.cuh"
#include "skinny_split.cuh"
#include "skinny_weights.cuh"

namespace cerberus {

// Where the chunks of a tile begin.
struct WeightBlocks {
  const char* chunk;
  bool exist;  // else they are zeros, and nothing is read
};

// 8 weights of a row, rounded: weight(word, i) of byte i of the words for even and for odd columns.
template <typename F>
__device__ inline Pack<bf16, 8> pack_weights(uint32_t even, uint32_t odd, F weight) {
  uint32_t pairs[4];
#pragma unroll
  for (unsigned i = 0; i < 4; ++i) pairs[i] = pack2<bf16>(weight(even, i), weight(odd, i));
  Pack<bf16, 8> weights;
  std::memcpy(&weights.bits, pairs, sizeof(pairs));
  return weights;
}

// The lane's weights of a chunk, for each kind of block.
template <Packing kPacking>
struct BlockFormat {
  static constexpr DeviceChunk kChunk = device_chunk(kPacking);

  __device__ static WeightPair<bf16, 8> weights(const char* chunk) {
    if constexpr (kPacking == Packing::kBytes || kPacking == Packing::kBytesOf16) {
      const uint4 codes = reinterpret_cast<const uint4*>(chunk)[lane_index()];
      const int half = kPacking == Packing::kBytesOf16 ? lane_index() % 4 / 2 : 0;
      const float2 d = reinterpret_cast<const float2*>(chunk + kChunk.scales)[half * 8 + lane_index() / 4];
      return {bytes(codes.x, codes.y, d.x), bytes(codes.z, codes.w, d.y)};
    } else {
      const uint2 codes = reinterpret_cast<const uint2*>(chunk)[lane_index()];
      uint32_t high = 0;
      if constexpr (kPacking == Packing::kFiveBits)
        high = reinterpret_cast<const uint16_t*>(chunk + kChunk.high)[lane_index()];
      const float4 scales = reinterpret_cast<const float4*>(chunk + kChunk.scales)[lane_index() / 4];
      return {few_bits(codes.x, high, scales.x, scales.y), few_bits(codes.y, high >> 8, scales.z, scales.w)};
    }
  }

 private:
  // A byte becomes bits 16 to 23 of 32 + q.
  __device__ static Pack<bf16, 8> few_bits(uint32_t low, uint32_t high, float d, float m) {
    uint32_t even = low << 2 & 0x3c3c3c3c, odd = low >> 2 & 0x3c3c3c3c;
    if constexpr (kPacking == Packing::kFiveBits) {
      even |= sixth(high & 15);
      odd |= sixth(high >> 4 & 15);
    }
    const uint32_t upper = in_register(float_bits(float{kFewBitsFrom}));
    return pack_weights(even, odd, [=](uint32_t word, unsigned i) {
      return fmaf(d, float_of_bits(__byte_perm(word, upper, 0x7044 | i << 8)), m);
    });
  }
  // Four bits, each bit 6 of a byte: the product has each of them at every seventh bit.
  __device__ static uint32_t sixth(uint32_t bits) { return bits * 0x08102040 & 0x40404040; }

  // A byte becomes the lowest bits of 2^23, to which it adds itself, q + 128.
  __device__ static Pack<bf16, 8> bytes(uint32_t even, uint32_t odd, float d) {
    const uint32_t upper = in_register(float_bits(0x1p23f));
    return pack_weights(even, odd, [=](uint32_t word, unsigned i) {
      const float x = float_of_bits(__byte_perm(word, upper, 0x7440 | i));
      return d * (x - (0x1p23f + 128));
    });
  }
};

// The chunks of a warp in the order of its walk, as WeightRing. A lane reads what others have copied: when
// all lanes have waited for their part of a chunk, they have also read the chunk before it, whose place is
// filled again then.
template <typename Product, typename Work>
class BlockRing {
 public:
  __device__ BlockRing(const WarpSlice& slice, const Work& work)
      : slice_(slice),
        work_(work),
        slots_(dynamic_shared<char>() + warp_index() * Product::kStages * kBytes),
        place_(work.first()) {
    begin_tile();
#pragma unroll 1
    for (int stage = 0; stage < Product::kStages - 1; ++stage) start(slots_ + stage * kBytes);
  }

  // f(weights, column of the slice) for the chunks of the next tile.
  template <typename F>
  __device__ void for_each_chunk(F f) {
#pragma unroll 1
    for (int column = 0; column < slice_.size; column += Product::kChunk) {
      wait_for_copies<Product::kStages - 2>();
      warp_barrier();
      start(slots_ + (next_ == 0 ? kLast : next_ - kBytes));
      f(Product::Format::weights(slots_ + next_), column);
      next_ = next_ == kLast ? 0 : next_ + kBytes;
    }
  }

  __device__ void finish() const { wait_for_copies<0>(); }

 private:
  static constexpr int kBytes = Product::Format::kChunk.bytes;
  static constexpr int kLast = (Product::kStages - 1) * kBytes;
  static constexpr int kCopy = 16 * kLanes;

  // A group of copies for each chunk, also where nothing is read: the groups are counted.
  __device__ void start(char* slot) {
    const int first = 16 * lane_index();
#pragma unroll
    for (int i = 0; i < kBytes; i += kCopy)
      if (i + kCopy <= kBytes || i + first < kBytes)
        start_copy16(slot + i + first, blocks_.chunk + i + first, blocks_.exist);
    end_copies();
    column_ += Product::kChunk;
    blocks_.chunk += kBytes;
    if (column_ < slice_.size) return;
    if (!work_.is_over(place_)) place_ = work_.after(place_);
    begin_tile();
  }
  __device__ void begin_tile() {
    blocks_ = work_.weights(place_, place_.tile + slice_.tile, slice_.part);
    blocks_.chunk += slice_.lane_begin / Product::kChunk * int64_t{kBytes};
    blocks_.exist = blocks_.exist && slice_.size > 0;
    column_ = 0;
  }

  const WarpSlice& slice_;
  const Work& work_;
  char* const slots_;  // of this warp
  int next_ = 0;       // where the stage is that is multiplied next
  // What is asked for next.
  decltype(static_cast<const Work*>(nullptr)->first()) place_;
  WeightBlocks blocks_;
  int column_;
};

// A product of weights in blocks: one kind, 16 rows of X so many times.
template <Packing kPacking, int kRowTiles>
struct BlockProduct : Product<bf16, 8, kRowTiles> {
  using Format = BlockFormat<kPacking>;
  template <typename Work>
  using Stream = BlockRing<BlockProduct, Work>;
  static constexpr bool kInBlocks = true;
  static constexpr int kStages = 12;
  static constexpr int kRingBytes = kStages * kProductWarps * Format::kChunk.bytes;
  static constexpr int kSharedBytes =
      kRingBytes + BlockProduct::kRows * ProductSplit::kSumsOfRow * static_cast<int>(sizeof(float));
  static_assert(BlockProduct::kChunk == kBlockColumns && kTileRows == kBlockTileRows, "a chunk is a block");
  static_assert(kSharedBytes <= 99 << 10, "what a block may have on the smallest of our devices, 8.6");
};

// f(BlockProduct{}) for the kind and the number of rows of X.
template <typename F>
cudaError_t dispatch_blocks(Packing packing, int64_t x_rows, F&& f) {
  const auto with = [&](auto kind) {
    constexpr Packing kPacking = decltype(kind)::value;
    if (x_rows > 32) return f(BlockProduct<kPacking, 4>{});
    if (x_rows > 16) return f(BlockProduct<kPacking, 2>{});
    return f(BlockProduct<kPacking, 1>{});
  };
  switch (packing) {
    case Packing::kFourBits:
      return with(std::integral_constant<Packing, Packing::kFourBits>{});
    case Packing::kFiveBits:
      return with(std::integral_constant<Packing, Packing::kFiveBits>{});
    case Packing::kBytes:
      return with(std::integral_constant<Packing, Packing::kBytes>{});
    case Packing::kBytesOf16:
      return with(std::integral_constant<Packing, Packing::kBytesOf16>{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace cerberus
