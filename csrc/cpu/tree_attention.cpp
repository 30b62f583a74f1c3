// softmax(score) v of every node over the committed slots and its ancestors, as online softmax over blocks of
// keys. score: scale q k, or softcap tanh(scale q k / softcap).
//
// A node's keys are taken in order of absolute position, in blocks of 64 positions counted from position 0,
// wherever in the cache they lie: a token gets the same bits as a node of a tree and as an autoregressive
// step. A sink comes before all of them. A task owns some queries of one row and one key/value head, and
// takes each block once for all of them.
#include "cpu/kernels.h"
#include "cpu/tanh.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int kBlock = 64;
constexpr int64_t kQueriesPerTask = 24;
// Queries that are computed side by side, in registers: kTogether x kKeys keys, then kTogether x 4 vectors of
// values.
constexpr int kTogether = 3, kKeys = 4;
constexpr float kNothing = -__builtin_inff();  // the score of what is not seen

// The keys of one block that some nodes see, in order of position, filled up to a multiple of kKeys with any
// key.
template <typename T>
struct Block {
  const T* keys[kBlock];
  const T* values[kBlock];
  int count;
};

// One query and its running softmax.
struct Query {
  const float* q;  // (E,)
  float* sum;      // (E,): sum of e^(score - top) v
  float* weight;   // (kBlock,): the scores of this block's keys, then e^(score - top)
  float top, mass, decay;
};

// weight[first + i] = scale q key[first + i]
template <int kQueries, typename T>
void score(const T* const* keys, int first, int64_t size, float scale, Query* queries) {
  Vec sums[kQueries][kKeys] = {};
  // The queries' vectors stay in registers, the keys' come one by one.
  const auto step = [&](const auto& load_at) {
    Vec q[kQueries];
#pragma GCC unroll 4
    for (int j = 0; j < kQueries; ++j) q[j] = load_at(queries[j].q);
#pragma GCC unroll 4
    for (int i = 0; i < kKeys; ++i) {
      const Vec key = load_at(keys[first + i]);
#pragma GCC unroll 4
      for (int j = 0; j < kQueries; ++j) sums[j][i] = multiply_add(q[j], key, sums[j][i]);
    }
  };
  int64_t e = 0;
  for (; e + kLanes <= size; e += kLanes) step([e](const auto* p) { return load(p + e); });
  if (e < size) step([e, size](const auto* p) { return load_part(p + e, size - e); });
#pragma GCC unroll 4
  for (int j = 0; j < kQueries; ++j) {
    float* out = queries[j].weight + first;
    sum_four(sums[j], out);
#pragma GCC unroll 4
    for (int i = 0; i < kKeys; ++i) out[i] *= scale;
  }
}

// Scores to weights; the new maximum, and by how much the sums of the blocks before shrink.
void soften(int count, float softcap, Query& query) {
  if (softcap > 0) {
    for (int key = 0; key < count; key += kLanes)
      store(tanh(load(query.weight + key) / softcap) * softcap, query.weight + key);
  }
  for (int key = count; key < kBlock; ++key) query.weight[key] = kNothing;
  Vec tops = broadcast(query.top);
  for (int key = 0; key < kBlock; key += kLanes) {
    const Vec score = load(query.weight + key);
    tops = select(score > tops, score, tops);
  }
  float top = query.top;
  for (int lane = 0; lane < kLanes; ++lane)
    if (tops[lane] > top) top = tops[lane];
  const float shift = top == kNothing ? 0.0f : top;  // every score is -inf: every weight is 0
  query.decay = exp(query.top - shift);
  Vec mass{};
  for (int key = 0; key < kBlock; key += kLanes) {
    const Vec e = exp(load(query.weight + key) - shift);
    store(e, query.weight + key);
    mass += e;
  }
  query.top = top;
  query.mass = query.mass * query.decay + sum(mass);
}

