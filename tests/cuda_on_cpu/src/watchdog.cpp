// A kernel that faults or does not end must end in a report, not take the process along. The
// handler leaves the fiber for the host's stack, and what the fiber was doing is lost.
#include <sys/time.h>

#include <csignal>

#include "runtime.h"

namespace cuemu {

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGALRM};
constexpr size_t kCount = sizeof kSignals / sizeof *kSignals;
struct sigaction g_previous[kCount];
alignas(16) char g_handler_stack[64 << 10];
stack_t g_previous_stack;

std::string hexadecimal(const void* address) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", address);
  return text;
}

void handle(int signal, siginfo_t* info, void*) {
  if (g_current == nullptr) {  // not in a kernel: what would have happened without us
    for (size_t i = 0; i < kCount; ++i) {
      if (kSignals[i] == signal) sigaction(signal, &g_previous[i], nullptr);
    }
    if (signal == SIGALRM) raise(signal);
    return;
  }
  if (signal == SIGALRM) abandon("timeout", "the launch takes too long");
  if (signal == SIGFPE) abandon("undefined behaviour", "integer division by zero or overflow");
  abandon("out of bounds", "access to unmapped memory at " + hexadecimal(info->si_addr));
}

void set_timer(double seconds) {
  itimerval timer{};
  timer.it_value.tv_sec = static_cast<time_t>(seconds);
  timer.it_value.tv_usec = static_cast<suseconds_t>((seconds - std::floor(seconds)) * 1e6);
  setitimer(ITIMER_REAL, &timer, nullptr);
}

}  // namespace

Watchdog::Watchdog() {
  stack_t stack{};
  stack.ss_sp = g_handler_stack;
  stack.ss_size = sizeof g_handler_stack;
  sigaltstack(&stack, &g_previous_stack);
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler may not return
  for (size_t i = 0; i < kCount; ++i) sigaction(kSignals[i], &action, &g_previous[i]);
  set_timer(config().timeout);
}

Watchdog::~Watchdog() {
  set_timer(0);
  for (size_t i = 0; i < kCount; ++i) sigaction(kSignals[i], &g_previous[i], nullptr);
  sigaltstack(&g_previous_stack, nullptr);
}

}  // namespace cuemu
