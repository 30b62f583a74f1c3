// Matrix products on tensor cores. One of the three files with intrinsics and PTX; their meaning on a host,
// for the emulation, is in simt/mma.h.
//
// mma_16x8x16: D (16, 8) += A (16, 16) B (16, 8), A and B of a 16-bit type, D float32. All 32 lanes of a warp
// call it. With g = lane / 4 and t = lane % 4, a lane holds, two 16-bit elements to a register, the lower
// index in the low half:
//   a[0] = A[g][2t, 2t+1]        a[1] = A[g+8][2t, 2t+1]      a[2] = A[g][2t+8, 2t+9]    a[3] = A[g+8][2t+8,
//   2t+9] b[0] = B[2t, 2t+1][g]        b[1] = B[2t+8, 2t+9][g] d[0], d[1] = D[g][2t, 2t+1]  d[2], d[3] =
//   D[g+8][2t, 2t+1]
// The sum over the inner index does not care about its order, so both operands may be permuted along it
// together.
#pragma once

#include <cstdint>
#include <cstring>

#include "copy.cuh"
#include "reduce.cuh"

#ifndef __CUDACC__
#include "simt/mma.h"
#endif

namespace cerberus {

#ifdef __CUDACC__
template <typename T>
__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, fp16>, "tensor cores multiply bf16 and fp16 here");
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l names row l % 8 of matrix l / 8 by the
// address of its 8 elements, a multiple of 16 bytes. Of matrix i a lane gets in r[i] the elements [lane /
// 4][2 (lane % 4)] and the one after it.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices: elements [2 (lane % 4)][lane / 4] and [2 (lane % 4) + 1][lane / 4].
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 2^x to 22 bits in one instruction; results below the normal numbers are 0.
__device__ inline float exp2_flushed(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x / y to 2 ulp in two instructions, for y of 2^-126 to 2^126.
__device__ inline float divided(float x, float y) {
  float quotient;
  asm("div.approx.f32 %0, %1, %2;" : "=f"(quotient) : "f"(x), "f"(y));
  return quotient;
}
#endif

// Two numbers rounded to T in one register, the first in the low half: as the operands of a product hold
// them.
template <typename T>
__device__ inline uint32_t pack2(float low, float high) {
  const T both[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  std::memcpy(&bits, both, sizeof(bits));
  return bits;
}

}  // namespace cerberus
