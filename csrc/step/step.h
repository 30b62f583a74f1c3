// One forward of a model over the nodes of a tree, as a program: traced once, run for any number of nodes.
//
// The code is a list of integers; cerberus_ext/runtime/fused/program.py writes it.
//
//   header      version (1), dtype (0 float32, 1 bfloat16, 2 float16), layers, key/value heads, head size,
//               buffers, stages, buffer of the hidden states, buffer of the logits
//   buffer      width (elements per node), kind (0: of the model's dtype, 1: float32)
//   stage       its kind, then
//     product   0: input buffer, output buffer, weight (constant), I, O, bias (constant) or -1, Packing
//     rows      1: scratch (floats per node), instructions, and each of them: op (RowOp), round (0, 1), n2,
//     n1, n0,
//                  then destination, a, b: space, index, offset, and the strides along n2, n1, n0
//     attention 2: layer, query buffer, output buffer, query heads, scale, window, softcap, sinks (constant)
//     or -1;
//                  scale and softcap as the bits of a float32
//     grouped   3: what a product has, with weights and biases of all groups; transposed (0, 1), groups,
//                  buffer (float32) of the groups that a node names, how many, shared (0, 1): one input for
//                  all of them
//     part      4: what a product has, and the element of the output at which it begins: on CUDA, see
//                  step/device_step.h
//   space       0 none, 1 scratch, 2 buffer, 3 constant, 4 constant by position, 5 constant by token, 6 keys
//   and
//               7 values of layer `index` in the node's slot, element (head, e) at head * head size + e, 8
//               the float32 whose bits `offset` is
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "args.h"
#include "cpu/parallel.h"

namespace cerberus {

// Of such a weight, counted in elements of the dtype; 0: this device has no weights packed so.
int64_t packed_elements(DType dtype, Packing packing, int64_t out_size, int64_t in_size);

// A tensor that a step reads: contiguous, in float32 or in the model's dtype.
struct StepConstant {
  void* data;
  int64_t elements, width;  // width: of the last axis
  bool is_float32;
  Packing packing;  // of bytes, of which `elements` counts those of the model's dtype
};

// What a run needs of one text: its nodes follow those of the text before.
struct StepText {
  int64_t first, nodes, words, capacity;
  const int64_t* length;     // (1,)
  const int64_t* ancestors;  // (nodes, words)
  void* cache;               // (planes, 1, Hkv, S, E)
};

// What a run reads and writes, see run_step.
struct StepCall {
  int64_t nodes;  // N, of all texts
  const int64_t* tokens;
  const int64_t* positions;
  std::vector<StepText> texts;
  void* hidden;  // (N, D)
  void* logits;  // (logit_rows, V): of the last nodes
  int64_t logit_rows;
};

class Step {
 public:
  // Throws std::runtime_error where the code is not one of the above, or would have a kernel read or write
  // outside of what there is.
  Step(std::vector<StepConstant> constants, const int64_t* code, int64_t size);

  void run(const StepCall& call, const Parallel& parallel);

  DType dtype() const { return dtype_; }
  int64_t layers() const { return layers_; }
  int64_t kv_heads() const { return kv_heads_; }
  int64_t head_size() const { return head_size_; }
  int64_t hidden_size() const { return buffers_[hidden_].width; }
  int64_t vocabulary() const { return buffers_[logits_].width; }
  // Whether a run may make fewer logits than there are nodes: what makes them comes behind all else.
  bool ends_with_logits() const { return ends_with_logits_; }
  // Nanoseconds of each stage, summed over the runs since `time_stages(true)`.
  void time_stages(bool on);
  const std::vector<int64_t>& stage_times() const { return times_; }

 protected:
  // last_kind: of the stages that this step may have, the last one.
  Step(std::vector<StepConstant> constants, const int64_t* code, int64_t size, int64_t last_kind);

