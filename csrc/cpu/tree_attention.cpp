// softmax(score) v of every node over the committed slots and its ancestors, as online softmax over blocks of
// keys. score: scale q k, or softcap tanh(scale q k / softcap).
//
// A node's keys are taken in order of absolute position, in blocks of 64 positions counted from position 0,
// wherever in the cache they lie: a token gets the same bits as a node of a tree and as an autoregressive
// step. A sink comes before all of them.
//
// A task owns some queries of one row and one key/value head. It takes the committed keys of a block once for
// all of them: transposed, so that a lane is a key, and a score a few chains of multiply-adds over the
// head's elements, whoever else is there. The nodes' own keys are taken once, ahead of all blocks, every
// query by every slot; each query then picks those of its path. A query's sum of values is one chain over its
// keys.
#include "cpu/kernels.h"
#include "cpu/tanh.h"
#include "cpu/vec.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int kBlock = 64;
// Queries that are computed side by side, by kVectors vectors of keys or of a value's elements: their sums,
// one number of each query and one vector fill the registers.
constexpr int kTogether = kLanes == 16 ? 6 : 3;
constexpr int kVectors = 4;
constexpr int64_t kTilesPerTask = 48 / kTogether;  // the task's arrays stay in the L2 cache
constexpr int64_t kChain = 32;  // steps of a score's sum that are one chain: longer ones would round worse
constexpr float kNothing = -__builtin_inff();  // the score of what is not seen

// How a score is added up: a chain of `steps`, each with 32 bits of the query and of every lane's key.
template <typename T>
struct Products {
  using Element = float;
  static constexpr int64_t kElements = 1;  // a step
  static int64_t steps(int64_t size) { return size; }
  static void pack(const T* q, int64_t size, Element* out) {
    for (int64_t e = 0; e < size; ++e) out[e] = to_float(q[e]);
  }
  static Vec spread(Element x) { return broadcast(x); }
  // Elements of a key from `step` on: kLanes, or those that are left.
  static Vec load_all(const T* key, int64_t step) { return load(key + step); }
  static Vec load_rest(const T* key, int64_t step, int64_t size) {
    return load_part(key + step, size - step);
  }
  static Vec add(Vec q, Vec key, Vec sum) { return multiply_add(q, key, sum); }
};

#if defined(__AVX512BF16__)
// A pair of elements a step: vdpbf16ps.
template <>
struct Products<BFloat16> {
  using Element = int32_t;
  static constexpr int64_t kElements = 2;
  static int64_t steps(int64_t size) { return (size + 1) / 2; }
  static void pack(const BFloat16* q, int64_t size, Element* out) {
    out[steps(size) - 1] = 0;
    __builtin_memcpy(out, q, static_cast<size_t>(size) * sizeof(BFloat16));
  }
  static Vec spread(Element x) { return bit_cast<Vec>(_mm512_set1_epi32(x)); }
  static Vec load_all(const BFloat16* key, int64_t step) {
    return bit_cast<Vec>(_mm512_loadu_si512(key + 2 * step));
  }
  static Vec load_rest(const BFloat16* key, int64_t step, int64_t size) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << (size - 2 * step)) - 1);
    return bit_cast<Vec>(_mm512_maskz_loadu_epi16(mask, key + 2 * step));
  }
  static Vec add(Vec q, Vec key, Vec sum) {
    return bit_cast<Vec>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(q), bit_cast<__m512bh>(key)));
  }
};
#endif

// Values as vectors, as they are or, where that takes fewer instructions, two of them with the elements of
// even and of odd numbers.
template <typename T>
constexpr bool kEvenAndOdd = false;
#if defined(__AVX512F__)
template <>
constexpr bool kEvenAndOdd<BFloat16> = true;

void load_even_and_odd(const BFloat16* p, Vec& even, Vec& odd) {
  const Pairs pairs = load_pairs(p);
  even = pairs.even();
  odd = pairs.odd();
}
// And back, in place.
void merge_even_and_odd(float* both) {
  const __m512 even = bit_cast<__m512>(load(both)), odd = bit_cast<__m512>(load(both + kLanes));
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_storeu_ps(both, _mm512_permutex2var_ps(even, first, odd));
  _mm512_storeu_ps(both + kLanes, _mm512_permutex2var_ps(even, second, odd));
}
#endif

