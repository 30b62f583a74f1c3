// Picks the level of the instruction set: once, when the first kernel or cpu_isa() is called.
//
// Not while the library is loaded: an exception there would end the process. cerberus_ext/__init__.py calls
// cpu_isa() right after loading, so that a wrong CERBERUS_ISA shows as an error of the import.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(CERBERUS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/parts.h"

CERBERUS_DECLARE_KERNELS(portable)
#if defined(__x86_64__)
CERBERUS_DECLARE_KERNELS(avx2)
CERBERUS_DECLARE_KERNELS(avx512)
CERBERUS_DECLARE_KERNELS(avx512_bf16)
#endif
#if defined(CERBERUS_AMX)
CERBERUS_DECLARE_KERNELS(amx_bf16)
#endif

namespace cerberus {
namespace {

struct Level {
  const char* name;
  bool (*runs_here)();
#define KERNEL(op, Op, schema) void (*op)(const Op##Args&, const Parallel&);
  CERBERUS_OPS(KERNEL)
#undef KERNEL
  void (*tree_attentions)(const TreeAttentionsArgs&, const Parallel&);
  void (*rows)(const RowsArgs&, const Parallel&);
  // Null: none.
  void (*packed_linear)(const LinearArgs&, const Parallel&);
  void (*pack_weights)(const PackWeightsArgs&, const Parallel&);
  int64_t (*packed_elements)(DType, int64_t rows, int64_t size);
  void (*block_linear)(const LinearArgs&, Packing, const Parallel&);
  void (*pack_blocks)(const PackBlocksArgs&, const Parallel&);
  int64_t (*block_bytes)(Packing, int64_t rows, int64_t size);
  void (*eight_bit_linear)(const LinearArgs&, const Parallel&);
  void (*pack_eight_bits)(const PackEightBitsArgs&, const Parallel&);
};

bool always() { return true; }

#if defined(__x86_64__)
// What the flags of each level in CMakeLists.txt let the compiler use.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt") &&
         __builtin_cpu_supports("popcnt");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#if defined(CERBERUS_AMX)
// The processor has the tiles, the system saves them when it switches between threads, and lets this process
// use them: Linux wants to be asked, since they make every thread's state 8 KiB larger.
bool has_amx_bf16() {
  constexpr unsigned kTiles = 1u << 24, kBFloat16 = 1u << 22, kSavesState = 1u << 27;  // CPUID 7 edx, 1 ecx
  constexpr unsigned kTileState = 3u << 17;                                            // XCR0
  constexpr long kRequestPermission = 0x1023, kTileData = 18;                          // arch_prctl
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512_bf16() || !__get_cpuid(1, &a, &b, &c, &d) || !(c & kSavesState)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (kTiles | kBFloat16))) return false;
  unsigned saved = 0, upper = 0;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
  return !(~saved & kTileState) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#if defined(__x86_64__)
// Levels beyond avx512 have instructions for bfloat16 alone, and only the kernels that use them.
bool in_bfloat16(const LinearArgs& a) { return a.dtype == DType::kBFloat16 && !a.transposed; }
bool in_bfloat16(const HeadStackArgs& a) { return a.dtype == DType::kBFloat16; }
bool in_bfloat16(const DraftTopkArgs& a) { return a.dtype == DType::kBFloat16; }
bool in_bfloat16(const TreeAttentionArgs& a) { return a.dtype == DType::kBFloat16; }
bool in_bfloat16(const TreeAttentionsArgs& a) { return a.dtype == DType::kBFloat16; }
bool in_bfloat16(const PackWeightsArgs& a) { return a.dtype == DType::kBFloat16; }

template <typename Args, void (*kBFloat16)(const Args&, const Parallel&),
          void (*kOther)(const Args&, const Parallel&)>
void choose(const Args& a, const Parallel& parallel) {
  (in_bfloat16(a) ? kBFloat16 : kOther)(a, parallel);
}
#define CERBERUS_BFLOAT16(isa, op, Args) (&choose<Args, &isa::op, &avx512::op>)
int64_t packed_elements_bf16(DType dtype, int64_t rows, int64_t size) {
  return (dtype == DType::kBFloat16 ? avx512_bf16::packed_elements : avx512::packed_elements)(dtype, rows,
                                                                                              size);
}
#if defined(CERBERUS_AMX)
// Tiles have an order of their own, and read the weights as they are.
int64_t packed_elements_amx(DType dtype, int64_t rows, int64_t size) {
  return dtype == DType::kBFloat16 ? 0 : avx512::packed_elements(dtype, rows, size);
}
#endif
#endif

// A level, in the order of ops.h: its products are those named, its other kernels those of `isa`. Those of
// `portable` only move or compare integers.
#define CERBERUS_LEVEL(name, isa, runs_here, linear, head_stack, draft_topk, tree_attention,        \
                       tree_attentions, packed_linear, pack_weights, packed_elements, block_linear, \
                       pack_blocks, block_bytes)                                                    \
  {name,                                                                                            \
   runs_here,                                                                                       \
   &isa::hidden_entropy,                                                                            \
   head_stack,                                                                                      \
   draft_topk,                                                                                      \
   &isa::rerank,                                                                                    \
   &isa::choose_tokens,                                                                             \
   tree_attention,                                                                                  \
   &portable::write_cache,                                                                          \
   &portable::verify_tree,                                                                          \
   &portable::commit_cache,                                                                         \
   linear,                                                                                          \
   &portable::grouped_linear, /* by the products of the level */                                    \
   &isa::activation,                                                                                \
   tree_attentions,                                                                                 \
   &isa::rows,                                                                                      \
   packed_linear,                                                                                   \
   pack_weights,                                                                                    \
   packed_elements,                                                                                 \
   block_linear,                                                                                    \
   pack_blocks,                                                                                     \
   block_bytes,                                                                                     \
   &isa::eight_bit_linear,                                                                          \
   &isa::pack_eight_bits}
