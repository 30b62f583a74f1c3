// The instructions that CUDA C++ has no function for, as PTX: copies that run while a thread goes on, shared
// memory of a size chosen at the launch, the order of launches, products of tensor cores, fast arithmetic.
// Included as "cuda/ptx.cuh", so that the include path decides which file that is: a test that runs the
// kernels on a CPU has another one of this name, which says what each of these functions means.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace cerberus {

// The block's shared memory of the size that the launch asked for (Launch::shared_bytes), at a multiple of 16
// bytes.
template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ uint4 dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, both at multiples of 16 bytes, or 16 zero bytes where `valid` is
// false, and then nothing is read. The thread goes on at once; the bytes are there for it after end_copies
// and wait_for_copies, and for the other threads of the block after a barrier that follows. Not kept in the
// L1 cache; into the L2 cache come all 128 bytes around them, for who reads 16 bytes will read those, too.
__device__ inline void start_copy16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// Closes the group of the copies that this thread has started since the last call.
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the kPending groups closed last are still under way.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

// 16 bytes of global memory, or 16 zero bytes where `valid` is false, and then nothing is read. Into the
// registers where they belong: of a load in an `if` the compiler makes one into others and a move behind it,
// which waits.
__device__ inline uint4 load16(const void* global, bool valid) {
  uint4 bits;
  asm volatile(
      "{\n"
      "  .reg .pred valid;\n"
      "  setp.ne.b32 valid, %5, 0;\n"
      "  mov.b32 %0, 0;\n"
      "  mov.b32 %1, 0;\n"
      "  mov.b32 %2, 0;\n"
      "  mov.b32 %3, 0;\n"
      "  @valid ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(bits.x), "=&r"(bits.y), "=&r"(bits.z), "=&r"(bits.w)
      : "l"(global), "r"(static_cast<int>(valid))
      : "memory");
  return bits;
}

// Asks for the 128 bytes around `pointer` to be brought into the L2 cache. A hint.
__device__ inline void prefetch_l2(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(pointer));
}

// `pointer` is in global memory: said where the compiler cannot follow it there, so that its loads are global
// ones and not generic ones.
__device__ inline void assume_global(const void* pointer) { __builtin_assume(__isGlobal(pointer)); }

// The same bits, but the compiler does not know them: grids have one dimension here. Of an instruction with
// two constants one has to be in a register, and it would take the one that is another in each of them, and
// move it there every time.
__device__ inline uint32_t in_register(uint32_t bits) { return bits * gridDim.y; }

// Until the launch before this one on the stream is complete and its writes are visible; at once where this
// launch did not ask to overlap it (Launch::overlaps). The first thing a kernel does that reads what the one
// before wrote.
__device__ inline void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on the next launch on the stream may begin, if it asked to overlap this one.
__device__ inline void allow_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// D (16, 8) += A (16, 16) B (16, 8) on tensor cores, A and B of T = __nv_bfloat16 or __half, D float32. All
// 32 lanes of a warp call it. With g = lane / 4 and t = lane % 4, a lane holds, two 16-bit elements to a
// register, the lower index in the low half:
//   a[0] = A[g][2t, 2t+1]        a[1] = A[g+8][2t, 2t+1]
//   a[2] = A[g][2t+8, 2t+9]      a[3] = A[g+8][2t+8, 2t+9]
//   b[0] = B[2t, 2t+1][g]        b[1] = B[2t+8, 2t+9][g]
//   d[0], d[1] = D[g][2t, 2t+1]  d[2], d[3] = D[g+8][2t, 2t+1]
// The sum over the inner index does not care about its order, so both operands may be permuted along it
// together.
template <typename T>
__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __half>, "tensor cores multiply bf16 and fp16 here");
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l names row l % 8 of matrix l / 8 by the
// address of its 8 elements, a multiple of 16 bytes. Of matrix i a lane gets in r[i] the elements
// [lane / 4][2 (lane % 4)] and the one after it.
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

}  // namespace cerberus