// rows[i][j] and rows[j][i] change places.
void transpose(Vec (&rows)[kLanes]) {
#if defined(__AVX512F__)
  __m512 pairs[16], fours[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(bit_cast<__m512>(rows[i]), bit_cast<__m512>(rows[i + 1]));
    pairs[i + 1] = _mm512_unpackhi_ps(bit_cast<__m512>(rows[i]), bit_cast<__m512>(rows[i + 1]));
  }
  // Quarter n of fours[4 g + c]: column 4 n + c of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512d a = _mm512_castps_pd(pairs[i + half]), b = _mm512_castps_pd(pairs[i + 2 + half]);
      fours[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      fours[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd);
    const __m512 even_below = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
    const __m512 odd_below = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd);
    rows[c] = bit_cast<Vec>(_mm512_shuffle_f32x4(even, even_below, 0x88));
    rows[4 + c] = bit_cast<Vec>(_mm512_shuffle_f32x4(odd, odd_below, 0x88));
    rows[8 + c] = bit_cast<Vec>(_mm512_shuffle_f32x4(even, even_below, 0xdd));
    rows[12 + c] = bit_cast<Vec>(_mm512_shuffle_f32x4(odd, odd_below, 0xdd));
  }
#elif defined(__AVX2__)
  __m256 pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(bit_cast<__m256>(rows[i]), bit_cast<__m256>(rows[i + 1]));
    pairs[i + 1] = _mm256_unpackhi_ps(bit_cast<__m256>(rows[i]), bit_cast<__m256>(rows[i + 1]));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256d a = _mm256_castps_pd(pairs[i + half]), b = _mm256_castps_pd(pairs[i + 2 + half]);
      fours[i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      fours[i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    rows[c] = bit_cast<Vec>(_mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20));
    rows[4 + c] = bit_cast<Vec>(_mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31));
  }
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float swapped = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = swapped;
    }
#endif
}

// columns[step][i] = keys[i][step] for `count` <= kBlock keys, up to a whole vector of them.
template <typename T>
void take_keys(const T* keys, int64_t count, int64_t size, float* columns) {
  const int64_t steps = Products<T>::steps(size), whole = size / Products<T>::kElements;
  for (int64_t first = 0; first < count; first += kLanes) {
    for (int64_t step = 0; step < steps; step += kLanes) {
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* key = keys + smaller(first + i, count - 1) * size;
        rows[i] = step + kLanes <= whole ? Products<T>::load_all(key, step)
                                         : Products<T>::load_rest(key, step, size);
      }
      transpose(rows);
      const int some = static_cast<int>(smaller(kLanes, steps - step));
      for (int i = 0; i < some; ++i) store(rows[i], columns + (step + i) * kBlock + first);
    }
  }
}

// e^x of x <= 0 as 2^n 2^r, to 1e-7 of itself; 0 below e^-87, also of -inf; NaN stays. The polynomial is
// fitted to 2^r, |r| <= 1/2, and 1 at 0.
Vec exp_of_negative(Vec x) {
  const Vec round = broadcast(12582912.0f), to_base_2 = broadcast(1.44269504f);  // as in vec.h
  const Vec shifted = multiply_add(x, to_base_2, round);
  const Vec n = shifted - round;
  const Vec r = multiply_add(x, to_base_2, -n);
  Vec y = broadcast(0.00015353362f);
  y = multiply_add(y, r, broadcast(0.00133988739f));
  y = multiply_add(y, r, broadcast(0.00961843692f));
  y = multiply_add(y, r, broadcast(0.0555033237f));
  y = multiply_add(y, r, broadcast(0.240226477f));
  y = multiply_add(y, r, broadcast(0.693147182f));
  y = multiply_add(y, r, broadcast(1.0f));
  const Vec low = broadcast(-87.0f);
#if defined(__AVX512F__)
  const __mmask16 counts = _mm512_cmp_ps_mask(bit_cast<__m512>(x), bit_cast<__m512>(low), _CMP_NLT_UQ);
  return bit_cast<Vec>(_mm512_maskz_scalef_ps(counts, bit_cast<__m512>(y), bit_cast<__m512>(n)));
#else
  const UIntVec power = (bit_cast<UIntVec>(shifted) - bit_cast<UIntVec>(round)) << 23;
  const Vec result = bit_cast<Vec>(bit_cast<UIntVec>(y) + power);
  return select(x < low, Vec{}, select(x == x, result, x));
#endif
}