#define CERBERUS_WHOLE_LEVEL(isa, runs_here, block_linear, pack_blocks, block_bytes)                   \
  CERBERUS_LEVEL(#isa, isa, runs_here, &isa::linear, &isa::head_stack, &isa::draft_topk,               \
                 &isa::tree_attention, &isa::tree_attentions, &isa::packed_linear, &isa::pack_weights, \
                 &isa::packed_elements, block_linear, pack_blocks, block_bytes)

// Best first.
const Level kLevels[] = {
#if defined(CERBERUS_AMX)
    CERBERUS_LEVEL("amx_bf16", avx512, has_amx_bf16, CERBERUS_BFLOAT16(amx_bf16, linear, LinearArgs),
                   CERBERUS_BFLOAT16(avx512_bf16, head_stack, HeadStackArgs),
                   CERBERUS_BFLOAT16(avx512_bf16, draft_topk, DraftTopkArgs),
                   CERBERUS_BFLOAT16(avx512_bf16, tree_attention, TreeAttentionArgs),
                   CERBERUS_BFLOAT16(avx512_bf16, tree_attentions, TreeAttentionsArgs),
                   &avx512::packed_linear, &avx512::pack_weights, packed_elements_amx, nullptr, nullptr,
                   nullptr),
#endif
#if defined(__x86_64__)
    CERBERUS_LEVEL("avx512_bf16", avx512, has_avx512_bf16, CERBERUS_BFLOAT16(avx512_bf16, linear, LinearArgs),
                   CERBERUS_BFLOAT16(avx512_bf16, head_stack, HeadStackArgs),
                   CERBERUS_BFLOAT16(avx512_bf16, draft_topk, DraftTopkArgs),
                   CERBERUS_BFLOAT16(avx512_bf16, tree_attention, TreeAttentionArgs),
                   CERBERUS_BFLOAT16(avx512_bf16, tree_attentions, TreeAttentionsArgs),
                   CERBERUS_BFLOAT16(avx512_bf16, packed_linear, LinearArgs),
                   CERBERUS_BFLOAT16(avx512_bf16, pack_weights, PackWeightsArgs), packed_elements_bf16,
                   &avx512_bf16::block_linear, &avx512_bf16::pack_blocks, &avx512_bf16::block_bytes),
    CERBERUS_WHOLE_LEVEL(avx512, has_avx512, &avx512::block_linear, &avx512::pack_blocks,
                         &avx512::block_bytes),
    CERBERUS_WHOLE_LEVEL(avx2, has_avx2, nullptr, nullptr, nullptr),
#endif
    CERBERUS_LEVEL("portable", portable, always, &portable::linear, &portable::head_stack,
                   &portable::draft_topk, &portable::tree_attention, &portable::tree_attentions, nullptr,
                   nullptr, nullptr, nullptr, nullptr, nullptr),
};

// Whether the level is better than the one that follows. On Intel's processors vdpbf16ps does two
// multiply-adds in the time of four (measured on Emerald Rapids: every second cycle, multiply-adds twice a
// cycle).
bool pays_here([[maybe_unused]] const Level& level) {
#if defined(__x86_64__)
  return std::strcmp(level.name, "avx512_bf16") != 0 || !__builtin_cpu_is("intel");
#else
  return true;
#endif
}

