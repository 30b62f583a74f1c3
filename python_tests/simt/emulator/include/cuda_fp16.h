// Stand-in for the toolkit's header of this name: the type and its conversions, which round to nearest, ties
// to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31,
                 fraction = x.bits & 0x3ff;
  uint32_t bits;
  if (exponent == 0) {  // 0 or subnormal: a multiple of 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
  } else if (exponent == 31) {  // infinity or not a number
    bits = 0x7f800000 | fraction << 13;
  } else {
    bits = (exponent + 112) << 23 | fraction << 13;
  }
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline __half __float2half_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint16_t magnitude;
  if (bits > 0x7f800000) {
    return {0x7fff};  // not a number
  } else if (bits >= 0x477ff000) {
    magnitude = 0x7c00;  // 65520 and more round to infinity
  } else if (bits < 0x38800000) {
    magnitude =
        static_cast<uint16_t>(std::lrint(std::fabs(x) * 0x1p24f));  // below 2^-14: a multiple of 2^-24
  } else {
    magnitude = static_cast<uint16_t>((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
  }
  return {static_cast<uint16_t>(sign | magnitude)};
}
