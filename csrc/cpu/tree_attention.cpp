// softmax(scale q k) v of every node over the committed slots and its ancestors, as online softmax over blocks of keys.
//
// A node's keys are taken in order of absolute position, in blocks of 64 positions counted from position 0, wherever in
// the cache they lie: a token gets the same bits as a node of a tree and as an autoregressive step. A task owns some
// queries of one row and one key/value head, and takes each block once for all of them.
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int kBlock = 64;
constexpr int64_t kQueriesPerTask = 24;

// The keys of one block that a node sees, in order of position.
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
  float top, mass;
};

// scores[first + i] = scale q k[first + i]
template <int kKeys, typename T>
void score(const float* q, const T* const* keys, int64_t size, float scale, float* scores) {
  Vec sums[kKeys] = {};
  int64_t e = 0;
  for (; e + kLanes <= size; e += kLanes) {
    const Vec x = load(q + e);
#pragma GCC unroll 4
    for (int i = 0; i < kKeys; ++i) sums[i] += x * load(keys[i] + e);
  }
  if (e < size) {
    const Vec x = load_part(q + e, size - e);
#pragma GCC unroll 4
    for (int i = 0; i < kKeys; ++i) sums[i] += x * load_part(keys[i] + e, size - e);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kKeys; ++i) scores[i] = sum(sums[i]) * scale;
}

// sum[e] = sum[e] * decay + p v[e] for kVectors vectors from e on.
template <int kVectors, typename T>
void weigh(const Block<T>& block, const float* p, float decay, int64_t e, float* total) {
  Vec sums[kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) sums[i] = load(total + e + i * kLanes) * decay;
  for (int key = 0; key < block.count; ++key) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sums[i] += load(block.values[key] + e + i * kLanes) * p[key];
  }
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) store(sums[i], total + e + i * kLanes);
}

template <typename T>
void attend(const Block<T>& block, int64_t size, float scale, Query& query) {
  float p[kBlock];
  int key = 0;
  for (; key + 4 <= block.count; key += 4) score<4>(query.q, block.keys + key, size, scale, p + key);
  for (; key < block.count; ++key) score<1>(query.q, block.keys + key, size, scale, p + key);
  for (; key < kBlock; ++key) p[key] = -__builtin_inff();

  float top = query.top;
  for (key = 0; key < block.count; ++key)
    if (p[key] > top) top = p[key];
  if (top == -__builtin_inff()) return;  // every score is -inf: nothing to weigh
  const float decay = exp(query.top - top);
  Vec mass{};
  for (key = 0; key < kBlock; key += kLanes) {
    const Vec e = exp(load(p + key) - top);
    store(e, p + key);
    mass += e;
  }
  query.top = top;
  query.mass = query.mass * decay + sum(mass);

  int64_t e = 0;
  for (; e + 4 * kLanes <= size; e += 4 * kLanes) weigh<4>(block, p, decay, e, query.sum);
  for (; e + kLanes <= size; e += kLanes) weigh<1>(block, p, decay, e, query.sum);
  for (; e < size; ++e) {
    float total = query.sum[e] * decay;
    for (key = 0; key < block.count; ++key)
      total = __builtin_fmaf(to_float(block.values[key][e]), p[key], total);
    query.sum[e] = total;
  }
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
  Scratch floats(2 * count * size);
  for (int64_t i = 0; i < count; ++i) {
    float* q = floats.data + 2 * i * size;
    const T* from = static_cast<const T*>(a.query) + element(begin + i);
    for (int64_t e = 0; e < size; ++e) q[e] = to_float(from[e]);
    for (int64_t e = 0; e < size; ++e) q[size + e] = 0;
    queries.data[i] = {q, q + size, -__builtin_inff(), 0};
  }

  Block<T> block;
  for (int64_t start = 0; start <= furthest; start += kBlock) {
    int64_t filled_low = -1, filled_high = -1;  // positions that `block` holds; committed blocks serve several nodes
    for (int64_t node = 0; node < nodes; ++node) {
      const int64_t visible = a.window > 0 ? larger(0, last.data[node] - a.window + 1) : 0;
      const int64_t low = larger(start, visible), high = smaller(start + kBlock - 1, last.data[node]);
      if (low > high) continue;
      if (high >= length || low != filled_low || high != filled_high) {
        block.count = 0;
        for (int64_t position = low; position <= high; ++position) {
          const int64_t slot =
              position < length ? position : length + paths.data[node * a.nodes + position - length];
          if (slot >= a.capacity) continue;  // write_cache left it out
          block.keys[block.count] = keys + slot * size;
          block.values[block.count++] = values + slot * size;
        }
        filled_low = high >= length ? -1 : low;
        filled_high = high;
      }
      const int64_t from = larger(begin, (first_node + node) * group);
      const int64_t to = smaller(end, (first_node + node + 1) * group);
      for (int64_t i = from; i < to; ++i) attend(block, size, a.scale, queries.data[i - begin]);
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
  const int64_t even = (a.rows * a.kv_heads * queries + 2 * parallel.threads - 1) / (2 * parallel.threads);
  const int64_t per_task = larger(1, smaller(kQueriesPerTask, even));
  const int64_t tasks_per_head = (queries + per_task - 1) / per_task;
  with_type(a.dtype, [&](auto type) {
    parallel_tasks(parallel, a.rows * a.kv_heads * tasks_per_head, [&](int64_t task) {
      const int64_t head = task / tasks_per_head, begin = task % tasks_per_head * per_task;
      run<decltype(type)>(a, head / a.kv_heads, head % a.kv_heads, begin, smaller(queries, begin + per_task));
    });
  });
}

}  // namespace cerberus::CERBERUS_ISA
