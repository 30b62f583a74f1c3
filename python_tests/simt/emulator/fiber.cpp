#include "fiber.h"

#include <cstdlib>
#include <cstring>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// simt_switch(save, load): pushes the registers that a function must preserve, leaves the stack pointer in
// *save, and goes on where the stack pointer `load` was left.
extern "C" void simt_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
constexpr int kSavedWords = 6, kReturnWord = 6;  // on the stack, lowest first; then where to return to
#elif defined(__aarch64__)
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, %function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch, .-simt_switch
)");
constexpr int kSavedWords = 20, kReturnWord = 11;  // x30 is among the saved registers
#else
#error "the emulation knows x86-64 and AArch64"
#endif

namespace simt {
namespace {

// Whoever resumes fibers: its stack pointer, and what the address sanitizer wants to know of its stack.
struct Resumer {
  void* stack_pointer;
  const void* stack;
  size_t stack_bytes;
  void* fake_stack;
} resumer;
Fiber* current = nullptr;

}  // namespace

void Fiber::prepare(char* stack, void (*function)()) {
  stack_ = stack;
  function_ = function;
  *reinterpret_cast<uint64_t*>(stack) = kCanary;
  // As if it had been left just before the first instruction of run(), with the stack as a call leaves it: at
  // a multiple of 16 bytes before the return address is pushed.
  void** const top = reinterpret_cast<void**>(stack + kStackBytes);
  void** const saved = top - (kReturnWord < kSavedWords ? kSavedWords : kSavedWords + 2);
  std::memset(saved, 0, reinterpret_cast<char*>(top) - reinterpret_cast<char*>(saved));
  saved[kReturnWord] = reinterpret_cast<void*>(&Fiber::run);
  stack_pointer_ = saved;
}

void Fiber::run() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &resumer.stack, &resumer.stack_bytes);
#endif
  current->function_();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, resumer.stack, resumer.stack_bytes);
#endif
  simt_switch(&current->stack_pointer_, resumer.stack_pointer);
  std::abort();  // nobody resumes a fiber that is over
}

void Fiber::resume() {
  current = this;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&resumer.fake_stack, stack_, kStackBytes);
#endif
  simt_switch(&resumer.stack_pointer, stack_pointer_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(resumer.fake_stack, nullptr, nullptr);
#endif
}

void Fiber::leave() {
  Fiber* const fiber = current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&fiber->fake_stack_, resumer.stack, resumer.stack_bytes);
#endif
  simt_switch(&fiber->stack_pointer_, resumer.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber->fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::abandon() const {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
}

}  // namespace simt
