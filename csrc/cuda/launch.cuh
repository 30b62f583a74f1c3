// The one place that launches a kernel, and where a run-time property of a call becomes a template argument.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "args.h"
#include "copy.cuh"

namespace cerberus {

// Launches `blocks` blocks of `threads` threads; none for an empty call. Unlike <<<>>> and cudaGetLastError
// it returns the error of this launch only, never one that somebody else left behind.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   Arguments&&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max())
    return cudaErrorInvalidConfiguration;  // grid.x ends there
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
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
