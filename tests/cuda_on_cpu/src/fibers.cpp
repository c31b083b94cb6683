// Switching between fibers: registers that a call must keep go to the stack, and the stack changes.
#include <cstring>

#include "runtime.h"

#if defined(__x86_64__) && !defined(CUEMU_PORTABLE_FIBERS)

asm(R"(
  .text
  .hidden cuemu_switch
  .globl cuemu_switch
  .type cuemu_switch, @function
cuemu_switch:
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
  .size cuemu_switch, .-cuemu_switch
)");

namespace cuemu {

void* make_context(char* top, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  void** stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;  // where entry would return to; also aligns the stack as a call does
  *--stack = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--stack = nullptr;
  return stack;
}

}  // namespace cuemu

#else

// Any other CPU: correct, and some 80 times slower a switch, for swapcontext asks the kernel.
#include <ucontext.h>

extern "C" void cuemu_switch(void** save, void* to) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

namespace cuemu {

void* make_context(char* top, void (*entry)()) {
  char* place = top - (sizeof(ucontext_t) + 63) / 64 * 64;
  auto* context = new (place) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = top - kStackBytes / 2;
  context->uc_stack.ss_size = static_cast<size_t>(place - (top - kStackBytes / 2));
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

}  // namespace cuemu

#endif