// sum[e] = sum[e] * decay + weight v[e] for kVectors vectors from e on.
template <int kQueries, int kVectors, typename T>
void weigh(const Block<T>& block, int64_t e, Query* queries) {
  Vec sums[kQueries][kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kQueries; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sums[j][i] = load(queries[j].sum + e + i * kLanes) * queries[j].decay;
  for (int key = 0; key < block.count; ++key) {
    const T* value = block.values[key] + e;
    Vec weights[kQueries];
#pragma GCC unroll 4
    for (int j = 0; j < kQueries; ++j) weights[j] = broadcast(queries[j].weight[key]);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const Vec v = load(value + i * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < kQueries; ++j) sums[j][i] = multiply_add(v, weights[j], sums[j][i]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kQueries; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) store(sums[j][i], queries[j].sum + e + i * kLanes);
}

template <int kQueries, typename T>
void score_all(const Block<T>& block, int64_t size, float scale, Query* queries) {
  for (int key = 0; key < block.count; key += kKeys) score<kQueries>(block.keys, key, size, scale, queries);
}

template <int kQueries, typename T>
void weigh_all(const Block<T>& block, int64_t size, Query* queries) {
  int64_t e = 0;
  for (; e + 4 * kLanes <= size; e += 4 * kLanes) weigh<kQueries, 4>(block, e, queries);
  for (; e + kLanes <= size; e += kLanes) weigh<kQueries, 1>(block, e, queries);
  for (; e < size; ++e) {
    for (int j = 0; j < kQueries; ++j) {
      Vec total = broadcast(queries[j].sum[e] * queries[j].decay);
      for (int key = 0; key < block.count; ++key)
        total =
            multiply_add(broadcast(to_float(block.values[key][e])), broadcast(queries[j].weight[key]), total);
      queries[j].sum[e] = total[0];
    }
  }
}

// Calls body(i, Count<n>) for n queries from i on, kTogether as long as there are so many.
template <typename Body>
void some_together(int64_t count, const Body& body) {
  static_assert(kTogether == 3, "what may be left over");
  int64_t i = 0;
  for (; i + kTogether <= count; i += kTogether) body(i, Count<kTogether>{});
  if (count - i == 2) body(i, Count<2>{});
  if (count - i == 1) body(i, Count<1>{});
}

// One block for all queries that see exactly these keys of it: a few queries side by side, each its own chain
// of operations.
template <typename T>
void attend(const Block<T>& block, const TreeAttentionArgs& a, Query* queries, int64_t count) {
  const int64_t size = a.head_size;
  some_together(count, [&](int64_t i, auto together) {
    score_all<decltype(together)::value>(block, size, a.scale, queries + i);
  });
  for (int64_t i = 0; i < count; ++i) soften(block.count, a.softcap, queries[i]);
  some_together(count, [&](int64_t i, auto together) {
    weigh_all<decltype(together)::value>(block, size, queries + i);
  });
}

// The nodes on the path from the root to `node`, in order; returns how many.
int64_t path_of(const TreeAttentionArgs& a, int64_t node, int32_t* path) {
  int64_t count = 0;
  for (int64_t word = 0; word < a.words; ++word) {
    uint64_t bits = static_cast<uint64_t>(a.ancestors[node * a.words + word]);
    for (; bits; bits &= bits - 1) {
      const int64_t ancestor = word * 64 + __builtin_ctzll(bits);
      if (ancestor < a.nodes) path[count++] = static_cast<int32_t>(ancestor);
    }
  }
  return count;
}

template <typename T>
void run(const TreeAttentionArgs& a, int64_t row, int64_t kv_head, int64_t begin, int64_t end) {
  const int64_t group = a.query_heads / a.kv_heads, size = a.head_size;
  const int64_t length = larger(0, smaller(a.length[row], a.capacity));
  const T* keys = static_cast<const T*>(a.keys) + (row * a.kv_heads + kv_head) * a.capacity * size;
  const T* values = static_cast<const T*>(a.values) + (row * a.kv_heads + kv_head) * a.capacity * size;
  // Query i of this key/value head is node i / group, head i % group of the group.
  const int64_t first_node = begin / group, nodes = (end - 1) / group - first_node + 1, count = end - begin;
  const auto element = [&](int64_t i) {
    return ((row * a.nodes + i / group) * a.query_heads + kv_head * group + i % group) * size;
  };

  Buffer<int32_t> paths(nodes * a.nodes);
  Buffer<int64_t> last(nodes);  // position of each node
  int64_t furthest = 0;
  for (int64_t node = 0; node < nodes; ++node) {
    last.data[node] = length + path_of(a, first_node + node, paths.data + node * a.nodes) - 1;
    furthest = larger(furthest, last.data[node]);
  }
  Buffer<Query> queries(count);
  const int64_t floats_each = 2 * size + kBlock;
  Scratch floats(count * floats_each);
  for (int64_t i = 0; i < count; ++i) {
    float* q = floats.data + i * floats_each;
    const T* from = static_cast<const T*>(a.query) + element(begin + i);
    for (int64_t e = 0; e < size; ++e) q[e] = to_float(from[e]);
    for (int64_t e = 0; e < size; ++e) q[size + e] = 0;
    // A sink is the first logit: what it adds to the mass does not depend on the keys that follow.
    const float sink =
        a.sinks ? to_float(static_cast<const T*>(a.sinks)[kv_head * group + (begin + i) % group]) : kNothing;
    queries.data[i] = {q, q + size, q + 2 * size, sink, sink == kNothing ? 0.0f : 1.0f, 0};
  }

  Block<T> block;
  for (int64_t start = 0; start <= furthest; start += kBlock) {
    const auto low_of = [&](int64_t node) {
      return a.window > 0 ? larger(start, last.data[node] - a.window + 1) : start;
    };
    const auto high_of = [&](int64_t node) { return smaller(start + kBlock - 1, last.data[node]); };
    for (int64_t node = 0; node < nodes;) {
      const int64_t low = low_of(node), high = high_of(node), first = node++;
      if (low > high) continue;
      // Committed keys are the same ones for every node that sees these positions.
      while (high < length && node < nodes && low_of(node) == low && high_of(node) == high) ++node;
      block.count = 0;
      for (int64_t position = low; position <= high; ++position) {
        const int64_t slot =
            position < length ? position : length + paths.data[first * a.nodes + position - length];
        if (slot >= a.capacity) continue;  // write_cache left it out
        block.keys[block.count] = keys + slot * size;
        block.values[block.count++] = values + slot * size;
      }
      for (int key = block.count; key % kKeys; ++key) block.keys[key] = block.keys[0];
      const int64_t from = larger(begin, (first_node + first) * group) - begin;
      const int64_t to = smaller(end, (first_node + node) * group) - begin;
      attend(block, a, queries.data + from, to - from);
    }
  }

  T* output = static_cast<T*>(a.output);
  for (int64_t i = 0; i < count; ++i) {
    const Query& query = queries.data[i];
    const float share = query.mass > 0 ? 1.0f / query.mass : query.mass;  // NaN stays, no key gives 0
    for (int64_t e = 0; e < size; ++e) from_float(query.sum[e] * share, output[element(begin + i) + e]);
  }
}

}  // namespace

void tree_attention(const TreeAttentionArgs& a, const Parallel& parallel) {
  if (a.rows == 0 || a.nodes == 0 || a.query_heads == 0) return;
  const int64_t queries = a.nodes * (a.query_heads / a.kv_heads);
  // Few queries: more, smaller tasks, so that every thread has some.
  int64_t even = (a.rows * a.kv_heads * queries + 4 * parallel.threads - 1) / (4 * parallel.threads);
  if (even > kTogether) even = (even + kTogether - 1) / kTogether * kTogether;
  const int64_t per_task = smaller(kQueriesPerTask, even);
  const int64_t tasks_per_head = (queries + per_task - 1) / per_task;
  with_type(a.dtype, [&](auto type) {
    parallel_tasks(parallel, a.rows * a.kv_heads * tasks_per_head, [&](int64_t task) {
      const int64_t head = task / tasks_per_head, begin = task % tasks_per_head * per_task;
      run<decltype(type)>(a, head / a.kv_heads, head % a.kv_heads, begin, smaller(queries, begin + per_task));
    });
  });
}

}  // namespace cerberus::CERBERUS_ISA