// Calls body(i, Count<n>) for n queries from i on, kTogether as long as there are so many.
template <typename Body>
void some_together(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kTogether <= end; i += kTogether) body(i, Count<kTogether>{});
  if constexpr (kTogether > 3)
    if (end - i >= 3) {
      body(i, Count<3>{});
      i += 3;
    }
  if (end - i == 2) body(i, Count<2>{});
  if (end - i == 1) body(i, Count<1>{});
}

// A piece of memory after the other, each on a cache line of its own.
struct Pieces {
  static constexpr int64_t kLine = 64;
  int64_t bytes = 0;
  char* memory = nullptr;  // null: only to count
  template <typename T>
  void take(T*& piece, int64_t count) {
    if (memory) piece = reinterpret_cast<T*>(memory + bytes);
    bytes += (count * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine * kLine;
  }
};

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

// What a node sees, and which queries of the task are its own.
struct Node {
  int64_t low, last;    // positions
  int64_t begin, stop;  // queries
  int64_t first, end;   // the positions of the block that is being taken, counted from where it starts
  const int32_t* path;  // its ancestors, itself included
};

template <typename T>
class Task {
 public:
  // Queries `begin` to `end` of a key/value head: query i is node i / group, head i % group of the group.
  Task(const TreeAttentionArgs& args, int64_t row, int64_t kv_head, int64_t begin, int64_t end)
      : a(args),
        size(a.head_size),
        steps(Products<T>::steps(size)),
        padded((size + kLanes - 1) / kLanes * kLanes),
        group(a.query_heads / a.kv_heads),
        length(larger(0, smaller(a.length[row], a.capacity))),
        count(end - begin),
        first_query(begin),
        first_node(begin / group),
        node_count((end - 1) / group - first_node + 1),
        head_of_query(row * a.nodes * a.query_heads + kv_head * group),
        keys(static_cast<const T*>(a.keys) + (row * a.kv_heads + kv_head) * a.capacity * size),
        values(static_cast<const T*>(a.values) + (row * a.kv_heads + kv_head) * a.capacity * size) {}

  void run() {
    Pieces pieces;
    lay_out(pieces);
    Buffer<char> memory(pieces.bytes + Pieces::kLine);
    pieces = {0, memory.data + (-reinterpret_cast<uintptr_t>(memory.data) & (Pieces::kLine - 1))};
    lay_out(pieces);
    find_paths();
    Scratch tree_memory(count * tree_stride);
    tree = tree_memory.data;
    start_queries();
    score_tree();
    int64_t start = nodes[0].low, furthest = 0;
    for (int64_t n = 0; n < node_count; ++n) {
      start = smaller(start, nodes[n].low);
      furthest = larger(furthest, nodes[n].last);
    }
    for (start = start / kBlock * kBlock; start <= furthest; start += kBlock) {
      const int64_t committed = larger(0, smaller(kBlock, length - start));
      const int64_t end = gather_scores(start, committed);
      soften((end + kLanes - 1) / kLanes);
      weigh_committed(start, committed);
      weigh_tree(start, committed);
    }
    finish();
  }

 private:
  using Element = typename Products<T>::Element;

  void lay_out(Pieces& pieces) {
    const int64_t queries = (count + kLanes - 1) / kLanes * kLanes;
    pieces.take(nodes, node_count);
    pieces.take(paths, node_count * a.nodes);
    pieces.take(q, count * steps);
    pieces.take(sums, count * padded);
    pieces.take(weights, count * kBlock);
    pieces.take(columns, steps * kBlock);
    pieces.take(top, queries);
    pieces.take(mass, queries);
    pieces.take(decay, queries);
    pieces.take(block, queries);
  }

