// Runs CUDA kernels on the CPU, to test them where there is no GPU: the very same .cu files, compiled as host
// C++ against the stand-ins for the toolkit's headers in include/.
//
// Every CUDA thread is a fiber, a stack of its own between which the emulator switches, so that exactly one
// runs at any time. It runs until it meets the others: at a barrier, a shuffle or a vote, sometimes at an
// atomic operation. Which one goes on is drawn at random from a seed. A schedule mostly prefers one warp and
// one block and so drives them far apart: code that lacks a barrier then sees values that are not there yet,
// or no longer.
//
// What it finds: wrong results of any cause, among them races that go through a missing barrier; collectives
// that not all threads reach, or different ones; reads of shared memory that nobody wrote (it starts as NaN);
// asynchronous copies nobody waited for; launches that the device would refuse. With the address and
// undefined behaviour sanitizers: accesses outside of tensors and of dynamic shared memory, misaligned
// vectors. What it cannot find: a missing memory fence (memory is sequentially consistent here), races
// between two threads that never let go of the CPU in between, anything about speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace simt {

constexpr int kWarpLanes = 32;
constexpr int kMaxBlockThreads = 1024;

// ---------------------------------------------------------------- for kernels, through the stand-ins

// What all lanes of a warp do together. All have to call the same.
enum class Collective { kSyncWarp, kShuffle, kVote, kMultiply, kLoadMatrices };

constexpr int kMaxWords = 6;  // the operands of mma_16x8x16
using WarpWords = uint32_t[kWarpLanes][kMaxWords];

// Every lane brings `count` words; returns those of all lanes, to be read before this lane's next collective.
const WarpWords& exchange(Collective what, const uint32_t* words, int count);
void block_barrier();
void grid_barrier();
// Another thread may go on here. Atomic operations call it.
void yield();

int lane_index();
void* dynamic_shared();

void start_copy(void* shared, const void* global, bool valid);  // 16 bytes
void end_copies();
void wait_for_copies(int pending);

void wait_for_previous_launch();
void allow_next_launch();

// Ends the launch with an error that names the kernel, the block and the thread.
[[noreturn]] void fail(const std::string& what);

// ---------------------------------------------------------------- for launches

// The emulated device. Small, so that little work fills it.
struct Device {
  int multiprocessors = 3;
  int blocks_each = 2;  // resident on a multiprocessor at once, at most
  // What the kernels were compiled for: below 90 they have no instruction that waits for the launch before.
  int ptx_version = 90;
};
void set_device(const Device& device);
const Device& device();
// Of the schedule, and of all other probabilities.
void seed(uint64_t seed);

struct Launch {
  unsigned blocks, threads;
  size_t shared_bytes;
  bool cooperative, overlaps;
  const void* kernel;
  std::function<void()> body;  // the kernel with its arguments
};
// Runs what was launched before, unless this launch may overlap it, and keeps this one for later.
void enqueue(Launch launch);
// Runs what was launched. Throws std::runtime_error where fail() was called, and at a deadlock.
void synchronize();
// Forgets what was launched and not yet run.
void forget_launches();
// How many launches there were so far.
int64_t launches();

}  // namespace simt
