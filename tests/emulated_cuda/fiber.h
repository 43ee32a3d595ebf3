// A stack of its own for a thread that is not the system's.
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp refuses to go to another stack
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulated {

// The first entry is makecontext's; from then on _setjmp and _longjmp switch, without a system call.
class Fiber {
 public:
  // loop runs on the stack and never returns.
  explicit Fiber(void (*loop)()) : loop_(loop) {
    void* stack = mmap(nullptr, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) {
      throw std::bad_alloc();
    }
    stack_ = static_cast<char*>(stack);
    mprotect(stack_, GUARD, PROT_NONE);
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  ~Fiber() {
    munmap(stack_, SIZE);
  }

  // From outside: goes on where the fiber is, and returns when it leaves.
  void enter() {
    switch_to(&outside_.fake_stack, stack_ + GUARD, SIZE - GUARD);
    if (_setjmp(outside_.registers) == 0) {
      if (entered_) {
        _longjmp(inside_.registers, 1);
      }
      begin();
    }
    switched(outside_.fake_stack, nullptr, nullptr);
  }

  // From the fiber: back to where it was entered.
  void leave() {
    switch_to(&inside_.fake_stack, outside_stack_, outside_size_);
    if (_setjmp(inside_.registers) == 0) {
      _longjmp(outside_.registers, 1);
    }
    switched(inside_.fake_stack, &outside_stack_, &outside_size_);
  }

 private:
  static constexpr size_t SIZE = 256 * 1024;
  static constexpr size_t GUARD = 4096;  // below the stack: running over it is a fault, not another thread's numbers

  struct Side {
    jmp_buf registers;
    void* fake_stack = nullptr;
  };

  void begin() {
    entered_ = true;
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_ + GUARD;
    context_.uc_stack.ss_size = SIZE - GUARD;
    context_.uc_link = nullptr;
    beginning_ = this;
    makecontext(&context_, run, 0);
    setcontext(&context_);
  }

  static void run() {
    Fiber* fiber = beginning_;
    fiber->switched(nullptr, &fiber->outside_stack_, &fiber->outside_size_);
    fiber->loop_();
  }

  // AddressSanitizer is told which stack is in use.
#ifdef __SANITIZE_ADDRESS__
  static void switch_to(void** fake_stack, const void* stack, size_t size) {
    __sanitizer_start_switch_fiber(fake_stack, stack, size);
  }
  static void switched(void* fake_stack, const void** left_stack, size_t* left_size) {
    __sanitizer_finish_switch_fiber(fake_stack, left_stack, left_size);
  }
#else
  static void switch_to(void**, const void*, size_t) {
  }
  static void switched(void*, const void**, size_t*) {
  }
#endif

  static inline Fiber* beginning_;

  void (*loop_)();
  char* stack_;
  bool entered_ = false;
  ucontext_t context_;
  Side outside_;
  Side inside_;
  const void* outside_stack_ = nullptr;
  size_t outside_size_ = 0;
};

}  // namespace emulated