  void find_paths() {
    int64_t slots = 0;
    for (int64_t n = 0; n < node_count; ++n) {
      int32_t* path = paths + n * a.nodes;
      const int64_t ancestors = path_of(a, first_node + n, path), last = length + ancestors - 1;
      if (ancestors > 0) slots = larger(slots, path[ancestors - 1] + 1);
      const int64_t begin = (first_node + n) * group - first_query;
      nodes[n] = {a.window > 0 ? larger(0, last - a.window + 1) : 0,
                  last,
                  larger(0, begin),
                  smaller(count, begin + group),
                  0,
                  0,
                  path};
    }
    tree_slots = smaller(slots, a.capacity - length);  // the others write_cache left out
    tree_stride = (tree_slots + kLanes - 1) / kLanes * kLanes;
  }

  int64_t element(int64_t i) const {
    const int64_t query = first_query + i;
    return (head_of_query + query / group * a.query_heads + query % group) * size;
  }

  void start_queries() {
    for (int64_t i = 0; i < (count + kLanes - 1) / kLanes * kLanes; ++i) {
      // A sink is the first logit: what it adds to the mass does not depend on the keys that follow.
      const int64_t head = head_of_query % a.query_heads + (first_query + i) % group;
      const bool has_sink = a.sinks && i < count;
      top[i] = has_sink ? to_float(static_cast<const T*>(a.sinks)[head]) : kNothing;
      mass[i] = top[i] == kNothing ? 0.0f : 1.0f;
      block[i] = kNothing;
    }
    for (int64_t i = 0; i < count; ++i)
      Products<T>::pack(static_cast<const T*>(a.query) + element(i), size, q + i * steps);
    __builtin_memset(sums, 0, static_cast<size_t>(count * padded) * sizeof(float));
  }

  // --- scores ---

  // out[j][lane] = scale q[j] key[lane] of kCount vectors of keys in `column`.
  template <int kQueries, int kCount>
  void tile_of_scores(const Element* query, const float* column, float* out, int64_t stride) const {
    for (int64_t step = 0; step < steps;) {
      const bool is_first = step == 0;
      const int64_t end = smaller(steps, step + kChain);
      Vec dots[kQueries][kCount] = {};
      for (; step < end; ++step, column += kBlock) {
        Vec element[kQueries];
#pragma GCC unroll 8
        for (int j = 0; j < kQueries; ++j) element[j] = Products<T>::spread(query[j * steps + step]);
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) {
          const Vec key = load(column + v * kLanes);
#pragma GCC unroll 8
          for (int j = 0; j < kQueries; ++j) dots[j][v] = Products<T>::add(element[j], key, dots[j][v]);
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < kQueries; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) {
          float* to = out + j * stride + v * kLanes;
          const Vec scale = broadcast(a.scale);
          store(is_first ? dots[j][v] * scale : multiply_add(dots[j][v], scale, load(to)), to);
        }
    }
  }

  // The scores of queries `begin` on with the `some` keys in `columns`.
  void score(int64_t begin, int64_t some, float* out, int64_t stride) const {
    some_together(begin, count, [&](int64_t i, auto together) {
      constexpr int kQueries = decltype(together)::value;
      int64_t key = 0;
      for (; key + (kVectors - 1) * kLanes < some; key += kVectors * kLanes)
        tile_of_scores<kQueries, kVectors>(q + i * steps, columns + key, out + i * stride + key, stride);
      for (; key < some; key += kLanes)
        tile_of_scores<kQueries, 1>(q + i * steps, columns + key, out + i * stride + key, stride);
    });
    if (a.softcap > 0)
      for (int64_t i = begin; i < count; ++i)
        for (float* x = out + i * stride; x < out + i * stride + some; x += kLanes)
          store(tanh(load(x) / a.softcap) * a.softcap, x);
  }

