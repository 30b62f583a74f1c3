// The functions of the CUDA runtime that csrc/cuda calls, for the emulated device: what a launch may ask for
// is checked here, as the device would.
#include <algorithm>
#include <map>
#include <utility>

#include "cuda_runtime.h"
#include "emulator.h"

namespace simt {
namespace {

// Of an H100, in bytes. A block of a multiprocessor takes 1 KB beyond what it asked for.
constexpr size_t kSharedOfMultiprocessor = 228 << 10, kSharedOfBlock = 227 << 10,
                 kSharedWithoutAsking = 48 << 10;

std::map<const void*, int64_t> dynamic_shared_limit;  // of a kernel, where it asked

bool is_allowed(const void* kernel, size_t shared_bytes) {
  const auto limit = dynamic_shared_limit.find(kernel);
  return shared_bytes <= kSharedWithoutAsking ||
         (limit != dynamic_shared_limit.end() && shared_bytes <= static_cast<size_t>(limit->second));
}

}  // namespace

cudaError_t limit_dynamic_shared(const void* kernel, int64_t bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kSharedOfBlock) return cudaErrorInvalidValue;
  dynamic_shared_limit[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t resident_blocks(int* blocks, const void* kernel, int threads, size_t shared_bytes) {
  if (threads < 1 || threads > kMaxBlockThreads) return cudaErrorInvalidValue;
  *blocks = 0;
  if (!is_allowed(kernel, shared_bytes)) return cudaSuccess;
  const size_t by_shared = kSharedOfMultiprocessor / (shared_bytes + 1024), by_threads = 2048 / threads;
  *blocks = static_cast<int>(std::min({by_shared, by_threads, static_cast<size_t>(device().blocks_each)}));
  return cudaSuccess;
}

cudaError_t check_and_enqueue(const cudaLaunchConfig_t& config, const void* kernel,
                              std::function<void()> body) {
  const auto volume = [](const dim3& size) { return uint64_t{size.x} * size.y * size.z; };
  Launch launch = {config.gridDim.x, config.blockDim.x, config.dynamicSmemBytes, false, false,
                   kernel,           std::move(body)};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative)
      launch.cooperative = attribute.val.cooperative != 0;
    else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      launch.overlaps = attribute.val.programmaticStreamSerializationAllowed != 0;
    else
      return cudaErrorInvalidValue;
  }
  // The kernels here have grids and blocks of one dimension and whole warps.
  if (volume(config.gridDim) != launch.blocks || volume(config.blockDim) != launch.threads ||
      launch.blocks == 0 || launch.blocks > INT32_MAX || launch.threads == 0 ||
      launch.threads > kMaxBlockThreads || launch.threads % kWarpLanes != 0)
    return cudaErrorInvalidConfiguration;
  if (!is_allowed(kernel, launch.shared_bytes)) return cudaErrorInvalidValue;
  if (launch.cooperative) {
    int each = 0;
    resident_blocks(&each, kernel, static_cast<int>(launch.threads), launch.shared_bytes);
    if (launch.blocks > static_cast<unsigned>(each * device().multiprocessors))
      return cudaErrorCooperativeLaunchTooLarge;
  }
  enqueue(std::move(launch));
  return cudaSuccess;
}

}  // namespace simt

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
  }
  return "unrecognized error code";
}

// Past those that cuda/device.h remembers the limits of: here they may change.
cudaError_t cudaGetDevice(int* device) {
  *device = 1 << 20;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = simt::device().ptx_version;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = simt::device().multiprocessors;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
