// The contract that the CPU and the CUDA implementations share: one plain struct per op, no torch.
//
// prepare.cpp checks the tensors, allocates the results and fills these structs, once for both devices. A
// kernel may therefore rely on everything said here: dtypes, contiguity and sizes. It may not rely on values.
//
// Letters as everywhere in the project: B rows, N tree nodes, K heads, L layers, P drafts per head, D hidden
// size, V vocabulary, S cache capacity, Hq / Hkv attention heads, E head size, W words of 64 nodes, C cache
// planes (keys and values of every layer). All arrays are contiguous, last index fastest. Any of the outer
// sizes may be 0.
#pragma once

#include <cstdint>

namespace cerberus {

// Element type of the floating-point arrays of one call; they all have the same one.
enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// Entropy in nats of softmax(hidden) over the last axis: logsumexp(x) - sum p x.
struct HiddenEntropyArgs {
  DType dtype;
  int64_t rows, size;  // B, D >= 1
  const void* hidden;  // (B, D)
  float* entropy;      // (B,)
};

// x[k,0] = h;  x[k,l] = x[k,l-1] + silu(W[l,k] @ concat(x[k,l-1], n[k,l]) + b[l,k]),
// n[k,l] = anchor for the first head or the first layer, else x[k-1,l-1].
// Unchained (Medusa): no neighbour, W[l,k] is (D, D).
// The sum is taken in float32 and the state rounded to `dtype` after every layer.
struct HeadStackArgs {
  DType dtype;
  int64_t rows, heads, layers, size;  // B, K >= 1, L >= 1, D >= 1
  bool chained;
  const void* hidden;  // (B, D)
  const void* anchor;  // (B, D)
  const void* weight;  // (L, K, D, chained ? 2 D : D)
  const void* bias;    // (L, K, D)
  void* scratch;       // (2, B, K, D): the states of the layers in between, alternating
  void* states;        // (B, K, D): the states after the last layer
  bool eight_bits;     // the weights of each layer and head as pack_eight_bits packs them; CPU only
};

// The P largest of log_softmax(projection @ state), best first, ties to the lowest id.
struct DraftTopkArgs {
  DType dtype;
  int64_t rows, size, vocab, drafts;  // B * K, D >= 1, Vd >= P, 1 <= P <= 32
  const void* states;                 // (B * K, D)
  const void* projection;             // (Vd, D)
  // Scratch for partial results: at most `parts` pieces of the vocabulary, chosen by the device, which lays
  // them out as it likes.
  int64_t parts;
  float* part_max;     // rows * parts
  float* part_sum;     // rows * parts
  float* part_logits;  // rows * parts * P
  int32_t* part_ids;   // rows * parts * P
  int64_t* ids;        // (rows, P)
  float* logprobs;     // (rows, P)
  bool eight_bits;     // the projection as pack_eight_bits packs it; CPU only
};

// head_stack and draft_topk in one, of weights in eight bits. CPU only.
struct DraftArgs {
  HeadStackArgs stack;        // its anchor: null where it is the hidden state, else memory for B rows
  DraftTopkArgs topk;         // of the stack's states
  int64_t tokens;             // V
  const int64_t* pending;     // (B,): of others than 0 .. V - 1, the nearest
  const void* embeddings;     // (V, D)
  const void* anchor_scale;   // (): the anchor is the pending token's embedding times this
  const int64_t* vocabulary;  // (Vd,): the tokens that the projection's rows are of; null: their numbers
};

// The drafts c of each head but the first, weighed anew after each draft t of the head before it, by a
// softmax over them and the rest, which is all that the head does not draft:
//     l(c)    = slope log P(c) + parents[t] . children[c]
//     l(rest) = slope log(1 - sum P) + rest, of no less than kLeastRest
// A draft whose id is none of 0 .. Vd - 1, or whose logprob or l is not finite, is none: -inf. After a parent
// of another id the drafts stay as they are.
constexpr float kLeastRest = 1e-4f;
struct RerankArgs {
  DType dtype;
  int64_t rows, heads, drafts, vocab, rank;  // B, K >= 1, 1 <= P <= 32, Vd, r >= 1
  const int64_t* ids;                        // (B, K, P): rows of the tables
  const float* logprobs;                     // (B, K, P)
  const void* parents;                       // (K - 1, Vd, r)
  const void* children;                      // (Vd, r)
  const float* slopes;                       // (K - 1,)
  const float* rest;                         // (K - 1,)
  float* conditional;                        // (B, K - 1, P, P): of parent and child
};

// temperature 0: argmax. Else Gumbel-max over the tokens that top_k and top_p keep, with Philox noise keyed
// by (seed, position), so that the choice depends on nothing but the logits, the seed and the absolute
// position.
struct ChooseTokensArgs {
  DType dtype;
  int64_t rows, vocab;  // M, V >= 1
  const void* logits;   // (M, V)
  const int64_t* positions;
  uint64_t seed;
  float temperature;  // >= 0
  int64_t top_k;      // 0: all
  float top_p;        // 1: all
  // (3,) or null: where the call finds these four when it runs, for a temperature > 0: the seed, top_k, the
  // bits of temperature and top_p. So a CUDA graph serves all of them.
  const int64_t* numbers;
  int64_t* tokens;  // (M,)
};

// Node i of row b sits in slot length[b] + i and attends to slots 0 .. length[b]-1 and to the slots of its
// ancestors, itself included. Its position is length[b] + depth, depth = ancestors - 1; with a window it sees
// positions > position - window only. The keys and values of the nodes are already in the cache.
struct TreeAttentionArgs {
  DType dtype;
  int64_t rows, nodes, query_heads, kv_heads, head_size, capacity, words;  // B, N, Hq, Hkv, E, S, W
  float scale;
  float softcap;             // > 0: the score is softcap tanh(scale q k / softcap); 0: scale q k
  int64_t window;            // 0: none
  const void* query;         // (B, N, Hq, E)
  const void* keys;          // (B, Hkv, S, E)
  const void* values;        // (B, Hkv, S, E)
  const int64_t* length;     // (B,)
  const int64_t* ancestors;  // (N, W): bit j of row i says that node j is on the path from the root to i
  const void* sinks;         // (Hq,) or null: one more logit of a query head, which has no value
  void* output;              // (B, N, Hq, E)
  // Scratch for partial results where a device splits the slots of a row into `splits` > 1 pieces, else none.
  int64_t splits;
  float* part_max;  // (B, N, Hq, splits): what is taken off the scores of a piece, near the largest of them
  float* part_sum;  // (B, N, Hq, splits): sum of 2^(score - part_max); 0: the row sees nothing of the piece
  float* part_output;  // (B, N, Hq, splits, E): sum of 2^(score - part_max) v
};

// Of several texts at once, each with its own cache, length and topology: the same dtype and head size.
struct TreeAttentionsArgs {
  DType dtype;
  int64_t count;
  const TreeAttentionArgs* each;
};

// Puts the nodes' keys and values into slots length .. length + N of each row.
// Rows whose slots would lie outside the cache are left out from there on: never a write past the end.
struct WriteCacheArgs {
  int64_t element_bytes;  // 2 or 4: the values are only moved
  int64_t rows, nodes, kv_heads, head_size, capacity;
  void* keys;              // (B, Hkv, S, E)
  void* values;            // (B, Hkv, S, E)
  const void* new_keys;    // (B, N, Hkv, E)
  const void* new_values;  // (B, N, Hkv, E)
  const int64_t* length;   // (B,)
};

// Node 0 is accepted; node i > 0 is where its parent is and draft[i] == target[parent]. The longest accepted
// path wins, ties go to the lowest node.
struct VerifyTreeArgs {
  int64_t rows, nodes, words, depth;  // B, N >= 1, W, a path has depth + 1 nodes
  const int64_t* draft;               // (B, N)
  const int64_t* target;              // (B, N)
  const int64_t* parents;             // (N,), parents[0] = -1, parents[i] < i
  const int64_t* ancestors;           // (N, W)
  int32_t* path;                      // (B, depth + 1): node 0, the accepted nodes, -1 ...
  int32_t* accepted;                  // (B,): accepted nodes after the root
};

// For j = 0 .. accepted: slot length + path[j] moves to slot length + j, in every plane; then length +=
// accepted + 1. A path is increasing, so that moving in order never overwrites what is still to be moved.
struct CommitCacheArgs {
  int64_t element_bytes;
  int64_t planes, rows, kv_heads, capacity, head_size, path_nodes;  // C, B, Hkv, S, E, depth + 1
  void* cache;                                                      // (C, B, Hkv, S, E)
  int64_t* length;                                                  // (B,)
  const int32_t* path;                                              // (B, depth + 1)
  const int32_t* accepted;                                          // (B,)
};

// How a product's weights lie: as the model has them; as pack_weights puts them; in blocks of four or five
// bits (see cpu/few_bits.h) or a byte (cpu/byte_weights.h) each, these with a scale for all 32 or for every
// 16, to the bit; in eight bits, nearly the same (cpu/eight_bits.h).
enum class Packing : int64_t { kNone, kPacked, kFourBits, kEightBits, kBytes, kBytesOf16, kFiveBits };

// output = kind(input), element by element: an element's bits depend on nothing but its value. CPU only.
enum class Activation : int32_t {
  kSilu,
  kGelu,
  kGeluTanh,
  kTanh,
  kSigmoid,
  kExp,
  kErf,
  kSoftplus,
  kCos,
  kSin
};
struct ActivationArgs {
  DType dtype;
  Activation kind;
  int64_t count;  // of elements
  const void* input;
  void* output;
};

// input @ weight^T + bias, every output a fixed-order sum: bit-equal whatever the other rows are. Rows may
// come in groups, each with a weight and a bias of its own: rows ends[g - 1] to ends[g] are group g's. `ends`
// are clamped to be non-decreasing and within 0 .. M; rows behind the last one become 0. CPU only.
struct LinearArgs {
  DType dtype;
  int64_t rows, in_size, out_size, groups;  // M, I, O, G: 1 without `ends`
  bool transposed;
  const void* input;    // (M, I)
  const void* weight;   // (G, O, I); transposed: (G, I, O)
  const void* bias;     // (G, O) or null
  const int64_t* ends;  // (G,) or null: all rows are one group's
  void* output;         // (M, O)
};

// Products whose rows name their weights: output[m, j] = input[m, j] @ weight[chosen[m, j]]^T +
// bias[chosen[m, j]], to the bits of linear; 0 where chosen is none of 0 .. G - 1. CPU only.
struct GroupedLinearArgs {
  DType dtype;
  int64_t rows, each, in_size, out_size, groups;  // M, J, I, O, G
  bool shared;                                    // one input row for all that a row names
  bool transposed;
  bool packed;            // every weight as pack_weights packs it; not transposed
  const void* input;      // (M, shared ? 1 : J, I)
  const void* weight;     // (G, O, I); transposed: (G, I, O)
  const void* bias;       // (G, O) or null
  const int64_t* chosen;  // (M, J)
  void* output;           // (M, J, O)
};

// Copies weight rows to where products of a step read them: weight row i becomes row first + i of `all` rows
// that lie in `packed` in the order of a level of the instruction set, see cpu/packed.h. CPU only.
struct PackWeightsArgs {
  DType dtype;
  int64_t rows, size, first,
      all;             // O_i, I; all >= 1, packed in order: the one with first = 0 before the others
  const void* weight;  // (O_i, I)
  void* packed;
};

// The same in fewer bits a weight, of bfloat16 with I a multiple of 32: kFourBits, kFiveBits, kBytes or
// kBytesOf16. *fits becomes 0 where a weight cannot be given so to the bit. CPU only.
struct PackBlocksArgs {
  Packing packing;
  int64_t rows, size, first, all;
  const void* weight;
  void* packed;
  int32_t* fits;
};

// The same in eight bits a weight, nearly, of any size, see cpu/eight_bits.h: for what only drafts depend on.
struct PackEightBitsArgs {
  DType dtype;
  int64_t rows, size;  // O, I
  const void* weight;  // (O, I)
  void* packed;        // eight_bit_bytes_cpu
};

// What a step does for each node by itself: row instructions, see step/code.h. CPU only.
enum class RowOp : int32_t {
  kCopy,
  kAdd,
  kSub,
  kMul,
  kDiv,
  kMaximum,
  kMinimum,
  kNeg,
  kAbs,
  kSqrt,
  kRsqrt,
  kReciprocal,
  kMean,  // of the axis n0, as kSum and kMax
  kSum,
  kMax,
  kActivation = 16,  // + an Activation
  kRelu = 30,
  kTop,  // the places along n0 of the n1 largest elements of a, in the order of torch.topk
  kPick  // the element of a along n0 whose place is b
};

struct RowOperand {
  enum class Kind : int32_t { kNone, kNumber, kScratch, kFloat32, kModel };  // kModel: of the model's dtype
  enum class Row : int32_t { kConstant, kNode, kPosition, kToken, kSlot };
  Kind kind;
  Row row;             // which row a node reads or writes
  float number;        // kNumber
  void* data;          // row 0; kScratch: null, the node's own
  int64_t offset;      // elements within a row
  int64_t row_stride;  // elements
  int64_t rows;        // kPosition, kToken: other rows are the nearest; kSlot: others are left out
  int64_t stride[3];   // elements, for n2, n1, n0
};

struct RowInstruction {
  RowOp op;
  bool round;  // the result is rounded to the model's dtype
  int64_t size[3];
  RowOperand to, a, b;
};

struct RowsArgs {
  DType dtype;
  int64_t first, nodes, count, scratch;  // nodes `first` to N, of instructions, floats per node
  const RowInstruction* instructions;
  const int64_t* positions;  // (N,)
  const int64_t* tokens;     // (N,)
  int64_t length;            // node n is in slot length + n - first
};

}  // namespace cerberus
