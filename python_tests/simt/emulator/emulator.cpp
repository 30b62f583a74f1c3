#include "emulator.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// The address of a thread-local variable: {number of the library, offset}. Of the C library.
extern "C" void* __tls_get_addr(size_t* index);

namespace simt {
namespace {

constexpr int kPoison = 0xFF;  // shared memory that nobody wrote: NaN, and -1
constexpr const char* kPreviousLaunch = "wait_for_previous_launch";

struct Grid;
struct Block;

// 16 bytes on their way.
struct Copy {
  void* to;
  const void* from;
  unsigned group;
  bool arrives_late;  // not before it is waited for
  bool is_read;       // `bytes` holds what was read when the copy started; else it is read when it arrives
  unsigned char bytes[16];
};

struct Thread {
  Block* block = nullptr;
  unsigned index = 0;
  Fiber fiber;
  const char* waits = nullptr;  // at what
  void* where = nullptr;        // the instruction after its last call of the emulator
  std::vector<Copy> copies;
  unsigned group = 0;  // the one that copies started now belong to
};

struct Warp {
  uint32_t ready = 0, arrived = 0, exited = 0;
  int at_barrier = 0;  // lanes
  Collective what = Collective::kSyncWarp;
  WarpWords words[2];  // a lane is at most one collective ahead of the others
  unsigned turn = 0;
};

// The thread-local variables of a library. __shared__ variables are those: only one operating system thread
// runs the fibers, and each block's copy is put in place before the block goes on.
struct Segment {
  char* start = nullptr;
  size_t bytes = 0;
};

// What of a segment a block has written, by pages. The rest is poison.
struct StaticShared {
  static constexpr size_t kPage = 4096;
  std::vector<size_t> pages;  // where they begin
  std::vector<char> bytes;    // of one after the other
};

struct Block {
  Grid* grid = nullptr;
  unsigned index = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  // Warps have a rank each, at random. Bit r of ready_ranks: a thread of the warp of rank r can go on.
  std::vector<int> warp_of_rank, rank_of_warp;
  uint32_t ready_ranks = 0;
  unsigned exited = 0, at_barrier = 0;
  bool allows_next = false;
  StaticShared static_shared;  // while another block's is in place
  std::unique_ptr<void, decltype(&std::free)> dynamic_shared{nullptr, &std::free};
  char* stacks = nullptr;
};

struct Grid {
  Launch launch;
  Segment shared;
  Grid* previous = nullptr;  // the one that it overlaps
  std::vector<unsigned> order;
  size_t started = 0, finished = 0, allowing = 0, window = 0;
  unsigned at_barrier = 0, resident = 0;

