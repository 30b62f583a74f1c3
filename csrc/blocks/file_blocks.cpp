// A weight is d q or d q + m; of the kinds of 256 weights d and m are float16 numbers times small integers.
//
// Every product but those of Q6_K is exact in float32, so that each weight is rounded once whatever the
// compiler makes of d q + m.
#include "blocks/file_blocks.h"

#include <cstring>

namespace cerberus {
namespace {

// Two bytes of a float16.
float float16_at(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, sizeof(half));
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31,
                 fraction = half & 0x3ff;
  uint32_t bits;
  if (exponent == 0) {  // 0 or subnormal: fraction / 2^24, exactly
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    std::memcpy(&bits, &value, sizeof(bits));
  } else {
    bits = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// 32 weights d (q - kFrom) + m. q: their lowest four bits in 16 bytes, in the lower halves those of the first
// 16 weights; where kHasHigh, the fifth ones in four bytes, in order.
template <bool kHasMin, bool kHasHigh>
void block_of_32(const uint8_t* block, float* to) {
  constexpr int kFrom = kHasMin ? 0 : kHasHigh ? 16 : 8;
  const float d = float16_at(block), m = kHasMin ? float16_at(block + 2) : 0;
  const uint8_t* low = block + (kHasMin ? 4 : 2);
  uint32_t high = 0;
  if (kHasHigh) {
    std::memcpy(&high, low, sizeof(high));
    low += sizeof(high);
  }
  for (int i = 0; i < 16; ++i) {
    int first = low[i] & 15, second = low[i] >> 4;
    if (kHasHigh) {
      first |= (high >> i & 1) << 4;
      second |= (high >> (i + 16) & 1) << 4;
    }
    const float x = d * static_cast<float>(first - kFrom), y = d * static_cast<float>(second - kFrom);
    to[i] = kHasMin ? x + m : x;
    to[i + 16] = kHasMin ? y + m : y;
  }
}

// d, then 32 q of eight bits.
void q8_0(const uint8_t* block, float* to) {
  const float d = float16_at(block);
  for (int i = 0; i < 32; ++i) to[i] = static_cast<float>(static_cast<int8_t>(block[2 + i])) * d;
}

// d and its least, then for each of eight parts of 32 weights six bits of each one's factor, in 12 bytes;
// then q: a byte has those of two parts.
void q4_k(const uint8_t* block, float* to) {
  const float d = float16_at(block), least = float16_at(block + 2);
  const uint8_t *scales = block + 4, *q = block + 16;
  for (int part = 0; part < 8; ++part) {
    const int i = part % 4;
    const int factor = part < 4 ? scales[i] & 63 : (scales[8 + i] & 15) | (scales[i] >> 2 & 48);
    const int other = part < 4 ? scales[4 + i] & 63 : scales[8 + i] >> 4 | (scales[4 + i] >> 2 & 48);
    const float scale = d * static_cast<float>(factor), m = least * static_cast<float>(other);
    const uint8_t* codes = q + part / 2 * 32;
    for (int j = 0; j < 32; ++j)
      to[part * 32 + j] = scale * static_cast<float>(codes[j] >> part % 2 * 4 & 15) - m;
  }
}

// Of 256 q the lowest four bits in 128 bytes and the others in 64; a factor of eight bits for every 16; d.
void q6_k(const uint8_t* block, float* to) {
  const uint8_t *low = block, *high = block + 128, *factors = block + 192;
  const float d = float16_at(block + 208);
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, row = i % 128 / 32, column = i % 32;
    const int lowest = low[half * 64 + row % 2 * 32 + column] >> row / 2 * 4 & 15;
    const int q = (lowest | (high[half * 32 + column] >> row * 2 & 3) << 4) - 32;
    const float scale = d * static_cast<float>(static_cast<int8_t>(factors[i / 16]));
    to[i] = scale * static_cast<float>(q);
  }
}

}  // namespace

BlockSize block_size(FileBlocks kind) {
  switch (kind) {
    case FileBlocks::kQ4_0:
      return {32, 18};
    case FileBlocks::kQ4_1:
      return {32, 20};
    case FileBlocks::kQ5_0:
      return {32, 22};
    case FileBlocks::kQ5_1:
      return {32, 24};
    case FileBlocks::kQ8_0:
      return {32, 34};
    case FileBlocks::kQ4_K:
      return {256, 144};
    case FileBlocks::kQ6_K:
      return {256, 210};
  }
  return {0, 0};
}

void dequantize(FileBlocks kind, const uint8_t* blocks, int64_t count, float* weights) {
  const BlockSize size = block_size(kind);
  const auto each = [&](auto body) {
    for (int64_t i = 0; i < count; ++i) body(blocks + i * size.bytes, weights + i * size.weights);
  };
  switch (kind) {
    case FileBlocks::kQ4_0:
      return each(block_of_32<false, false>);
    case FileBlocks::kQ4_1:
      return each(block_of_32<true, false>);
    case FileBlocks::kQ5_0:
      return each(block_of_32<false, true>);
    case FileBlocks::kQ5_1:
      return each(block_of_32<true, true>);
    case FileBlocks::kQ8_0:
      return each(q8_0);
    case FileBlocks::kQ4_K:
      return each(q4_k);
    case FileBlocks::kQ6_K:
      return each(q6_k);
  }
}

}  // namespace cerberus
