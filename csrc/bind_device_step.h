// The ops around a step on a GPU: making it of its code, planning it for some nodes and a cache, running it.
// For the files that register them, each with a class that says what its device does, as bind.h has it, and:
//
//   static bool is_mine(const Tensor& tensor);  // on the device
//   static constexpr const char* kName;
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "check.h"
#include "packing.h"
#include "prepare.h"
#include "step/device_step.h"

namespace cerberus {

template <typename Device>
class DeviceSteps {
 public:
  static int64_t make(std::vector<Tensor> tensors, Tensor code) {
    const Check check("make_device_step");
    if (dtype_of(code) != ScalarType::Long || code.dim() != 1 || !code.is_contiguous() ||
        device_type(code) != aoti_torch_device_type_cpu())
      check.fail("code", "(n,) torch.int64, contiguous, on cpu", shape_text(code));
    const int64_t* numbers = static_cast<const int64_t*>(code.const_data_ptr());
    const int64_t dtype = code.size(0) > 1 ? numbers[1] : 0;
    const ScalarType type = dtype == static_cast<int64_t>(DType::kBFloat16)  ? ScalarType::BFloat16
                            : dtype == static_cast<int64_t>(DType::kFloat16) ? ScalarType::Half
                                                                             : ScalarType::Float;
    std::vector<StepConstant> constants;
    for (const Tensor& tensor : tensors) {
      if (!tensor.defined() || !Device::is_mine(tensor))
        check.fail("tensors", std::string("on ") + Device::kName, "another device");
      if (tensor.get_device_index() != tensors[0].get_device_index())
        check.fail("tensors", "on one device", device_text(tensor));
      if (!tensor.is_contiguous()) check.fail("tensors", "contiguous", "shape " + shape_text(tensor));
      const Packing packing = tensor.dim() == 1 ? packing_of(dtype_of(tensor)) : Packing::kNone;
      if (packing == Packing::kNone && dtype_of(tensor) != type && dtype_of(tensor) != ScalarType::Float)
        check.fail("tensors", "torch.float32, " + dtype_text(type) + " or packed",
                   dtype_text(dtype_of(tensor)));
      const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
      constants.push_back({const_cast<void*>(tensor.const_data_ptr()),
                           packing == Packing::kNone ? tensor.numel() : bytes / 2,
                           tensor.dim() > 0 ? tensor.size(tensor.dim() - 1) : 1,
                           dtype_of(tensor) == ScalarType::Float, packing});
    }
    DeviceStep step(std::move(constants), numbers, code.size(0));
    const std::lock_guard<std::mutex> lock(mutex());
    static int64_t last = 0;
    all()[++last] = std::shared_ptr<Held>(new Held{std::move(tensors), std::move(step), type, {}, {}});
    return last;
  }

  // Returns the number of launches.
  static int64_t plan(int64_t number, Tensor cache, Tensor hidden, Tensor logits) {
    const std::shared_ptr<Held> held = find("plan_device_step", number);
    Check check("plan_device_step");
    const StepCall call = call_of(check, *held, cache, hidden, logits);
    const Device device(cache);
    std::unique_ptr<Planned> planned(new Planned{call, cache, hidden, logits, {}, {}, {}});
    const std::lock_guard<std::mutex> lock(held->running);
    const auto lay_out = [&](void* memory, const void* instructions) {
      return held->step.plan(call, memory, static_cast<const RowInstruction*>(instructions));
    };
    const DevicePlan counted = lay_out(nullptr, nullptr);
    const int64_t bytes = counted.instructions.size() * sizeof(RowInstruction);
    planned->memory = new_bytes(cache, counted.memory_bytes);
    planned->instructions = new_bytes(cache, bytes);
    planned->plan = lay_out(planned->memory.mutable_data_ptr(), planned->instructions.const_data_ptr());
    Tensor host = torch::stable::empty({std::max<int64_t>(1, bytes)}, ScalarType::Byte);
    if (bytes > 0) std::memcpy(host.mutable_data_ptr(), planned->plan.instructions.data(), bytes);
    torch::stable::copy_(planned->instructions, host);
    const int64_t launches = static_cast<int64_t>(planned->plan.launches.size());
    held->plans.push_back(std::move(planned));
    return launches;
  }

  static void run(int64_t number, Tensor tokens, Tensor positions, Tensor length, Tensor ancestors,
                  Tensor cache, Tensor hidden, Tensor logits) {
    constexpr const char* kOp = "run_device_step";
    const std::shared_ptr<Held> held = find(kOp, number);
    Check check(kOp);
    const StepCall call = call_of(check, *held, cache, hidden, logits);
    const int64_t nodes = call.nodes;
    check.integer(tokens, "tokens", 1, "(N,)", ScalarType::Long);
    check.sizes(tokens, "tokens", "(N,)", {nodes});
    check.integer(positions, "positions", 1, "(N,)", ScalarType::Long);
    check.sizes(positions, "positions", "(N,)", {nodes});
    check.integer(length, "length", 1, "(1,)", ScalarType::Long);
    check.sizes(length, "length", "(1,)", {1});
    check.integer(ancestors, "ancestors", 2, "(N, W)", ScalarType::Long);
    check.sizes(ancestors, "ancestors", "(N, W)", {nodes, call.texts[0].words});
    const std::lock_guard<std::mutex> lock(held->running);
    const Planned* planned = nullptr;
    for (const std::unique_ptr<Planned>& other : held->plans)
      if (other->is_for(call)) planned = other.get();
    if (!planned) check.fail("cache, hidden and logits", "those of a plan", "others");
    const auto integers = [](const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); };
    const DeviceRun args = {&planned->plan, integers(tokens), integers(positions), integers(length),
                            integers(ancestors)};
    const Device device(cache);
    device.run(kOp, &run_device_step, args);
  }