  bool is_done() const { return finished == order.size(); }
};

// SplitMix64: a few instructions, and a draw is needed for each switch.
struct Random {
  using result_type = uint64_t;
  uint64_t state = 0;

  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return UINT64_MAX; }
  uint64_t operator()() {
    uint64_t z = state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
  }
};

struct Emulator {
  Device device;
  Random random;
  std::deque<Grid> queue;
  std::vector<std::unique_ptr<Block>> resident;
  Block* in_place = nullptr;  // whose static shared memory is in place
  Thread* current = nullptr;
  std::vector<char*> free_stacks;
  std::string error;
  bool may_start_blocks = false;  // since a block has ended or allows the next launch
  uint64_t yields = 0;            // since something else happened
  int64_t launches = 0;           // so far
};
Emulator emulator;

// 0 .. of - 1.
unsigned probability(unsigned of) { return static_cast<unsigned>((emulator.random() >> 32) * of >> 32); }

// The first bit from a random place on, so that not all are quite equally likely.
int random_bit(uint32_t mask) {
  const unsigned place = probability(32);
  const uint32_t from_there = mask >> place;
  return from_there != 0 ? static_cast<int>(place) + __builtin_ctz(from_there) : __builtin_ctz(mask);
}

// ---------------------------------------------------------------- errors

// "kernel<float, 4>(...) at file.cu:12", from the library's debug information; where the code was inlined, a
// line for each function that it was inlined into.
std::string describe(const void* code) {
  Dl_info library = {};
  if (code == nullptr || dladdr(code, &library) == 0) return "?";
  const auto offset = static_cast<const char*>(code) - static_cast<const char*>(library.dli_fbase);
  char command[4096];
  std::snprintf(command, sizeof(command), "LD_PRELOAD= addr2line -Cfpi -e '%s' 0x%tx 2>/dev/null",
                library.dli_fname, offset);
  std::string text;
  if (FILE* output = popen(command, "r")) {
    char part[512];
    while (std::fgets(part, sizeof(part), output)) text += part;
    pclose(output);
  }
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text.empty() ? "?" : text;
}

std::string describe(const Thread& thread) {
  std::string kernel = describe(thread.block->grid->launch.kernel);
  // Its first instruction may come from a function inlined into it.
  if (const size_t last = kernel.rfind("(inlined by) "); last != std::string::npos)
    kernel.erase(0, last + 13);
  return "kernel " + kernel + ", block " + std::to_string(thread.block->index) + ", thread " +
         std::to_string(thread.index);
}

// Ends the launch. Where the thread is: at its call of the emulator.
[[noreturn]] void fail_there(const std::string& what) {
  const Thread& thread = *emulator.current;
  emulator.error = describe(thread) + " " + what;
  if (thread.where != nullptr)
    emulator.error += ", at " + describe(static_cast<const char*>(thread.where) - 1);
  Fiber::leave();
  std::abort();  // the launch is over
}

const char* name(Collective what) {
  switch (what) {
    case Collective::kSyncWarp:
      return "__syncwarp";
    case Collective::kShuffle:
      return "a shuffle";
    case Collective::kVote:
      return "a vote";
    case Collective::kMultiply:
      return "mma";
    case Collective::kLoadMatrices:
      return "ldmatrix";
  }
  return "?";
}

// ---------------------------------------------------------------- waiting

void make_ready(Thread& thread) {
  Block& block = *thread.block;
  thread.waits = nullptr;
  block.warps[thread.index / kWarpLanes].ready |= 1u << thread.index % kWarpLanes;
  block.ready_ranks |= 1u << block.rank_of_warp[thread.index / kWarpLanes];
}

void wait_here(const char* at) {
  emulator.current->waits = at;
  Fiber::leave();
}

Warp& current_warp() { return emulator.current->block->warps[emulator.current->index / kWarpLanes]; }

void progress() { emulator.yields = 0; }

void arrive_at_barrier(const char* what) {
  const Thread& thread = *emulator.current;
  Warp& warp = current_warp();
  if (warp.arrived != 0)
    fail_there(std::string("is at ") + what + " while other lanes of its warp are at " + name(warp.what));
  if (thread.block->exited != 0)
    fail_there(std::string("is at ") + what + ", but threads of its block have already left");
  ++warp.at_barrier;
}

void release_block(Block& block) {
  for (Warp& warp : block.warps) warp.at_barrier = 0;
  for (Thread& thread : block.threads) make_ready(thread);
  progress();
}

// A fiber's function: one thread of the kernel.
void run_thread() {
  emulator.current->block->grid->launch.body();
  Thread& thread = *emulator.current;
  Block& block = *thread.block;
  Warp& warp = current_warp();
  thread.where = nullptr;
  if (warp.arrived != 0)
    fail_there(std::string("leaves the kernel while other lanes of its warp are at ") + name(warp.what));
  if (block.at_barrier != 0)
    fail_there("leaves the kernel while other threads of its block are at a barrier");
  warp.exited |= 1u << thread.index % kWarpLanes;
  ++block.exited;
  thread.copies.clear();  // nobody waited for them
  thread.waits = nullptr;
  progress();
}

// ---------------------------------------------------------------- copies

void arrive(Thread& thread, size_t which) {
  Copy& copy = thread.copies[which];
  std::memcpy(copy.to, copy.is_read ? copy.bytes : copy.from, sizeof(copy.bytes));
  copy = thread.copies.back();
  thread.copies.pop_back();
}

// One of the block's copies arrives, perhaps.
void let_a_copy_arrive(Block& block) {
  Thread& thread = block.threads[probability(static_cast<unsigned>(block.threads.size()))];
  if (thread.copies.empty()) return;
  const size_t which = probability(static_cast<unsigned>(thread.copies.size()));
  if (!thread.copies[which].arrives_late) arrive(thread, which);
}

bool is_shared(const Block& block, const void* pointer, size_t bytes) {
  const auto within = [&](const void* start, size_t size) {
    const uintptr_t from = reinterpret_cast<uintptr_t>(start), at = reinterpret_cast<uintptr_t>(pointer);
    return at >= from && at + bytes <= from + size;
  };
  return within(block.dynamic_shared.get(), block.grid->launch.shared_bytes) ||
         within(block.grid->shared.start, block.grid->shared.bytes);
}

// ---------------------------------------------------------------- shared memory

// The thread-local variables of the library that `kernel` belongs to.
Segment find_segment(const void* kernel) {
  struct Search {
    uintptr_t address;
    Segment found;
  } search = {reinterpret_cast<uintptr_t>(kernel), {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        Search& search = *static_cast<Search*>(data);
        bool holds_kernel = false;
        size_t bytes = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr) & part = info->dlpi_phdr[i];
          const uintptr_t start = info->dlpi_addr + part.p_vaddr;
          if (part.p_type == PT_LOAD && search.address >= start && search.address < start + part.p_memsz)
            holds_kernel = true;
          if (part.p_type == PT_TLS) bytes = part.p_memsz;
        }
        if (!holds_kernel) return 0;
        if (bytes > 0) {
          // Not dlpi_tls_data: that is null until the thread has touched one of the variables.
          size_t index[2] = {info->dlpi_tls_modid, 0};
          search.found = {static_cast<char*>(__tls_get_addr(index)), bytes};
        }
        return 1;
      },
      &search);
  return search.found;
}

