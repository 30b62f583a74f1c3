// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011. Random words by number,
// no state.
#pragma once

#include <cstdint>

namespace cerberus::CERBERUS_ISA {

// words = Philox(counter = (block, low position, high position, 0), key = (low seed, high seed))
static inline void philox(uint64_t seed, uint64_t position, uint32_t block, uint32_t (&words)[4]) {
  uint32_t c0 = block, c1 = static_cast<uint32_t>(position), c2 = static_cast<uint32_t>(position >> 32),
           c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = 0xD2511F53ull * c0, second = 0xCD9E8D57ull * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

}  // namespace cerberus::CERBERUS_ISA
