// A function that runs on a stack of its own, can be left in the middle and gone on with. All fibers belong
// to one operating system thread at a time. Switching takes a few instructions and no system call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 64 << 10;

  // The next resume() calls the function. stack: kStackBytes from a multiple of 16 bytes on.
  void prepare(char* stack, void (*function)());
  // Until it leaves or its function returns; then it must not be resumed again.
  void resume();
  // By the fiber that runs: back to where it was resumed.
  static void leave();
  // It has used up its stack, and perhaps more; seen afterwards.
  bool overflowed() const { return *reinterpret_cast<const uint64_t*>(stack_) != kCanary; }
  // It is never resumed, though its function has not returned: tells the address sanitizer that its stack is
  // free.
  void abandon() const;

 private:
  static constexpr uint64_t kCanary = 0x5353535353535353;  // in the lowest bytes of a stack

  static void run();

  char* stack_ = nullptr;  // its lowest byte
  void (*function_)() = nullptr;
  void* stack_pointer_ = nullptr;
  void* fake_stack_ = nullptr;  // of the address sanitizer
};

}  // namespace simt
