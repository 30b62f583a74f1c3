// Small kernels that test the emulator: what it must let pass, and what it must refuse. Compiled with it, see
// emulator/CMakeLists.txt, and called from test_emulator.py and test_sanitizers.py.
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "cuda/copy.cuh"
#include "cuda/reduce.cuh"

namespace {

using namespace cerberus;

constexpr int kThreads = 128;

__device__ int global_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

// --- barriers and shared memory

// Every thread gets what the thread of the opposite index wrote.
template <bool kBarrier>
__global__ void reverse(int32_t* data, int) {
  __shared__ int32_t exchange[kThreads];
  exchange[threadIdx.x] = data[global_thread()];
  if (kBarrier) __syncthreads();
  data[global_thread()] = exchange[blockDim.x - 1 - threadIdx.x];
}

// Shared memory as a block finds it: static, dynamic. Then it leaves something there for the next block.
__global__ void find_shared(int32_t* data, int) {
  __shared__ int32_t statically[kThreads];
  int32_t* const dynamic = dynamic_shared<int32_t>();
  data[2 * global_thread()] = statically[threadIdx.x];
  data[2 * global_thread() + 1] = dynamic[threadIdx.x];
  statically[threadIdx.x] = dynamic[threadIdx.x] = 7;
}

// Blocks that run at the same time do not see each other's shared memory.
__global__ void own_shared(int32_t* data, int rounds) {
  __shared__ int32_t mine;
  if (threadIdx.x == 0) mine = 100 * blockIdx.x;
  for (int round = 0; round < rounds; ++round) {
    grid_barrier();
    if (threadIdx.x == 0) ++mine;
  }
  __syncthreads();
  data[global_thread()] = mine;
}

__global__ void leave_before_barrier(int32_t*, int) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

// --- warps

__global__ void warp_functions(int32_t* data, int) {
  const int lane = lane_index(), i = global_thread() * 5;
  data[i] = shuffle(lane, 7);
  data[i + 1] = shuffle_xor(lane, 5);
  data[i + 2] = shuffle_up(lane, 3);
  data[i + 3] = static_cast<int32_t>(ballot(lane % 3 == 0));
  data[i + 4] = warp_reduce(lane, Sum{});
}

__global__ void diverge(int32_t* data, int) {
  if (lane_index() == 3)
    warp_barrier();
  else
    data[global_thread()] = shuffle(lane_index(), 0);
}

__global__ void diverge_at_barrier(int32_t* data, int) {
  if (lane_index() == 3)
    __syncthreads();
  else
    data[global_thread()] = shuffle(lane_index(), 0);
}

__global__ void leave_before_shuffle(int32_t* data, int) {
  if (lane_index() < 4) return;
  data[global_thread()] = shuffle(lane_index(), 0);
}

__global__ void some_lanes(int32_t* data, int) {
  data[global_thread()] = static_cast<int32_t>(__shfl_sync(0xffff, lane_index(), 0));
}

// --- grids

// Every block gets what the block after it wrote.
template <bool kBarrier>
__global__ void next_block(int32_t* data, int) {
  if (threadIdx.x == 0) data[blockIdx.x] = blockIdx.x;
  if (kBarrier) grid_barrier();
  if (threadIdx.x == 0) data[gridDim.x + blockIdx.x] = data[(blockIdx.x + 1) % gridDim.x];
}

// One warp waits for the grid, the other for its block.
__global__ void deadlock(int32_t*, int) {
  if (warp_index() == 0)
    grid_barrier();
  else
    __syncthreads();
}

__global__ void wait_forever(int32_t* data, int) {
  while (atomicAdd(data, 0) == 0) {
  }
}

// data: a sum, a maximum, a counter that atomicCAS moves on, whether atomicExch was first; then everybody's
// turn.
__global__ void atomics(int32_t* data, int) {
  const int32_t i = global_thread();
  const int32_t turn = atomicAdd(&data[0], 1);
  atomicMax(&data[1], i);
  int32_t seen = data[2];
  for (int32_t before = seen + 1; before != seen;) {
    before = seen;
    seen = atomicCAS(&data[2], before, before + 2);
  }
  if (atomicExch(&data[3], 1) == 0) atomicAdd(&data[4], 1);
  data[5 + i] = turn;
}

// Atomics of another thread come between a read and a write.
__global__ void lost_updates(int32_t* data, int) {
  const int32_t before = atomicAdd(data, 0);
  atomicExch(data, before + 1);
}

// --- launches that overlap

// It lets the next one begin before it writes.
__global__ void write_late(int32_t* data, int) {
  allow_next_launch();
  for (int i = 0; i < 20; ++i) __syncthreads();
  data[global_thread()] = global_thread();
}

template <bool kWait>
__global__ void copy_from_before(int32_t* data, int size) {
  if (kWait) wait_for_previous_launch();
  if (global_thread() < size) data[size + global_thread()] = data[global_thread()];
}

// --- copies

// 16 bytes a thread through shared memory, to the opposite thread. kWait: for all; 1: the last group may be
// missing; -1: not at all.
template <int kWait>
__global__ void copy_reversed(int32_t* data, int size) {
  uint4* const shared = dynamic_shared<uint4>();
  const uint4* from = reinterpret_cast<const uint4*>(data);
  start_copy16(shared + threadIdx.x, from + threadIdx.x, true);
  end_copies();
  start_copy16(shared + blockDim.x + threadIdx.x, from + threadIdx.x, false);
  end_copies();
  if constexpr (kWait >= 0) wait_for_copies<kWait>();
  __syncthreads();
  uint4* const to = reinterpret_cast<uint4*>(data + size);
  to[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
  if (kWait == 0) to[blockDim.x + threadIdx.x] = shared[blockDim.x + threadIdx.x];
}

__global__ void copy_unaligned(int32_t* data, int) {
  start_copy16(dynamic_shared<int32_t>() + 1, data, true);
}

__global__ void copy_to_global(int32_t* data, int size) { start_copy16(data + size, data, true); }

// --- memory errors, for the sanitizers

__global__ void write_past_data(int32_t* data, int size) {
  data[global_thread() + (global_thread() == 9) * size] = 1;
}
__global__ void write_past_shared(int32_t*, int) { dynamic_shared<int32_t>()[threadIdx.x + 1] = 1; }
__global__ void copy_past_data(int32_t* data, int size) {
  start_copy16(dynamic_shared<uint4>(), data + size - size % 4, true);
  end_copies();
  wait_for_copies<0>();
}
__global__ void read_unaligned(int32_t* data, int) { data[0] = reinterpret_cast<const uint4*>(data + 1)->x; }
__global__ void index_past_array(int32_t* data, int size) {
  __shared__ int32_t array[kThreads];
  array[threadIdx.x + size] = 1;
  data[threadIdx.x] = array[threadIdx.x];
}

// --- the rest

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Winfinite-recursion"
__device__ int recurse(volatile int32_t* data, int depth) {
  volatile char frame[512];
  for (int i = 0; i < 512; ++i) frame[i] = static_cast<char>(depth);
  return depth == 0 ? 0 : recurse(data, depth - 1) + frame[depth % 512];
}
#pragma GCC diagnostic pop
__global__ void fill_stack(int32_t* data, int) {
  if (threadIdx.x == 40) data[0] = recurse(data, 150);
}

// D (16, 8) = A (16, 16) B (16, 8), all row by row in 16-bit elements, D in float32.
template <typename T>
__global__ void multiply(int32_t* data, int) {
  uint4* const shared = dynamic_shared<uint4>();
  for (int i = lane_index(); i < 48; i += kLanes) shared[i] = reinterpret_cast<const uint4*>(data)[i];
  warp_barrier();
  // Matrix i of A: rows from 8 (i % 2) on, columns from 8 (i / 2) on; a row of A is 2 uint4, one of B is one.
  const int matrix = lane_index() / 8, row = lane_index() % 8;
  uint32_t a[4], b[4];
  load_matrices(a, shared + (row + matrix % 2 * 8) * 2 + matrix / 2);
  load_matrices_transposed(b, shared + 32 + row + matrix % 2 * 8);
  float d[4] = {};
  mma_16x8x16<T>(d, a, {b[0], b[1]});
  float* const to = reinterpret_cast<float*>(data + 192);
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int i = 0; i < 4; ++i) to[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

__global__ void load_unaligned_matrices(int32_t* data, int) {
  uint32_t r[4];
  load_matrices(r, dynamic_shared<int32_t>() + 2 * lane_index());
  data[0] = static_cast<int32_t>(r[0]);
}

struct Named {
  const char* name;
  void (*kernel)(int32_t*, int);
};
constexpr Named kKernels[] = {
    {"reverse", reverse<true>},
    {"reverse_without_barrier", reverse<false>},
    {"find_shared", find_shared},
    {"own_shared", own_shared},
    {"leave_before_barrier", leave_before_barrier},
    {"warp_functions", warp_functions},
    {"diverge", diverge},
    {"diverge_at_barrier", diverge_at_barrier},
    {"leave_before_shuffle", leave_before_shuffle},
    {"some_lanes", some_lanes},
    {"next_block", next_block<true>},
    {"next_block_without_barrier", next_block<false>},
    {"deadlock", deadlock},
    {"wait_forever", wait_forever},
    {"atomics", atomics},
    {"lost_updates", lost_updates},
    {"write_late", write_late},
    {"copy_from_before", copy_from_before<true>},
    {"copy_from_before_without_waiting", copy_from_before<false>},
    {"copy_reversed", copy_reversed<0>},
    {"copy_reversed_waiting_for_one", copy_reversed<1>},
    {"copy_reversed_waiting_for_none", copy_reversed<2>},
    {"copy_reversed_without_waiting", copy_reversed<-1>},
    {"copy_unaligned", copy_unaligned},
    {"copy_to_global", copy_to_global},
    {"write_past_data", write_past_data},
    {"write_past_shared", write_past_shared},
    {"copy_past_data", copy_past_data},
    {"read_unaligned", read_unaligned},
    {"index_past_array", index_past_array},
    {"fill_stack", fill_stack},
    {"multiply_bf16", multiply<bf16>},
    {"multiply_fp16", multiply<fp16>},
    {"load_unaligned_matrices", load_unaligned_matrices},
};

}  // namespace

extern "C" {

struct TestLaunch {
  const char* kernel;
  int64_t blocks, threads, shared_bytes, ask_for_shared, cooperative, overlaps;
};

void test_set(int64_t seed, int64_t multiprocessors, int64_t blocks_each) {
  simt::seed(static_cast<uint64_t>(seed));
  simt::set_device({static_cast<int>(multiprocessors), static_cast<int>(blocks_each)});
}

// Launches and runs all; the text of the error, "" where there is none.
const char* test_run(const TestLaunch* launches, int64_t count, int32_t* data, int64_t size) {
  static std::string error;
  error.clear();
  try {
    for (const TestLaunch* given = launches; given < launches + count && error.empty(); ++given) {
      const auto has_name = [&](const Named& named) { return std::strcmp(named.name, given->kernel) == 0; };
      const Named* const named = std::find_if(std::begin(kKernels), std::end(kKernels), has_name);
      cudaLaunchAttribute attributes[2];
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(static_cast<unsigned>(given->blocks));
      config.blockDim = dim3(static_cast<unsigned>(given->threads));
      config.dynamicSmemBytes = static_cast<size_t>(given->shared_bytes);
      config.attrs = attributes;
      attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes[config.numAttrs++].val.cooperative = static_cast<int>(given->cooperative);
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed =
          static_cast<int>(given->overlaps);
      cudaError_t status = cudaSuccess;
      if (given->ask_for_shared > 0)
        status = cudaFuncSetAttribute(named->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(given->ask_for_shared));
      if (status == cudaSuccess)
        status = cudaLaunchKernelEx(&config, named->kernel, data, static_cast<int>(size));
      if (status != cudaSuccess) error = cudaGetErrorString(status);
    }
    simt::synchronize();
  } catch (const std::exception& thrown) {
    error = thrown.what();
  }
  simt::forget_launches();
  return error.c_str();
}

int test_resident(int64_t threads, int64_t shared_bytes, int64_t ask_for_shared) {
  int blocks = -1;
  cudaFuncSetAttribute(reverse<true>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(ask_for_shared));
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reverse<true>, static_cast<int>(threads),
                                                static_cast<size_t>(shared_bytes));
  return blocks;
}

void test_to_float(const uint16_t* from, float* to, int64_t size, int is_bf16) {
  for (int64_t i = 0; i < size; ++i) to[i] = is_bf16 ? to_float(bf16{from[i]}) : to_float(fp16{from[i]});
}
void test_from_float(const float* from, uint16_t* to, int64_t size, int is_bf16) {
  for (int64_t i = 0; i < size; ++i)
    to[i] = is_bf16 ? from_float<bf16>(from[i]).bits : from_float<fp16>(from[i]).bits;
}

}  // extern "C"
