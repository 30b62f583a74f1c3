#include "cpu/ranked.h"

#include <algorithm>
#include <cmath>

namespace cerberus {

void rank(Ranked* elements, int64_t size, int64_t count) {
  const auto before = [](const Ranked& a, const Ranked& b) {
    return a.value > b.value || (std::isnan(a.value) && !std::isnan(b.value));
  };
  // Equal elements lie as the algorithms of the standard library leave them, so these are torch's, and so is
  // the limit between them (test_step.py compares).
  Ranked *last = elements + count, *end = elements + size;
  if (count * 64 <= size) {
    std::partial_sort(elements, last, end, before);
  } else {
    std::nth_element(elements, last - 1, end, before);
    std::sort(elements, last - 1, before);
  }
}

}  // namespace cerberus
