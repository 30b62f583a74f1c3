// A hash table of ids whose keys are kept elsewhere: 4 bytes a slot, open addressing, linear probing. Ids are
// never removed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace cerberus::search {

constexpr uint32_t kNone = UINT32_MAX;  // no id

// Mixes a key of two numbers, so that the upper half of the result serves as a hash.
inline uint64_t hash_of(uint32_t a, uint32_t b) {
  uint64_t x = (uint64_t{a} << 32 | b) + 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 32) * 0xd6e8feb86659fd93u;
  return (x ^ x >> 32) * 0xd6e8feb86659fd93u;
}

class IdTable {
 public:
  // The id with this hash for which `is_it(id)` is true, or kNone.
  template <typename IsIt>
  uint32_t find(uint64_t hash, IsIt is_it) const {
    return slots_[position(hash, is_it)];
  }

  // Its slot; without such an id the free slot, which holds kNone, where it may be put once room for it has
  // been reserved. Valid until the next `reserve`.
  template <typename IsIt>
  uint32_t& slot(uint64_t hash, IsIt is_it) {
    return slots_[position(hash, is_it)];
  }

  // Makes room for `ids` ids in all; `hash` gives the hash of an id that is in the table.
  template <typename Hash>
  void reserve(size_t ids, Hash hash) {
    if (ids <= slots_.size() / kOfSlots * kOfIds) return;
    std::vector<uint32_t> more(
        std::max(slots_.size() + slots_.size() / 2, ids / kOfIds * kOfSlots + kOfSlots), kNone);
    more.swap(slots_);
    for (const uint32_t id : more) {
      if (id != kNone) slot(hash(id), [](uint32_t) { return false; }) = id;
    }
  }

  size_t bytes() const { return slots_.capacity() * sizeof(uint32_t); }

 private:
  static constexpr size_t kOfIds = 5, kOfSlots = 7;  // at most 5 of 7 slots are taken, so a search ends soon

  template <typename IsIt>
  size_t position(uint64_t hash, IsIt is_it) const {
    size_t i = (hash >> 32) * slots_.size() >> 32;
    while (slots_[i] != kNone && !is_it(slots_[i])) i = i + 1 == slots_.size() ? 0 : i + 1;
    return i;
  }

  std::vector<uint32_t> slots_ = std::vector<uint32_t>(kOfSlots, kNone);
};

}  // namespace cerberus::search
