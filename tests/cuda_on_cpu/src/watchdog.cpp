// A kernel that faults or does not end must end in a report, not take the process along. The
// handler leaves the fiber for the host's stack, and what the fiber was doing is lost: a launch
// that takes too long is left in the kernel's own code alone, never within the allocator or the
// checker. What counts is the time that its thread has run: on a busy machine it waits for others.
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <csignal>
#include <ctime>
#include <stdexcept>

#include "locate.h"
#include "runtime.h"

#ifndef sigev_notify_thread_id  // glibc names it since 2.40
#define sigev_notify_thread_id _sigev_un._tid
#endif

namespace cuemu {

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGALRM};
constexpr size_t kCount = sizeof kSignals / sizeof *kSignals;
// Until the alarm finds the kernel's own code, at the end of its time.
constexpr long kRetryNanoseconds = 5'000'000;
struct sigaction g_previous[kCount];
alignas(16) char g_handler_stack[64 << 10];
stack_t g_previous_stack;
timer_t g_timer;
pid_t g_thread;  // that launches; no other one's signals are ours
double g_end;    // of the launch, on its thread's clock
volatile sig_atomic_t g_expired;
volatile sig_atomic_t g_held;  // how many Uninterrupted live

pid_t this_thread() { return static_cast<pid_t>(syscall(SYS_gettid)); }

// Seconds that this thread has run.
double thread_seconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

std::string hexadecimal(const void* address) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", address);
  return text;
}

const void* interrupted_at(const void* context) {
  const mcontext_t& machine = static_cast<const ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  return reinterpret_cast<const void*>(machine.gregs[REG_RIP]);
#else
  return reinterpret_cast<const void*>(machine.pc);
#endif
}

[[noreturn]] void abandon_as_expired() { abandon("timeout", "the launch takes too long"); }

void handle(int signal, siginfo_t* info, void* context) {
  const bool ours = this_thread() == g_thread;
  if (signal == SIGALRM && ours) {
    if (thread_seconds() < g_end) return;
    g_expired = 1;
    if (g_current == nullptr || g_held > 0 || !is_in_image(interrupted_at(context))) return;
    abandon_as_expired();
  }
  if (g_current == nullptr || !ours) {  // not in a kernel: what would have happened without us
    for (size_t i = 0; i < kCount; ++i) {
      if (kSignals[i] == signal) sigaction(signal, &g_previous[i], nullptr);
    }
    if (signal == SIGALRM) raise(signal);
    return;
  }
  if (signal == SIGFPE) abandon("undefined behaviour", "integer division by zero or overflow");
  abandon("out of bounds", "access to unmapped memory at " + hexadecimal(info->si_addr));
}

// To this thread: a process has others, on whose stacks the handler has no business.
void start_timer(double seconds) {
  sigevent event{};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGALRM;
  event.sigev_notify_thread_id = g_thread;
  if (timer_create(CLOCK_MONOTONIC, &event, &g_timer) != 0) {
    throw std::runtime_error("no timer for the launch");
  }
  itimerspec time{};
  time.it_value.tv_sec = static_cast<time_t>(seconds);
  time.it_value.tv_nsec = static_cast<long>((seconds - std::floor(seconds)) * 1e9);
  time.it_interval.tv_nsec = kRetryNanoseconds;
  timer_settime(g_timer, 0, &time, nullptr);
}

}  // namespace

Watchdog::Watchdog() {
  g_thread = this_thread();
  g_expired = g_held = 0;
  is_in_image(nullptr);  // finds the image now, not in the handler
  stack_t stack{};
  stack.ss_sp = g_handler_stack;
  stack.ss_size = sizeof g_handler_stack;
  sigaltstack(&stack, &g_previous_stack);
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART | SA_NODEFER;  // it may not return
  for (size_t i = 0; i < kCount; ++i) sigaction(kSignals[i], &action, &g_previous[i]);
  g_end = thread_seconds() + config().timeout;
  start_timer(config().timeout);
}

Watchdog::~Watchdog() {
  timer_delete(g_timer);
  for (size_t i = 0; i < kCount; ++i) sigaction(kSignals[i], &g_previous[i], nullptr);
  sigaltstack(&g_previous_stack, nullptr);
}

bool has_expired() { return g_expired != 0; }

void forget_uninterrupted() { g_held = 0; }

Uninterrupted::Uninterrupted() { g_held = g_held + 1; }

Uninterrupted::~Uninterrupted() {
  g_held = g_held - 1;
  if (g_held == 0 && g_expired != 0 && g_current != nullptr) abandon_as_expired();
}

}  // namespace cuemu