  // Of every query with every slot of the tree that it or a later one may see.
  void score_tree() {
    for (int64_t slot = 0; slot < tree_slots; slot += kBlock) {
      const int64_t some = smaller(kBlock, tree_slots - slot);
      int64_t n = 0;
      while (n < node_count - 1 && furthest_slot(n) < slot) ++n;
      take_keys(keys + (length + slot) * size, some, size, columns);
      score(nodes[n].begin, some, tree + slot, tree_stride);
    }
  }

  int64_t furthest_slot(int64_t n) const {
    return nodes[n].last < length ? -1 : nodes[n].path[nodes[n].last - length];
  }

  // The scores of the block that starts there into `weights`, in order of position, -inf where a node sees
  // nothing. Returns where the last node's end.
  int64_t gather_scores(int64_t start, int64_t committed) {
    if (committed > 0) {
      take_keys(keys + start * size, committed, size, columns);
      score(0, committed, weights, kBlock);
    }
    int64_t furthest = 0;
    for (int64_t n = 0; n < node_count; ++n) {
      Node& node = nodes[n];
      node.first = smaller(kBlock, larger(0, node.low - start));
      node.end = larger(node.first, smaller(kBlock, node.last - start + 1));
      furthest = larger(furthest, node.end);
    }
    for (int64_t n = 0; n < node_count; ++n) {
      const Node& node = nodes[n];
      if (node.first == 0 && node.end == committed && committed == furthest && committed % kLanes == 0)
        continue;
      const auto slot_of = [&](int64_t key) { return node.path[start + key - length]; };
      for (int64_t i = node.begin; i < node.stop; ++i) {
        float* scores = weights + i * kBlock;
        for (int64_t key = larger(node.first, committed); key < node.end; ++key)
          scores[key] = slot_of(key) < tree_slots ? tree[i * tree_stride + slot_of(key)] : kNothing;
        for (int64_t key = 0; key < node.first; ++key) scores[key] = kNothing;
        for (int64_t key = node.end; key < furthest || key % kLanes; ++key) scores[key] = kNothing;
      }
    }
    return furthest;
  }

  // Scores to weights, `vectors` of each query; the new maximum, and by how much the sums of the blocks
  // before shrink. To a query that sees nothing of the block it does nothing.
  void soften(int64_t vectors) {
    for (int64_t i = 0; i < count; ++i) {
      float* scores = weights + i * kBlock;
      Vec tops = broadcast(kNothing);
      for (int64_t v = 0; v < vectors; ++v) {
        const Vec score = load(scores + v * kLanes);
        tops = select(score > tops, score, tops);  // never a NaN
      }
      block[i] = largest(tops);
    }
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec before = load(top + i), here = load(block + i);
      const Vec both = select(here > before, here, before);
      // Every score is -inf: every weight is 0.
      const Vec shift = select(both == kNothing, Vec{}, both);
      store(both, top + i);
      store(shift, block + i);
      store(exp_of_negative(before - shift), decay + i);
    }
    for (int64_t four = 0; four < count; four += 4) {
      Vec totals[4] = {};
      for (int64_t i = four; i < smaller(count, four + 4); ++i) {
        float* scores = weights + i * kBlock;
        const Vec shift = broadcast(block[i]);
        Vec total{};
        for (int64_t v = 0; v < vectors; ++v) {
          const Vec e = exp_of_negative(load(scores + v * kLanes) - shift);
          store(e, scores + v * kLanes);
          total += e;
        }
        totals[i - four] = total;
      }
      sum_four(totals, block + four);
    }
    for (int64_t i = 0; i < count; i += kLanes)
      store(multiply_add(load(mass + i), load(decay + i), load(block + i)), mass + i);
  }

  // --- values ---

