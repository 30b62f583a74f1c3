// What the current device offers to a launch.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstddef>

namespace cerberus {

// A positive number that belongs to a device, asked for once: asking costs more than a launch.
class OfEachDevice {
 public:
  // ask(device, value): of the current device.
  template <typename Ask>
  cudaError_t get(int& value, Ask ask) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    const bool remembered = static_cast<size_t>(device) < kRemembered;
    value = remembered ? known_[device].load(std::memory_order_relaxed) : 0;
    if (value != 0) return cudaSuccess;
    const cudaError_t error = ask(device, value);
    if (error == cudaSuccess && remembered) known_[device].store(value, std::memory_order_relaxed);
    return error;
  }

 private:
  static constexpr size_t kRemembered = 64;  // devices
  std::array<std::atomic<int>, kRemembered> known_{};
};

struct DeviceLimits {
  int multiprocessors;
};

// Of the current device.
inline cudaError_t device_limits(DeviceLimits& limits) {
  static OfEachDevice count;
  return count.get(limits.multiprocessors, [](int device, int& value) {
    return cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
  });
}

// Whether the code that the current device runs of `kernel` has the instruction of
// wait_for_previous_launch(): if it was compiled for compute capability 9.0 or newer. A newer device also
// runs what its driver makes of PTX for 8.0, which does not wait. All kernels are compiled for one list: the
// first to ask asks for all.
inline cudaError_t waits_for_previous_launch(const void* kernel, bool& waits) {
  static OfEachDevice version;
  int value = 0;
  const cudaError_t error = version.get(value, [=](int, int& ptx_version) {
    cudaFuncAttributes attributes = {};
    const cudaError_t asked = cudaFuncGetAttributes(&attributes, kernel);
    ptx_version = attributes.ptxVersion;
    return asked;
  });
  waits = value >= 90;
  return error;
}

}  // namespace cerberus