  struct Buffer {
    int64_t width;
    bool is_float32;
    std::vector<char> memory;
    void* data;
  };
  // Operands as the code has them; resolve() puts the addresses in.
  struct Operand {
    int64_t space, index, offset, stride[3];
  };
  struct Instruction {
    int64_t op, round, size[3];
    Operand operands[3];
  };
  struct Product {
    int64_t input, output, weight, in_size, out_size, bias;
    Packing packing;
    int64_t first;  // element of the output
  };
  struct Grouped {
    Product product;  // of a group
    int64_t groups, chosen, each;
    bool transposed, shared;
  };
  struct Rows {
    int64_t scratch, first, count;  // of instructions_
    int64_t slots;  // where those of a text begin, see by_text_; -1: nothing is written to a cache
  };
  struct Attention {
    int64_t layer, query, output, query_heads, window, sinks;
    float scale, softcap;
  };
  struct Stage {
    int64_t kind;
    Product product;
    Rows rows;
    Attention attention;
    Grouped grouped;
  };
  class Reader;

  void read_product(Reader& code, Product& product, bool is_part) const;
  void read_grouped(Reader& code, Grouped& grouped) const;
  void read_weight(Reader& code, Product& product) const;
  void check_weight(Reader& code, const Product& product, int64_t groups) const;
  void read_rows(Reader& code, Rows& rows);
  void read_instruction(Reader& code, int64_t scratch, Instruction& instruction) const;
  void read_attention(Reader& code, Attention& attention) const;
  void check_operand(Reader& code, const Operand& operand, const int64_t (&size)[3], int64_t scratch,
                     bool is_written) const;
  int64_t operand_size(Reader& code, const Operand& operand, int64_t scratch) const;
  void find_end();
  bool is_used(const Stage& stage, int64_t buffer) const;
  void provide(const StepCall& call);
  void* rows_from(int64_t buffer, int64_t node) const;
  // All but the splits, and what these need.
  TreeAttentionArgs attention_args(const Attention& attention, const StepText& text) const;
  void run_product(const Product& product, int64_t first, int64_t nodes, const Parallel& parallel) const;
  void run_rows(const Rows& rows, int64_t first, const StepCall& call, const Parallel& parallel) const;
  void run_attention(const Attention& attention, const StepCall& call, const Parallel& parallel);
  void run_grouped(const Grouped& grouped, int64_t nodes, const Parallel& parallel);
  void resolve_rows(const Rows& rows, const StepText& text, std::vector<RowInstruction>& to) const;
  RowOperand resolve(const Operand& operand, const StepText& text) const;
  void* plane(const StepText& text, int64_t index) const;
  int64_t element_bytes(bool is_float32) const { return is_float32 || dtype_ == DType::kFloat32 ? 4 : 2; }

  std::vector<StepConstant> constants_;
  DType dtype_;
  int64_t layers_, kv_heads_, head_size_, hidden_, logits_;
  std::vector<Buffer> buffers_;
  std::vector<Stage> stages_;
  std::vector<Instruction> instructions_;
  std::vector<RowInstruction> resolved_;
  std::vector<std::vector<RowInstruction>> by_text_;  // of the stages that write to a cache
  int64_t slots_ = 0;                                 // instructions of those stages
  // Stages from here on only lead from the hidden states to the logits: they run for nodes that have logits.
  int64_t end_ = 0;
  bool ends_with_logits_ = false;
  int64_t nodes_ = 0;                              // that the buffers hold
  int64_t without_logits_ = 0;                     // the first nodes of the latest run
  std::vector<std::pair<void*, int64_t>> caches_;  // of the latest run's texts, and their capacities
  std::vector<TreeAttentionArgs> attentions_;      // of the texts, of the stage that runs
  std::vector<int64_t> chosen_;                    // by the nodes, of the stage that runs
  bool timed_ = false;
  std::vector<int64_t> times_;
};

}  // namespace cerberus
