#include "fiber.h"

#include <sys/mman.h>

#include <cstring>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SIMT_THREAD_SANITIZER)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif

namespace simt {
namespace {

// The beginning: the stack of whoever calls enter().
struct Beginning {
#if defined(__x86_64__)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  void* fake_stack;
  const void* bottom;
  size_t size;
  void* tsan;
} beginning;

#if defined(__x86_64__)
// Saves what a callee must keep on the stack, changes stacks, and returns there.
extern "C" void fastenc_simt_switch(void** save, void* to);
asm(R"(
.text
.type fastenc_simt_switch, @function
fastenc_simt_switch:
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
.size fastenc_simt_switch, .-fastenc_simt_switch
)");
#endif

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stack of a fiber");
  stack_ = static_cast<char*>(memory);
#if defined(SIMT_THREAD_SANITIZER)
  tsan_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#if defined(SIMT_THREAD_SANITIZER)
  __tsan_destroy_fiber(tsan_);
#endif
  munmap(stack_, kStackBytes);
}

void Fiber::start(void (*entry)()) {
  fake_stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStackBytes);  // of frames that a fault left behind
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  *--top = nullptr;  // as if entry() were called: its stack is 8 bytes off a multiple of 16
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;
  std::memset(top, 0, 6 * sizeof(void*));
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&beginning.fake_stack, stack_, kStackBytes);
#endif
#if defined(SIMT_THREAD_SANITIZER)
  beginning.tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, 1);  // 1: without an edge, as only barriers order threads
#endif
#if defined(__x86_64__)
  fastenc_simt_switch(&beginning.stack_pointer, stack_pointer_);
#else
  swapcontext(&beginning.context, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(beginning.fake_stack, nullptr, nullptr);
#endif
}

void Fiber::leave([[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, beginning.bottom, beginning.size);
#endif
#if defined(SIMT_THREAD_SANITIZER)
  __tsan_switch_to_fiber(beginning.tsan, 1);
#endif
#if defined(__x86_64__)
  fastenc_simt_switch(&stack_pointer_, beginning.stack_pointer);
#else
  swapcontext(&context_, &beginning.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::begin() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &beginning.bottom, &beginning.size);
#endif
}

void Fiber::synchronize() {
#if defined(SIMT_THREAD_SANITIZER)
  void* here = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, 0);
  __tsan_switch_to_fiber(here, 0);
#endif
}

}  // namespace simt