  // sum[e] = sum[e] * decay + weight v[e] of some keys, for kCount vectors from e on.
  template <int kQueries, int kCount, typename ValueAt, typename Load>
  void tile_of_values(int64_t i, int64_t first, int64_t end, int64_t e, const ValueAt& value_at,
                      const Load& load_at) const {
    Vec totals[kQueries][kCount];
#pragma GCC unroll 8
    for (int j = 0; j < kQueries; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v)
        totals[j][v] = load(sums + (i + j) * padded + e + v * kLanes) * broadcast(decay[i + j]);
    const float* weight = weights + i * kBlock;
    for (int64_t key = first; key < end; ++key) {
      const T* value = value_at(key) + e;
      Vec spread[kQueries];
#pragma GCC unroll 8
      for (int j = 0; j < kQueries; ++j) spread[j] = broadcast(weight[j * kBlock + key]);
      const auto add = [&](int v, Vec elements) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int j = 0; j < kQueries; ++j) totals[j][v] = multiply_add(elements, spread[j], totals[j][v]);
      };
      if constexpr (kEvenAndOdd<T> && kCount == kVectors) {
#pragma GCC unroll 2
        for (int v = 0; v < kCount; v += 2) {
          Vec even, odd;
          load_even_and_odd(value + v * kLanes, even, odd);
          add(v, even);
          add(v + 1, odd);
        }
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) add(v, load_at(value + v * kLanes));
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kQueries; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) store(totals[j][v], sums + (i + j) * padded + e + v * kLanes);
  }

  // Adds the values of keys `first` to `end` of the block for queries that all see them.
  template <typename ValueAt>
  void weigh(int64_t begin, int64_t stop, int64_t first, int64_t end, const ValueAt& value_at) {
    some_together(begin, stop, [&](int64_t i, auto together) {
      constexpr int kQueries = decltype(together)::value;
      const auto load_all = [](const T* p) { return load(p); };
      int64_t e = 0;
      for (; e + kVectors * kLanes <= size; e += kVectors * kLanes)
        tile_of_values<kQueries, kVectors>(i, first, end, e, value_at, load_all);
      for (; e + kLanes <= size; e += kLanes)
        tile_of_values<kQueries, 1>(i, first, end, e, value_at, load_all);
      if (e < size) {
        const int64_t rest = size - e;
        tile_of_values<kQueries, 1>(i, first, end, e, value_at,
                                    [rest](const T* p) { return load_part(p, rest); });
      }
    });
    for (int64_t i = begin; i < stop; ++i)
      decay[i] = 1.0f;  // what else there is of the block goes on from here
  }

  void weigh_committed(int64_t start, int64_t committed) {
    const T* block_values = values + start * size;
    for (int64_t n = 0; n < node_count;) {
      const int64_t first = nodes[n].first, end = smaller(committed, nodes[n].end), begin = nodes[n].begin;
      int64_t stop = nodes[n].stop;
      while (++n < node_count && nodes[n].first == first && smaller(committed, nodes[n].end) == end)
        stop = nodes[n].stop;
      if (first < end) weigh(begin, stop, first, end, [&](int64_t key) { return block_values + key * size; });
    }
  }

  void weigh_tree(int64_t start, int64_t committed) {
    const T* tree_values = values + length * size;
    for (int64_t n = 0; n < node_count; ++n) {
      const Node& node = nodes[n];
      const auto slot_of = [&](int64_t key) { return node.path[start + key - length]; };
      const int64_t first = larger(node.first, committed);
      int64_t end = node.end;
      while (end > first && slot_of(end - 1) >= tree_slots) --end;
      if (first < end)
        weigh(node.begin, node.stop, first, end,
              [&](int64_t key) { return tree_values + slot_of(key) * size; });
    }
  }

  void finish() const {
    for (int64_t i = 0; i < count; ++i) {
      const float share = mass[i] > 0 ? 1.0f / mass[i] : mass[i];  // NaN stays, no key gives 0
      float* sum = sums + i * padded;
      T* out = static_cast<T*>(a.output) + element(i);
      int64_t e = 0;
      for (; e < padded; e += kLanes) store(load(sum + e) * share, sum + e);
#if defined(__AVX512F__)
      if constexpr (kEvenAndOdd<T>)
        for (e = 0; e + 2 * kLanes <= size / (kVectors * kLanes) * (kVectors * kLanes); e += 2 * kLanes)
          merge_even_and_odd(sum + e);
#endif
      for (e = 0; e + kLanes <= size; e += kLanes) from_floats<kLanes>(sum + e, out + e);
      for (; e < size; ++e) from_float(sum[e], out[e]);
    }
  }

  const TreeAttentionArgs& a;
  const int64_t size, steps, padded, group, length;
  const int64_t count, first_query, first_node, node_count, head_of_query;
  const T *const keys, *const values;  // of the row and the head
  int64_t tree_slots = 0, tree_stride = 0;
  Node* nodes = nullptr;
  int32_t* paths = nullptr;  // (node_count, N)
  Element* q = nullptr;      // (count, steps)
  float* sums = nullptr;     // (count, padded): of e^(score - top) v
  float* weights = nullptr;  // (count, kBlock): the scores of the block's keys, then e^(score - top)
  float* columns = nullptr;  // (steps, kBlock): keys, transposed
  float* tree = nullptr;     // (count, tree_stride): the scores of the slots behind the committed ones
  float *top = nullptr, *mass = nullptr, *decay = nullptr;  // (count) up to a whole vector
  float* block = nullptr;  // the same: the block's maximum, then what is taken off its scores, then its mass
};

