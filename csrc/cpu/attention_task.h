// The attention of some queries of one row and one key/value head, see tree_attention.cpp.
#pragma once

#include "cpu/attention_keys.h"
#include "cpu/kernels.h"
#include "cpu/tanh.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int64_t kPiece = 4 * kBlock;
// Queries that are computed side by side, by kVectors vectors of keys or of a value's elements: their sums,
// one number of each query and one vector fill the registers.
constexpr int kTogether = kLanes == 16 ? 6 : 3;
constexpr int kVectors = 4;
constexpr int64_t kChain = 32;  // steps of a score's sum that are one chain: longer ones would round worse
constexpr float kNothing = -__builtin_inff();  // the score of what is not seen

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

int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// What queries have seen: the largest score, and the sums of e^(score - top) and of e^(score - top) v.
struct State {
  void take(Pieces& memory, int64_t count, int64_t padded) {
    memory.take(top, whole_vectors(count));
    memory.take(mass, whole_vectors(count));
    memory.take(sums, count * padded);
  }
  static int64_t bytes(int64_t count, int64_t padded) {
    Pieces memory;
    State().take(memory, count, padded);
    return memory.bytes;
  }
  float *top = nullptr, *mass = nullptr;  // (count) up to a whole vector
  float* sums = nullptr;                  // (count, padded)
};

// One piece of a task, where each has a thread: the last to be done adds all up.
struct Share {
  int64_t first, last, piece;  // the first piece of all, the last one, this one
  char* states;                // of all
  int64_t* left;               // how many are not done
};

template <typename T>
class Task {
 public:
  // Queries `begin` to `end` of a key/value head: query i is node i / group, head i % group of the group.
  Task(const TreeAttentionArgs& args, int64_t row, int64_t kv_head, int64_t begin, int64_t end)
      : a(args),
        size(a.head_size),
        steps(Products<T>::steps(size)),
        padded(whole_vectors(size)),
        group(a.query_heads / a.kv_heads),
        length(larger(0, smaller(a.length[row], a.capacity))),
        count(end - begin),
        first_query(begin),
        first_node(begin / group),
        node_count((end - 1) / group - first_node + 1),
        head_of_query(row * a.nodes * a.query_heads + kv_head * group),
        keys(static_cast<const T*>(a.keys) + (row * a.kv_heads + kv_head) * a.capacity * size),
        values(static_cast<const T*>(a.values) + (row * a.kv_heads + kv_head) * a.capacity * size) {}

  // share: null: all pieces.
  void run(const Share* share) {
    Pieces pieces;
    lay_out(pieces);
    Buffer<char> memory(pieces.bytes);
    pieces = {0, memory.data};
    lay_out(pieces);
    find_paths();
    Scratch tree_memory(count * tree_stride);
    tree = tree_memory.data;
    for (int64_t i = 0; i < count; ++i)
      Products<T>::pack(static_cast<const T*>(a.query) + element(i), size, q + i * steps);
    if (share) {
      if (!see_share(*share)) return;
    } else {
      begin_with_sinks();
      score_tree();
      for (int64_t piece = first_piece; piece <= last_piece; ++piece) {
        see(piece);
        add(here);
      }
    }
    finish();
  }

 private:
  using Element = typename Products<T>::Element;

  // Whether this was the last piece to be done, and all have been added up.
  bool see_share(const Share& share) {
    const int64_t bytes = State::bytes(count, padded);
    const auto state_of = [&](int64_t piece) {
      State state;
      Pieces memory{(piece - share.first) * bytes, share.states};
      state.take(memory, count, padded);
      return state;
    };
    // A length that somebody changes meanwhile asks for other pieces than there are.
    const int64_t first = larger(first_piece, share.first), last = smaller(last_piece, share.last);
    if (share.piece >= first && share.piece <= last) {
      here = state_of(share.piece);
      if ((share.piece + 1) * kPiece > length) score_tree();
      see(share.piece);
    }
    if (__atomic_sub_fetch(share.left, 1, __ATOMIC_ACQ_REL) > 0) return false;
    begin_with_sinks();
    for (int64_t piece = first; piece <= last; ++piece) add(state_of(piece));
    return true;
  }

  void lay_out(Pieces& pieces) {
    pieces.take(nodes, node_count);
    pieces.take(paths, node_count * a.nodes);
    pieces.take(q, count * steps);
    pieces.take(weights, count * kBlock);
    pieces.take(columns, steps * kBlock);
    pieces.take(decay, whole_vectors(count));
    pieces.take(block, whole_vectors(count));
    here.take(pieces, count, padded);
    total.take(pieces, count, padded);
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
    int64_t lowest = nodes[0].low, furthest = 0;
    for (int64_t n = 0; n < node_count; ++n) {
      lowest = smaller(lowest, nodes[n].low);
      furthest = larger(furthest, nodes[n].last);
    }
    start = lowest / kBlock * kBlock;
    stop = furthest + 1;
    first_piece = start / kPiece;
    last_piece = furthest / kPiece;
    tree_slots = smaller(slots, a.capacity - length);  // the others write_cache left out
    tree_stride = (tree_slots + kLanes - 1) / kLanes * kLanes;
  }