// f(offset, size) for the pages of the segment that are not all poison.
template <typename F>
void for_written_pages(const Segment& segment, F f) {
  static const std::vector<char> poison(StaticShared::kPage, static_cast<char>(kPoison));
  for (size_t offset = 0; offset < segment.bytes; offset += StaticShared::kPage) {
    const size_t size = std::min(StaticShared::kPage, segment.bytes - offset);
    if (std::memcmp(segment.start + offset, poison.data(), size) != 0) f(offset, size);
  }
}

// Between blocks the segment is all poison.
void take_away(Block& block) {
  const Segment& segment = block.grid->shared;
  StaticShared& kept = block.static_shared;
  kept = {};
  for_written_pages(segment, [&](size_t offset, size_t size) {
    kept.pages.push_back(offset);
    kept.bytes.insert(kept.bytes.end(), segment.start + offset, segment.start + offset + size);
    std::memset(segment.start + offset, kPoison, size);
  });
  emulator.in_place = nullptr;
}

void put_in_place(Block& block) {
  if (emulator.in_place == &block) return;
  if (emulator.in_place != nullptr) take_away(*emulator.in_place);
  const Segment& segment = block.grid->shared;
  const char* from = block.static_shared.bytes.data();
  for (const size_t offset : block.static_shared.pages) {
    const size_t size = std::min(StaticShared::kPage, segment.bytes - offset);
    std::memcpy(segment.start + offset, from, size);
    from += size;
  }
  blockIdx.x = block.index;
  blockDim.x = block.grid->launch.threads;
  gridDim.x = block.grid->launch.blocks;
  emulator.in_place = &block;
}

// ---------------------------------------------------------------- blocks

