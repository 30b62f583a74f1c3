// The one place that launches a kernel, and where a run-time property of a call becomes a template argument.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "args.h"
#include "copy.cuh"
#include "device.h"

namespace cerberus {

// How to launch a kernel.
struct Launch {
  int64_t blocks;            // of a grid of one dimension; 0: an empty call, nothing is launched
  int threads;               // of a block
  int64_t shared_bytes = 0;  // dynamic_shared() of a block
  bool cooperative = false;  // all blocks are resident at once, so that there may be a grid_barrier()
  bool overlaps = false;  // may begin before the launch before it has ended; see wait_for_previous_launch()
};

// A launch that may begin before the one before it has ended.
inline Launch overlapping(int64_t blocks, int threads, int64_t shared_bytes = 0) {
  return {blocks, threads, shared_bytes, false, true};
}

// A kernel may have 48 KB of dynamic shared memory without being asked for more. Until it is, such a launch
// is refused, and said to find room nowhere.
template <typename... Parameters>
cudaError_t allow_shared_bytes(void (*kernel)(Parameters...), int64_t bytes) {
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (bytes <= kWithoutAsking) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// Unlike <<<>>> and cudaGetLastError it returns the error of this launch only, never one that somebody else
// left behind.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, cudaStream_t stream,
                   Arguments&&... arguments) {
  if (how.blocks == 0) return cudaSuccess;
  if (how.blocks > std::numeric_limits<int32_t>::max())
    return cudaErrorInvalidConfiguration;  // grid.x ends there
  if (const cudaError_t error = allow_shared_bytes(kernel, how.shared_bytes); error != cudaSuccess)
    return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (how.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  bool may_overlap = false;
  if (how.overlaps) {
    const cudaError_t error = waits_for_previous_launch(reinterpret_cast<const void*>(kernel), may_overlap);
    if (error != cudaSuccess) return error;
  }
  if (may_overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// How many blocks of such a launch the whole current device holds at once.
template <typename... Parameters>
cudaError_t resident_blocks(void (*kernel)(Parameters...), int threads, int64_t shared_bytes,
                            int64_t& blocks) {
  DeviceLimits limits = {};
  if (const cudaError_t error = device_limits(limits); error != cudaSuccess) return error;
  if (const cudaError_t error = allow_shared_bytes(kernel, shared_bytes); error != cudaSuccess) return error;
  int each = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads,
                                                                          static_cast<size_t>(shared_bytes));
  blocks = static_cast<int64_t>(each) * limits.multiprocessors;
  return error;
}

constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// f(T{}) for the element type T of the call.
template <typename F>
cudaError_t dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(bf16{});
    case DType::kFloat16:
      return f(fp16{});
  }
  return cudaErrorInvalidValue;
}

// f(T{}, integral_constant<int, kVector>): how many elements one load takes: 16 bytes where every row of
// `row_size` elements starts at a multiple of 16 bytes, else one element.
template <typename F, typename... Pointers>
cudaError_t dispatch_vector(DType dtype, int64_t row_size, F&& f, Pointers... pointers) {
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVector = 16 / sizeof(T);
    const bool aligned = row_size % kVector == 0 && (is_aligned16(pointers) && ...);
    return aligned ? f(element, std::integral_constant<int, kVector>{})
                   : f(element, std::integral_constant<int, 1>{});
  });
}

// f(Unit{}) for the largest unit in which rows of `row_size` elements can be moved: 16 bytes or one element.
template <typename F, typename... Pointers>
cudaError_t dispatch_unit(int64_t element_bytes, int64_t row_size, F&& f, Pointers... pointers) {
  if (row_size * element_bytes % 16 == 0 && (is_aligned16(pointers) && ...)) return f(uint4{});
  if (element_bytes == 4) return f(uint32_t{});
  if (element_bytes == 2) return f(uint16_t{});
  return cudaErrorInvalidValue;
}

}  // namespace cerberus
