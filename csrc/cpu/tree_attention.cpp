// softmax(score) v of every node over the committed slots and its ancestors, as online softmax over blocks of
// keys. score: scale q k, or softcap tanh(scale q k / softcap).
//
// A node's keys are taken in order of absolute position, in blocks of 64 positions counted from position 0,
// wherever in the cache they lie: a token gets the same bits as a node of a tree and as an autoregressive
// step. Four blocks are a piece. Each begins anew, and they are added up in order, behind a sink.
//
// A task owns some queries of one row and one key/value head. It takes the committed keys of a block once for
// all of them: transposed, so that a lane is a key, and a score a few chains of multiply-adds over the
// head's elements, whoever else is there. The nodes' own keys are taken once, ahead of all blocks, every
// query by every slot; each query then picks those of its path. A query's sum of values is one chain over its
// keys of a piece. Where there are too few tasks for the threads, each piece has a task of its own.
#include "cpu/attention_task.h"

namespace cerberus::CERBERUS_ISA {
namespace {

constexpr int64_t kTilesPerTask = 48 / kTogether;  // the task's arrays stay in the L2 cache
constexpr int64_t kMostShared = 16 << 20;          // bytes of what pieces of their own have seen

// The tasks of one call: heads of its rows, in tiles of queries, and maybe in pieces.
class Tasks {
 public:
  Tasks(const TreeAttentionArgs& a, int64_t threads) {
    if (a.rows == 0 || a.nodes == 0 || a.query_heads == 0 || a.head_size == 0) return;
    queries_ = a.nodes * (a.query_heads / a.kv_heads);
    heads_ = a.rows * a.kv_heads;
    find_pieces(a);
    cut(a, larger(1, threads));
    count = parts() * (by_piece_ ? pieces_ : 1);
  }

  // Takes what tasks have in common.
  void lay_out(Pieces& memory) {
    if (!by_piece_) return;
    memory.take(left_, parts());
    memory.take(states_, parts() * part_bytes_);
  }
  void begin() {
    for (int64_t part = 0; by_piece_ && part < parts(); ++part) left_[part] = pieces_;
  }

  template <typename T>
  void run(const TreeAttentionArgs& a, int64_t task) const {
    const int64_t part = by_piece_ ? task / pieces_ : task;
    const int64_t head = part / per_head_, begin = part % per_head_ * per_task_;
    Task<T> queries(a, head / a.kv_heads, head % a.kv_heads, begin, smaller(queries_, begin + per_task_));
    if (!by_piece_) return queries.run(nullptr);
    const Share share{first_, first_ + pieces_ - 1, first_ + task % pieces_, states_ + part * part_bytes_,
                      left_ + part};
    queries.run(&share);
  }

  int64_t count = 0;

 private:
  int64_t parts() const { return heads_ * per_head_; }

  // Which pieces any node of a row may see. Lengths may be anything.
  void find_pieces(const TreeAttentionArgs& a) {
    int64_t shortest = a.capacity, longest = 0;
    for (int64_t row = 0; row < a.rows; ++row) {
      shortest = smaller(shortest, larger(0, a.length[row]));
      longest = larger(longest, smaller(a.length[row], a.capacity));
    }
    first_ = a.window > 0 ? larger(0, shortest - a.window) / kPiece : 0;
    keys_ = longest + a.nodes - first_ * kPiece;
    pieces_ = (keys_ + kPiece - 1) / kPiece;
  }

  // Tiles of queries a task, with all pieces or one: what makes all threads finish first. Times in quarters
  // of what a tile takes for a key; bringing the key in takes two, and a task as long as 32 keys of one tile.
  void cut(const TreeAttentionArgs& a, int64_t threads) {
    constexpr int64_t kTask = 32 * (4 + 2);
    const auto rounds = [threads](int64_t parts) { return (parts + threads - 1) / threads; };
    const auto bytes_of = [&](int64_t count) {
      return pieces_ * State::bytes(count, whole_vectors(a.head_size));
    };
    const int64_t tiles = (queries_ + kTogether - 1) / kTogether;
    int64_t least = INT64_MAX;
    for (int64_t each = smaller(kTilesPerTask, tiles); each >= 1; --each) {
      const int64_t key = 4 * each + 2, per_head = (tiles + each - 1) / each, parts = heads_ * per_head;
      const auto take = [&](bool by_piece, int64_t time) {
        if (time >= least) return;
        least = time;
        by_piece_ = by_piece;
        per_task_ = each * kTogether;
        per_head_ = per_head;
      };
      take(false, rounds(parts) * (keys_ * key + kTask));
      if (pieces_ == 1 || parts * bytes_of(each * kTogether) > kMostShared) continue;
      const int64_t whole = rounds(parts * (keys_ / kPiece)) * kPiece, even = rounds(parts * keys_);
      take(true, larger(whole, even) * key + rounds(parts * pieces_) * kTask);
    }
    part_bytes_ = bytes_of(per_task_);
  }

  int64_t queries_ = 0, heads_ = 0, per_task_ = 1, per_head_ = 1;
  int64_t first_ = 0, pieces_ = 1, keys_ = 0, part_bytes_ = 0;
  bool by_piece_ = false;
  int64_t* left_ = nullptr;
  char* states_ = nullptr;
};

}  // namespace

void tree_attention(const TreeAttentionArgs& a, const Parallel& parallel) {
  tree_attentions({a.dtype, 1, &a}, parallel);
}

void tree_attentions(const TreeAttentionsArgs& all, const Parallel& parallel) {
  // Each call has its share of the threads: cut for all of them, its heads would be in more pieces than pay.
  const int64_t threads = (parallel.threads + all.count - 1) / larger(1, all.count);
  Buffer<Tasks> calls(all.count);
  Buffer<int64_t> ends(all.count);
  Pieces pieces;
  int64_t count = 0;
  for (int64_t i = 0; i < all.count; ++i) {
    calls.data[i] = Tasks(all.each[i], threads);
    calls.data[i].lay_out(pieces);
    ends.data[i] = count += calls.data[i].count;
  }
  Buffer<char> memory(pieces.bytes);
  pieces = {0, memory.data};
  for (int64_t i = 0; i < all.count; ++i) {
    calls.data[i].lay_out(pieces);
    calls.data[i].begin();
  }
  with_type(all.dtype, [&](auto type) {
    parallel_tasks(parallel, count, [&](int64_t task) {
      int64_t i = 0;
      while (task >= ends.data[i]) ++i;
      calls.data[i].run<decltype(type)>(all.each[i], task - (i ? ends.data[i - 1] : 0));
    });
  });
}

}  // namespace cerberus::CERBERUS_ISA