char* take_stacks() {
  if (!emulator.free_stacks.empty()) {
    char* stacks = emulator.free_stacks.back();
    emulator.free_stacks.pop_back();
    return stacks;
  }
  void* stacks = mmap(nullptr, kMaxBlockThreads * Fiber::kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) throw std::runtime_error("simt: no memory for the stacks of a block");
  return static_cast<char*>(stacks);
}

void start_block(Grid& grid) {
  emulator.resident.push_back(std::make_unique<Block>());
  Block& block = *emulator.resident.back();
  block.grid = &grid;
  block.index = grid.order[grid.started++];
  ++grid.resident;

  const size_t bytes = grid.launch.shared_bytes;
  if (bytes > 0) {
    void* start = nullptr;  // an allocation of its own, so that the address sanitizer guards both ends
    if (posix_memalign(&start, 128, bytes) != 0) throw std::bad_alloc();
    block.dynamic_shared.reset(start);
    std::memset(start, kPoison, bytes);
  }

  block.stacks = take_stacks();
  const int warps = static_cast<int>(grid.launch.threads) / kWarpLanes;
  block.warps.resize(warps);
  for (int warp = 0; warp < warps; ++warp) block.warp_of_rank.push_back(warp);
  std::shuffle(block.warp_of_rank.begin(), block.warp_of_rank.end(), emulator.random);
  block.rank_of_warp.resize(warps);
  for (int rank = 0; rank < warps; ++rank) block.rank_of_warp[block.warp_of_rank[rank]] = rank;
  block.threads.resize(grid.launch.threads);
  for (unsigned i = 0; i < grid.launch.threads; ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.index = i;
    thread.fiber.prepare(block.stacks + i * Fiber::kStackBytes, run_thread);
    make_ready(thread);
  }
}

void allow_next(Block& block) {
  if (block.allows_next) return;
  block.allows_next = true;
  ++block.grid->allowing;
  emulator.may_start_blocks = true;
}

void end_block(Block& block) {
  Grid& grid = *block.grid;
  allow_next(block);
  emulator.may_start_blocks = true;
  ++grid.finished;
  --grid.resident;
  take_away(block);  // it has just run, so that its own is in place
  emulator.free_stacks.push_back(block.stacks);
  const auto is_it = [&](const auto& other) { return other.get() == &block; };
  emulator.resident.erase(std::find_if(emulator.resident.begin(), emulator.resident.end(), is_it));
  if (!grid.is_done()) return;
  // Who waited for this launch can go on.
  for (const auto& other : emulator.resident) {
    if (other->grid->previous != &grid) continue;
    for (Thread& thread : other->threads)
      if (thread.waits == kPreviousLaunch) make_ready(thread);
  }
}

// Starts blocks: of the first launch, and of those after it that may overlap the one before them.
void admit_blocks() {
  for (Grid& grid : emulator.queue) {
    if (grid.previous != nullptr && grid.previous->allowing < grid.previous->order.size()) return;
    while (grid.started < grid.order.size() && grid.resident < grid.window) start_block(grid);
  }
}

Block* choose_block() {
  if (Block* block = emulator.in_place; block != nullptr && block->ready_ranks != 0 && probability(512) != 0)
    return block;
  std::vector<Block*> ready;
  for (const auto& block : emulator.resident)
    if (block->ready_ranks != 0) ready.push_back(block.get());
  return ready.empty() ? nullptr : ready[probability(static_cast<unsigned>(ready.size()))];
}

Thread& choose_thread(Block& block) {
  // Mostly the warp of the lowest rank, so that warps run far apart.
  const int rank = probability(8) != 0 ? __builtin_ctz(block.ready_ranks) : random_bit(block.ready_ranks);
  Warp& warp = block.warps[block.warp_of_rank[rank]];
  const int lane = random_bit(warp.ready);
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) block.ready_ranks &= ~(1u << rank);
  return block.threads[block.warp_of_rank[rank] * kWarpLanes + lane];
}

