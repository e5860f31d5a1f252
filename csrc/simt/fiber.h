// Fibers: functions with a stack of their own that hand the processor to each other. The sanitizers are told.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 128 * 1024;

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From the fiber that began it all: runs entry() on this one, from its start; it must end in leave(true).
  void start(void (*entry)());
  // From the beginning: goes on where this fiber left.
  void enter();
  // From this fiber: back to where enter() was called. for_good: it is not entered again before the next start.
  void leave(bool for_good = false);
  // First thing in entry().
  void begin();
  // An edge of "happens before" from all this fiber did to what the beginning does next, and the other way round.
  void synchronize();

 private:
  char* stack_;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* tsan_ = nullptr;        // ThreadSanitizer's
};

}  // namespace simt
