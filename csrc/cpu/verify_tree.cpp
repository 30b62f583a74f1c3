// The longest path of nodes that the target model agrees with. A task owns a row; one pass, parents come
// before children.
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {
namespace {

int64_t node_depth(const VerifyTreeArgs& a, int64_t node) {
  int64_t count = -1;
  for (int64_t word = 0; word < a.words; ++word)
    count += __builtin_popcountll(static_cast<unsigned long long>(a.ancestors[node * a.words + word]));
  return count;
}

}  // namespace

void verify_tree(const VerifyTreeArgs& a, const Parallel& parallel) {
  parallel_tasks(parallel, a.rows, [&](int64_t row) {
    const int64_t* draft = a.draft + row * a.nodes;
    const int64_t* target = a.target + row * a.nodes;
    Scratch scratch(a.nodes);  // > 0: accepted
    float* accepted = scratch.data;
    accepted[0] = 1;
    int64_t best = 0, best_depth = 0;
    for (int64_t node = 1; node < a.nodes; ++node) {
      const int64_t parent = a.parents[node];
      const bool known =
          parent >= 0 && parent < node;  // values are not checked by the op: never read outside
      accepted[node] = known && accepted[parent] > 0 && draft[node] == target[parent] ? 1 : 0;
      if (!(accepted[node] > 0)) continue;
      const int64_t depth = node_depth(a, node);
      if (depth > best_depth && depth <= a.depth) {
        best = node;
        best_depth = depth;
      }
    }
    int32_t* path = a.path + row * (a.depth + 1);
    for (int64_t j = 0; j <= a.depth; ++j) path[j] = -1;
    int64_t depth = 0;
    for (int64_t node = 0; node <= best && depth <= a.depth; ++node)
      if (static_cast<uint64_t>(a.ancestors[best * a.words + node / 64]) >> (node % 64) & 1u)
        path[depth++] = static_cast<int32_t>(node);
    a.accepted[row] = static_cast<int32_t>(best_depth);
  });
}

}  // namespace cerberus::CERBERUS_ISA