// What the threads wait for, alike ones counted together.
void report_deadlock() {
  std::map<std::pair<const char*, void*>, std::pair<int, const Thread*>> waiting;
  for (const auto& block : emulator.resident) {
    for (const Thread& thread : block->threads) {
      if (thread.waits == nullptr) continue;  // it is over
      auto& [count, first] = waiting[{thread.waits, thread.where}];
      if (count++ == 0) first = &thread;
    }
  }
  emulator.error = "deadlock:";
  for (const auto& [at, who] : waiting) {
    emulator.error += "\n  " + std::to_string(who.first) + " threads are at " + at.first + " (" +
                      describe(static_cast<const char*>(at.second) - 1) +
                      "), the first: " + describe(*who.second);
  }
}

void run_launches() {
  admit_blocks();
  while (!emulator.resident.empty()) {
    Block* const block = choose_block();
    if (block == nullptr) return report_deadlock();
    put_in_place(*block);
    if (probability(8) == 0) let_a_copy_arrive(*block);
    Thread& thread = choose_thread(*block);
    emulator.current = &thread;
    threadIdx.x = thread.index;
    thread.fiber.resume();
    if (thread.fiber.overflowed() && emulator.error.empty())
      emulator.error = "the stack of 64 KB is too small for " + describe(thread);
    if (!emulator.error.empty()) return;
    if (block->exited == block->threads.size()) end_block(*block);
    if (std::exchange(emulator.may_start_blocks, false)) admit_blocks();
  }
}

}  // namespace

// ---------------------------------------------------------------- for kernels

const WarpWords& exchange(Collective what, const uint32_t* words, int count) {
  emulator.current->where = __builtin_return_address(0);
  Thread& thread = *emulator.current;
  Warp& warp = current_warp();
  const unsigned lane = thread.index % kWarpLanes;
  if (warp.exited != 0)
    fail_there(std::string("is at ") + name(what) + ", but lanes of its warp have already left");
  if (warp.at_barrier != 0)
    fail_there(std::string("is at ") + name(what) + " while other lanes of its warp are at a barrier");
  if (warp.arrived == 0) warp.what = what;
  if (warp.what != what)
    fail_there(std::string("is at ") + name(what) + " while other lanes of its warp are at " +
               name(warp.what));
  WarpWords& all = warp.words[warp.turn % 2];
  if (count > 0) std::memcpy(all[lane], words, count * sizeof(uint32_t));  // a barrier has none
  warp.arrived |= 1u << lane;
  if (warp.arrived == ~0u) {
    warp.arrived = 0;
    ++warp.turn;
    progress();
    for (int i = 0; i < kWarpLanes; ++i) make_ready(thread.block->threads[thread.index - lane + i]);
  }
  wait_here(name(what));
  return all;
}

void block_barrier() {
  emulator.current->where = __builtin_return_address(0);
  arrive_at_barrier("__syncthreads");
  Block& block = *emulator.current->block;
  if (++block.at_barrier == block.threads.size()) {
    block.at_barrier = 0;
    release_block(block);
  }
  wait_here("__syncthreads");
}

void grid_barrier() {
  emulator.current->where = __builtin_return_address(0);
  arrive_at_barrier("a grid barrier");
  Grid& grid = *emulator.current->block->grid;
  if (!grid.launch.cooperative) fail_there("is at a grid barrier, but the launch is not cooperative");
  if (grid.finished != 0) fail_there("is at a grid barrier, but blocks have already left");
  if (++grid.at_barrier == grid.launch.blocks * grid.launch.threads) {
    grid.at_barrier = 0;
    for (const auto& block : emulator.resident)
      if (block->grid == &grid) release_block(*block);
  }
  wait_here("a grid barrier");
}

void yield() {
  emulator.current->where = __builtin_return_address(0);
  if (++emulator.yields > 1 << 20) fail_there("waits for something that does not happen");
  make_ready(*emulator.current);
  Fiber::leave();
}

int lane_index() { return static_cast<int>(emulator.current->index % kWarpLanes); }

