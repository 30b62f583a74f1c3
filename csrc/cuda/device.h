// What the current device offers to a launch.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdint>

namespace cerberus {

struct DeviceLimits {
  int multiprocessors;
  bool overlaps_launches;  // programmatic dependent launch: compute capability 9.0 and up
};

// Of the current device. Asked once for each: asking costs more than a launch.
inline cudaError_t device_limits(DeviceLimits& limits) {
  constexpr size_t kRemembered = 64;  // devices
  static std::array<std::atomic<int64_t>, kRemembered> known{};
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const bool remembered = static_cast<size_t>(device) < kRemembered;
  int64_t packed = remembered ? known[device].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    int count = 0, major = 0;
    cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error != cudaSuccess) return error;
    packed = int64_t{count} * 2 + (major >= 9);
    if (remembered) known[device].store(packed, std::memory_order_relaxed);
  }
  limits = {static_cast<int>(packed / 2), packed % 2 != 0};
  return cudaSuccess;
}

}  // namespace cerberus