  static void free(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex());
    all().erase(number);
  }

 private:
  // Launches, and the tensors whose memory they read and write.
  struct Planned {
    StepCall call;
    Tensor cache, hidden, logits, memory, instructions;
    DevicePlan plan;

    bool is_for(const StepCall& other) const {
      const StepText &text = call.texts[0], &others = other.texts[0];
      return other.nodes == call.nodes && others.capacity == text.capacity && others.cache == text.cache &&
             other.hidden == call.hidden && other.logits == call.logits;
    }
  };
  struct Held {
    std::vector<Tensor> tensors;
    DeviceStep step;
    ScalarType type;
    std::vector<std::unique_ptr<Planned>> plans;
    std::mutex running;
  };

  static std::unordered_map<int64_t, std::shared_ptr<Held>>& all() {
    static auto* steps =
        new std::unordered_map<int64_t, std::shared_ptr<Held>>;  // tensors may not outlive torch
    return *steps;
  }
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static std::shared_ptr<Held> find(const char* op, int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex());
    const auto found = all().find(number);
    if (found == all().end())
      Check(op).fail("step", "one that make_device_step has returned", std::to_string(number));
    return found->second;
  }

  static Tensor new_bytes(const Tensor& like, int64_t bytes) {
    return torch::stable::new_empty(like, {std::max<int64_t>(1, bytes)}, ScalarType::Byte);
  }

  // The checked sizes and addresses of what is there for longer than one run.
  static StepCall call_of(Check& check, const Held& held, const Tensor& cache, const Tensor& hidden,
                          const Tensor& logits) {
    const DeviceStep& step = held.step;
    check.floating(cache, "cache", 5, "(C, 1, Hkv, S, E)");
    if (!Device::is_mine(cache)) check.fail("cache", std::string("on ") + Device::kName, device_text(cache));
    const int64_t planes = 2 * step.layers(), capacity = cache.size(3);
    check.that(cache.scalar_type() == held.type, "cache", dtype_text(held.type) + " like the step",
               dtype_text(cache.scalar_type()));
    check.that(cache.size(0) >= planes, "cache", "(C, 1, Hkv, S, E) with C >= " + std::to_string(planes),
               cache.size(0));
    check.sizes(cache, "cache", "(C, 1, Hkv, S, E)",
                {cache.size(0), 1, step.kv_heads(), capacity, step.head_size()});
    check.floating(hidden, "hidden", 2, "(N, D)");
    const int64_t nodes = hidden.size(0);
    check.that(nodes >= 1 && nodes <= 1 << 16, "hidden", "(N, D) with N from 1 to 65536", nodes);
    check.sizes(hidden, "hidden", "(N, D)", {nodes, step.hidden_size()});
    check.floating(logits, "logits", 2, "(N, V)");
    check.sizes(logits, "logits", "(N, V)", {nodes, step.vocabulary()});
    StepCall call{};
    call.nodes = nodes;
    call.texts = {{0, nodes, (nodes + 63) / 64, capacity, nullptr, nullptr, cache.mutable_data_ptr()}};
    call.hidden = hidden.mutable_data_ptr();
    call.logits = logits.mutable_data_ptr();
    call.logit_rows = nodes;
    return call;
  }
};

inline void define_device_steps(torch::stable::detail::StableLibrary& m) {
  m.def("make_device_step(Tensor[] tensors, Tensor code) -> int");
  m.def("plan_device_step(int step, Tensor cache, Tensor hidden, Tensor logits) -> int");
  m.def(
      "run_device_step(int step, Tensor tokens, Tensor positions, Tensor length, Tensor ancestors, "
      "Tensor(a!) "
      "cache, Tensor(b!) hidden, Tensor(c!) logits) -> ()");
  m.def("free_device_step(int step) -> ()");
}

template <typename Device>
void register_device_steps(torch::stable::detail::StableLibrary& m) {
  using Steps = DeviceSteps<Device>;
  m.impl("make_device_step", TORCH_BOX(&Steps::make));
  m.impl("plan_device_step", TORCH_BOX(&Steps::plan));
  m.impl("run_device_step", TORCH_BOX(&Steps::run));
  m.impl("free_device_step", TORCH_BOX(&Steps::free));
}

}  // namespace cerberus