  int64_t element(int64_t i) const {
    const int64_t query = first_query + i;
    return (head_of_query + query / group * a.query_heads + query % group) * size;
  }

  // A sink is the first logit: what it adds to the mass does not depend on the keys that follow.
  void begin_with_sinks() {
    for (int64_t i = 0; i < whole_vectors(count); ++i) {
      const int64_t head = head_of_query % a.query_heads + (first_query + i) % group;
      const bool has_sink = a.sinks && i < count;
      total.top[i] = has_sink ? to_float(static_cast<const T*>(a.sinks)[head]) : kNothing;
      total.mass[i] = total.top[i] == kNothing ? 0.0f : 1.0f;
    }
    __builtin_memset(total.sums, 0, static_cast<size_t>(count * padded) * sizeof(float));
  }

  // The piece into `here`.
  void see(int64_t piece) {
    for (int64_t i = 0; i < whole_vectors(count); ++i) {
      here.top[i] = block[i] = kNothing;
      here.mass[i] = 0.0f;
    }
    __builtin_memset(here.sums, 0, static_cast<size_t>(count * padded) * sizeof(float));
    int64_t at = larger(start, piece * kPiece);
    ask_for(keys + at * size, smaller(kBlock, length - at));
    for (const int64_t end = smaller(stop, (piece + 1) * kPiece); at < end; at += kBlock) {
      const int64_t committed = larger(0, smaller(kBlock, length - at));
      const int64_t keys_end = gather_scores(at, committed);
      soften(whole_vectors(keys_end) / kLanes);
      weigh_committed(at, committed);
      weigh_tree(at, committed);
    }
  }

  // Adds a piece to all that comes before it.
  void add(const State& piece) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec before = load(total.top + i), here = load(piece.top + i);
      const Vec both = select(here > before, here, before);
      const Vec shift = select(both == kNothing, Vec{}, both);
      const Vec rest = exp_of_negative(before - shift), share = exp_of_negative(here - shift);
      store(both, total.top + i);
      store(multiply_add(load(total.mass + i), rest, load(piece.mass + i) * share), total.mass + i);
      store(rest, decay + i);
      store(share, block + i);
    }
    for (int64_t i = 0; i < count; ++i) {
      if (piece.mass[i] == 0) continue;  // it sees nothing of it
      const Vec rest = broadcast(decay[i]), share = broadcast(block[i]);
      const float* from = piece.sums + i * padded;
      for (float* to = total.sums + i * padded; to < total.sums + (i + 1) * padded;
           to += kLanes, from += kLanes)
        store(multiply_add(load(to), rest, load(from) * share), to);
    }
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

  // Asks memory for so many keys or values, which are needed soon: the processor's own prefetcher starts anew
  // with every page, and a block is over when it has just begun.
  void ask_for(const T* first, int64_t rows) const {
    constexpr int64_t kLine = 64;
    const char* const begin = reinterpret_cast<const char*>(first);
    const int64_t bytes = rows * size * static_cast<int64_t>(sizeof(T));
    for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(begin + at, 0, 2);
  }

  // The scores of the block that starts there into `weights`, in order of position, -inf where a node sees
  // nothing. Returns where the last node's end.
  int64_t gather_scores(int64_t start, int64_t committed) {
    if (committed > 0) {
      ask_for(values + start * size, committed);
      take_keys(keys + start * size, committed, size, columns);
      score(0, committed, weights, kBlock);
      ask_for(keys + (start + kBlock) * size, smaller(kBlock, length - start - kBlock));
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
      const Vec before = load(here.top + i), now = load(block + i);
      const Vec both = select(now > before, now, before);
      // Every score is -inf: every weight is 0.
      const Vec shift = select(both == kNothing, Vec{}, both);
      store(both, here.top + i);
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
      store(multiply_add(load(here.mass + i), load(decay + i), load(block + i)), here.mass + i);
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
        totals[j][v] = load(here.sums + (i + j) * padded + e + v * kLanes) * broadcast(decay[i + j]);
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
      for (int v = 0; v < kCount; ++v) store(totals[j][v], here.sums + (i + j) * padded + e + v * kLanes);
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
      const float share =
          total.mass[i] > 0 ? 1.0f / total.mass[i] : total.mass[i];  // NaN stays, no key gives 0
      float* sum = total.sums + i * padded;
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
  int64_t start = 0, stop = 0;  // of the positions that any node sees: where its block starts, where they end
  int64_t first_piece = 0, last_piece = 0;
  int64_t tree_slots = 0, tree_stride = 0;
  Node* nodes = nullptr;
  int32_t* paths = nullptr;  // (node_count, N)
  Element* q = nullptr;      // (count, steps)
  float* weights = nullptr;  // (count, kBlock): the scores of the block's keys, then e^(score - top)
  float* columns = nullptr;  // (steps, kBlock): keys, transposed
  float* tree = nullptr;     // (count, tree_stride): the scores of the slots behind the committed ones
  float* decay = nullptr;    // (count) up to a whole vector: what is left of earlier sums
  float* block = nullptr;  // the same: the block's maximum, then what is taken off its scores, then its mass
  State here, total;       // of the piece; of all pieces so far
};

}  // namespace
}  // namespace cerberus::CERBERUS_ISA