// The levels of this processor, best first.
std::vector<const Level*> levels_here() {
  std::vector<const Level*> here;
  for (const Level& level : kLevels)
    if (level.runs_here()) here.push_back(&level);
  for (size_t i = 0; i + 1 < here.size(); ++i)
    if (!pays_here(*here[i])) {
      std::swap(here[i], here[i + 1]);
      break;
    }
  return here;
}

const Level& choose_level() {
  const char* wanted = std::getenv("CERBERUS_ISA");
  std::string names;
  for (const Level* level : levels_here()) {
    if (!wanted || !*wanted || std::strcmp(wanted, level->name) == 0) return *level;
    names += (names.empty() ? "" : ", ") + std::string(level->name);
  }
  throw std::runtime_error("cerberus_ext: CERBERUS_ISA must be one of " + names + " on this CPU, got " +
                           wanted);
}

const Level& level() {
  static const Level& chosen = choose_level();
  return chosen;
}

// collapse: also what is there already.
void large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes,
                 [[maybe_unused]] bool collapse) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, of Linux 6.1
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (start + kPage - 1) / kPage * kPage, end = (start + bytes) / kPage * kPage;
  if (begin >= end) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  if (collapse) madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#endif
}

// Memory that malloc maps anew for every call, which is what it does with so much of it: on pages of 2 MiB,
// where the system has them, writing to it first does not stop at every 4 KiB. Measured on two threads, 48
// MiB (512 rows of 49152 bfloat16): 3 ms instead of 12.
constexpr int64_t kMappedAnew = 32 << 20;

// Calls the kernel. Products without outputs may have any number of rows, which the kernel would walk.
template <typename Args>
void call(void (*kernel)(const Args&, const Parallel&), const Args& a, const Parallel& parallel) {
  if constexpr (std::is_same_v<Args, LinearArgs>) {
    if (a.out_size == 0) return;
    const int64_t bytes = a.rows * a.out_size * (a.dtype == DType::kFloat32 ? 4 : 2);
    if (bytes >= kMappedAnew) large_pages(a.output, bytes, false);
  }
  kernel(a, parallel);
}

}  // namespace

#define CHOSEN(op, Op, schema) \
  void op##_cpu(const Op##Args& a, const Parallel& p) { call(level().op, a, p); }
CERBERUS_OPS(CHOSEN)
#undef CHOSEN

int64_t draft_topk_parts_cpu(int64_t vocab) { return (vocab + kDraftTopkPart - 1) / kDraftTopkPart; }

void tree_attentions_cpu(const TreeAttentionsArgs& a, const Parallel& p) { level().tree_attentions(a, p); }
void rows_cpu(const RowsArgs& a, const Parallel& p) { level().rows(a, p); }
void packed_linear_cpu(const LinearArgs& a, const Parallel& p) { level().packed_linear(a, p); }
void pack_weights_cpu(const PackWeightsArgs& a, const Parallel& p) { level().pack_weights(a, p); }
int64_t packed_elements_cpu(DType dtype, int64_t rows, int64_t size) {
  return level().packed_elements && rows > 0 ? level().packed_elements(dtype, rows, size) : 0;
}
void block_linear_cpu(const LinearArgs& a, Packing packing, const Parallel& p) {
  level().block_linear(a, packing, p);
}
void pack_blocks_cpu(const PackBlocksArgs& a, const Parallel& p) { level().pack_blocks(a, p); }
int64_t block_bytes_cpu(Packing packing, int64_t rows, int64_t size) {
  return level().block_bytes && rows > 0 ? level().block_bytes(packing, rows, size) : 0;
}
bool packs_device_blocks() {
#if defined(__x86_64__)
  static const bool here = has_avx512();
  return here;
#else
  return false;
#endif
}
void pack_device_blocks_cpu([[maybe_unused]] const PackBlocksArgs& a, [[maybe_unused]] const Parallel& p) {
#if defined(__x86_64__)
  avx512::pack_device_blocks(a, p);
#endif
}
void eight_bit_linear_cpu(const LinearArgs& a, const Parallel& p) { level().eight_bit_linear(a, p); }
void pack_eight_bits_cpu(const PackEightBitsArgs& a, const Parallel& p) { level().pack_eight_bits(a, p); }
int64_t eight_bit_bytes_cpu(int64_t rows, int64_t size) {
  const int64_t tile = kEightBitRows * (static_cast<int64_t>(sizeof(float)) + (size + 1) / 2 * 2);
  return (rows + kEightBitRows - 1) / kEightBitRows * tile;
}
void draft_cpu(const DraftArgs& a, const Parallel& p) { portable::draft(a, p); }
void prefer_large_pages_cpu(void* memory, int64_t bytes) { large_pages(memory, bytes, true); }

std::string cpu_isa() { return level().name; }

}  // namespace cerberus