// Tiles of queries a task: those that make all threads finish first. A task also costs what it takes to bring
// in the keys: about a fifth of a tile.
int64_t tiles_per_task(int64_t heads, int64_t tiles, int64_t threads) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t each = smaller(kTilesPerTask, tiles); each >= 1; --each) {
    const int64_t tasks = heads * ((tiles + each - 1) / each);
    const int64_t cost = (tasks + threads - 1) / threads * (5 * each + 1);
    if (cost < least) {
      best = each;
      least = cost;
    }
  }
  return best;
}

// The tasks of one call: heads of its rows, in tiles of queries.
struct Tasks {
  Tasks(const TreeAttentionArgs& a, int64_t threads) {
    if (a.rows == 0 || a.nodes == 0 || a.query_heads == 0 || a.head_size == 0) return;
    queries = a.nodes * (a.query_heads / a.kv_heads);
    const int64_t tiles = (queries + kTogether - 1) / kTogether;
    per_task = tiles_per_task(a.rows * a.kv_heads, tiles, larger(1, threads)) * kTogether;
    per_head = (queries + per_task - 1) / per_task;
    count = a.rows * a.kv_heads * per_head;
  }
  template <typename T>
  void run(const TreeAttentionArgs& a, int64_t task) const {
    const int64_t head = task / per_head, begin = task % per_head * per_task;
    Task<T>(a, head / a.kv_heads, head % a.kv_heads, begin, smaller(queries, begin + per_task)).run();
  }

  int64_t queries = 0, per_task = 1, per_head = 1, count = 0;
};

}  // namespace

void tree_attention(const TreeAttentionArgs& a, const Parallel& parallel) {
  const Tasks tasks(a, parallel.threads);
  with_type(a.dtype, [&](auto type) {
    parallel_tasks(parallel, tasks.count, [&](int64_t task) { tasks.run<decltype(type)>(a, task); });
  });
}

void tree_attentions(const TreeAttentionsArgs& all, const Parallel& parallel) {
  if (all.count == 1) return tree_attention(all.each[0], parallel);
  Buffer<int64_t> ends(all.count);
  int64_t count = 0;
  // Each call has its share of the threads: cut for all of them, its heads would be in more pieces than pay.
  const int64_t threads = (parallel.threads + all.count - 1) / all.count;
  for (int64_t i = 0; i < all.count; ++i) ends.data[i] = count += Tasks(all.each[i], threads).count;
  with_type(all.dtype, [&](auto type) {
    parallel_tasks(parallel, count, [&](int64_t task) {
      int64_t i = 0;
      while (task >= ends.data[i]) ++i;
      Tasks(all.each[i], threads).run<decltype(type)>(all.each[i], task - (i ? ends.data[i - 1] : 0));
    });
  });
}

}  // namespace cerberus::CERBERUS_ISA
