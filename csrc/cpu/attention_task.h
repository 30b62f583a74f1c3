// The attention of some queries of one row and one key/value head, see tree_attention.cpp.
#pragma once

#include "cpu/attention_tiles.h"
#include "cpu/kernels.h"
#include "cpu/tanh.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int64_t kPiece = 4 * kBlock;
constexpr float kNothing = -__builtin_inff();  // the score of what is not seen

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

  // The scores of queries `begin` on with the `some` keys in `columns`.
  void score(int64_t begin, int64_t some, float* out, int64_t stride) const {
    some_together(begin, count, [&](int64_t i, auto together) {
      constexpr int kQueries = decltype(together)::value;
      int64_t key = 0;
      for (; key + (kVectors - 1) * kLanes < some; key += kVectors * kLanes)
        tile_of_scores<T, kQueries, kVectors>(q + i * steps, steps, columns + key, a.scale,
                                              out + i * stride + key, stride);
      for (; key < some; key += kLanes)
        tile_of_scores<T, kQueries, 1>(q + i * steps, steps, columns + key, a.scale, out + i * stride + key,
                                       stride);
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

  // Adds the values of keys `first` to `end` of the block for queries that all see them.
  template <typename ValueAt>
  void weigh(int64_t begin, int64_t stop, int64_t first, int64_t end, const ValueAt& value_at) {
    some_together(begin, stop, [&](int64_t i, auto together) {
      constexpr int kQueries = decltype(together)::value;
      const auto some = [&](int64_t e, auto vectors, const auto& load_at) {
        tile_of_values<T, kQueries, decltype(vectors)::value>(weights + i * kBlock, first, end, e, value_at,
                                                              load_at, decay + i, here.sums + i * padded,
                                                              padded);
      };
      const auto load_all = [](const T* p) { return load(p); };
      int64_t e = 0;
      for (; e + kVectors * kLanes <= size; e += kVectors * kLanes) some(e, Count<kVectors>{}, load_all);
      for (; e + kLanes <= size; e += kLanes) some(e, Count<1>{}, load_all);
      const int64_t rest = size - e;
      if (rest > 0) some(e, Count<1>{}, [rest](const T* p) { return load_part(p, rest); });
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
