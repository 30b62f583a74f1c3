// A step as launches of CUDA kernels: the same code as on a CPU (step.h), with these differences:
//   - parts of products: consecutive ones of one input and one output are one launch for each kind of weights
//     among them, so that products are joined and still read the model's own weights
//   - weights lie as the model has them, or in blocks (blocks/device_blocks.h), and groups are not
//   transposed.
// Between the launches of a step there is no Python, no copy and no wait: it may be captured.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda/step_kernels.h"
#include "step/step.h"

namespace cerberus {

// One launch, or the two of an attention whose slots are split.
struct DeviceLaunch {
  int64_t kind;  // of its stage; that of parts is kProductStage
  StepProductArgs product;
  StepGroupedArgs grouped;
  StepRowsArgs rows;
  TreeAttentionArgs attention;
};

// The launches of a step for one number of nodes and one cache, with every address in its place but for those
// of tokens, positions, length and ancestors. It reads the step's constants.
struct DevicePlan {
  int64_t memory_bytes;                      // that the launches need for what is in between
  std::vector<RowInstruction> instructions;  // to be copied to the device
  std::vector<DeviceLaunch> launches;
};

class DeviceStep : public Step {
 public:
  // Throws std::runtime_error as Step does, and where the code asks for what the kernels do not do.
  DeviceStep(std::vector<StepConstant> constants, const int64_t* code, int64_t size);

  // call: of one text, with the logits of all nodes; its tokens, positions, length and ancestors are not
  // looked at. memory: plan.memory_bytes on the device, at a multiple of 64; null: it is only counted.
  // instructions: where those of the plan are going to be.
  DevicePlan plan(const StepCall& call, void* memory, const RowInstruction* instructions);

 private:
  class Memory;

  void check_limits() const;
  void products(size_t& stage, int64_t nodes, std::vector<DeviceLaunch>& to) const;
  DeviceLaunch grouped(const Grouped& grouped, int64_t nodes) const;
};

// A run of a plan's launches: what a step's run has in StepCall.
struct DeviceRun {
  const DevicePlan* plan;
  const int64_t* tokens;
  const int64_t* positions;
  const int64_t* length;
  const int64_t* ancestors;
};
// Enqueues all launches on `stream`; the error of the first one that failed.
cudaError_t run_device_step(const DeviceRun& run, cudaStream_t stream);

}  // namespace cerberus