void* dynamic_shared() {
  emulator.current->where = __builtin_return_address(0);
  if (emulator.current->block->dynamic_shared == nullptr)
    fail_there("uses dynamic shared memory, but the launch asked for none");
  return emulator.current->block->dynamic_shared.get();
}

void start_copy(void* shared, const void* global, bool valid) {
  emulator.current->where = __builtin_return_address(0);
  Thread& thread = *emulator.current;
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail_there("starts a copy from or to an address that is not a multiple of 16 bytes");
  if (!is_shared(*thread.block, shared, 16))
    fail_there("starts a copy to an address outside of shared memory");
  Copy copy = {shared, global, thread.group, probability(2) == 0, !valid || probability(2) == 0, {}};
  if (valid && copy.is_read) std::memcpy(copy.bytes, global, sizeof(copy.bytes));
  thread.copies.push_back(copy);
  if (probability(4) == 0) arrive(thread, thread.copies.size() - 1);
}

void end_copies() { ++emulator.current->group; }

void wait_for_copies(int pending) {
  Thread& thread = *emulator.current;
  for (size_t i = thread.copies.size(); i-- > 0;)
    if (thread.copies[i].group + pending < thread.group) arrive(thread, i);
}

void wait_for_previous_launch() {
  if (emulator.device.ptx_version < 90) return;
  emulator.current->where = __builtin_return_address(0);
  const Grid* previous = emulator.current->block->grid->previous;
  if (previous != nullptr && !previous->is_done()) wait_here(kPreviousLaunch);
}

void allow_next_launch() { allow_next(*emulator.current->block); }

void fail(const std::string& what) {
  emulator.current->where = __builtin_return_address(0);
  fail_there(what);
}

// ---------------------------------------------------------------- for launches

void set_device(const Device& device) { emulator.device = device; }
const Device& device() { return emulator.device; }
void seed(uint64_t seed) { emulator.random.state = seed; }

void enqueue(Launch launch) {
  if (!launch.overlaps) synchronize();
  Grid* const previous = emulator.queue.empty() ? nullptr : &emulator.queue.back();
  Grid& grid = emulator.queue.emplace_back();  // the others stay where they are
  grid.shared = find_segment(launch.kernel);
  grid.previous = previous;
  grid.order.resize(launch.blocks);
  for (unsigned i = 0; i < launch.blocks; ++i) grid.order[i] = i;
  std::shuffle(grid.order.begin(), grid.order.end(), emulator.random);
  grid.window = launch.cooperative ? launch.blocks : 1 + probability(4);
  grid.launch = std::move(launch);
  ++emulator.launches;
}

int64_t launches() { return emulator.launches; }

void synchronize() {
  // What else the libraries keep in thread-local variables stays as it is.
  std::vector<std::pair<Segment, std::vector<char>>> before;
  for (const Grid& grid : emulator.queue) {
    const auto is_it = [&](const auto& saved) { return saved.first.start == grid.shared.start; };
    const Segment& segment = grid.shared;
    if (segment.bytes == 0 || std::any_of(before.begin(), before.end(), is_it)) continue;
    before.emplace_back(segment, std::vector<char>(segment.start, segment.start + segment.bytes));
    std::memset(segment.start, kPoison, segment.bytes);
  }
  run_launches();
  forget_launches();
  for (const auto& [segment, bytes] : before) std::copy(bytes.begin(), bytes.end(), segment.start);
  if (!emulator.error.empty()) throw std::runtime_error("simt: " + std::exchange(emulator.error, {}));
}

void forget_launches() {
  for (const auto& block : emulator.resident) {  // after an error: their fibers are never resumed
    for (const Thread& thread : block->threads) thread.fiber.abandon();
    emulator.free_stacks.push_back(block->stacks);
  }
  emulator.resident.clear();
  emulator.in_place = nullptr;
  emulator.queue.clear();
  emulator.yields = 0;
}

}  // namespace simt
