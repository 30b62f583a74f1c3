// Counter-based noise: Philox4x32-10 (Salmon et al., 2011) and the Gumbel noise made of its words.
#pragma once

#include <cmath>
#include <cstdint>

namespace cerberus {

// The four words of one counter.
struct PhiloxWords {
  uint32_t word[4];
};

__device__ inline PhiloxWords philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * c0, second = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// -log(-log u), u = (word + 0.5) 2^-32.
__device__ inline double gumbel(uint32_t word) { return -log(-log((word + 0.5) * 0x1p-32)); }

// The same to about 1e-6. In float32 the u next to 1 would round to 1 and give infinite noise, so for those
// the small 1 - u = (~word + 0.5) 2^-32 is what is computed with.
__device__ inline float gumbel_estimate(uint32_t word) {
  const float minus_log_u = word < 0x80000000u ? -logf((static_cast<float>(word) + 0.5f) * 0x1p-32f)
                                               : -log1pf(-(static_cast<float>(~word) + 0.5f) * 0x1p-32f);
  return -logf(minus_log_u);
}

}  // namespace cerberus
