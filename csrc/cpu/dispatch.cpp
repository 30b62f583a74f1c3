// Picks the level of the instruction set: once, when the first kernel or cpu_isa() is called.
//
// Not while the library is loaded: an exception there would end the process. cerberus_ext/__init__.py calls
// cpu_isa() right after loading, so that a wrong CERBERUS_CPU_ISA shows as an error of the import.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/parts.h"

CERBERUS_DECLARE_KERNELS(portable)
#if defined(__x86_64__)
CERBERUS_DECLARE_KERNELS(avx2)
CERBERUS_DECLARE_KERNELS(avx512)
CERBERUS_DECLARE_KERNELS(avx512_bf16)
#endif

namespace cerberus {
namespace {

struct Level {
  const char* name;
  bool (*runs_here)();
  decltype(&portable::hidden_entropy) hidden_entropy;
  decltype(&portable::head_stack) head_stack;
  decltype(&portable::draft_topk) draft_topk;
  decltype(&portable::choose_tokens) choose_tokens;
  decltype(&portable::tree_attention) tree_attention;
  decltype(&portable::write_cache) write_cache;
  decltype(&portable::verify_tree) verify_tree;
  decltype(&portable::commit_cache) commit_cache;
  decltype(&portable::linear) linear;
  decltype(&portable::activation) activation;
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

#define CERBERUS_LEVEL(isa, runs_here) \
  {#isa,                               \
   runs_here,                          \
   &isa::hidden_entropy,               \
   &isa::head_stack,                   \
   &isa::draft_topk,                   \
   &isa::choose_tokens,                \
   &isa::tree_attention,               \
   &isa::write_cache,                  \
   &isa::verify_tree,                  \
   &isa::commit_cache,                 \
   &isa::linear,                       \
   &isa::activation}

// Best first.
const Level kLevels[] = {
#if defined(__x86_64__)
    CERBERUS_LEVEL(avx512_bf16, has_avx512_bf16),
    CERBERUS_LEVEL(avx512, has_avx512),
    CERBERUS_LEVEL(avx2, has_avx2),
#endif
    CERBERUS_LEVEL(portable, always),
};

const Level& choose_level() {
  const char* wanted = std::getenv("CERBERUS_CPU_ISA");
  std::string here;
  for (const Level& level : kLevels) {
    if (!level.runs_here()) continue;
    if (!wanted || !*wanted || std::strcmp(wanted, level.name) == 0) return level;
    here += (here.empty() ? "" : ", ") + std::string(level.name);
  }
  throw std::runtime_error("cerberus_ext: CERBERUS_CPU_ISA must be one of " + here + " on this CPU, got " +
                           wanted);
}

const Level& level() {
  static const Level& chosen = choose_level();
  return chosen;
}

}  // namespace

void hidden_entropy_cpu(const HiddenEntropyArgs& a, const Parallel& p) { level().hidden_entropy(a, p); }
void head_stack_cpu(const HeadStackArgs& a, const Parallel& p) { level().head_stack(a, p); }
void draft_topk_cpu(const DraftTopkArgs& a, const Parallel& p) { level().draft_topk(a, p); }
void choose_tokens_cpu(const ChooseTokensArgs& a, const Parallel& p) { level().choose_tokens(a, p); }
void tree_attention_cpu(const TreeAttentionArgs& a, const Parallel& p) { level().tree_attention(a, p); }
void write_cache_cpu(const WriteCacheArgs& a, const Parallel& p) { level().write_cache(a, p); }
void verify_tree_cpu(const VerifyTreeArgs& a, const Parallel& p) { level().verify_tree(a, p); }
void commit_cache_cpu(const CommitCacheArgs& a, const Parallel& p) { level().commit_cache(a, p); }
void linear_cpu(const LinearArgs& a, const Parallel& p) { level().linear(a, p); }
void activation_cpu(const ActivationArgs& a, const Parallel& p) { level().activation(a, p); }

int64_t draft_topk_parts_cpu(int64_t vocab) { return (vocab + kDraftTopkPart - 1) / kDraftTopkPart; }

std::string cpu_isa() { return level().name; }

}  // namespace cerberus
