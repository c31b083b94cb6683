// Threads, barriers, warp operations, launches. A thread runs until it must wait or exits.
#include <sys/mman.h>

#include <algorithm>
#include <numeric>

#include "checker.h"

namespace cuemu {

Thread* g_current = nullptr;
Block g_block;

Config& config() {
  static Config instance;
  return instance;
}

uint3 thread_index() { return g_current->index; }
uint3 block_index() { return g_block.index; }
dim3 block_dimensions() { return g_block.dimensions; }
dim3 grid_dimensions() { return g_block.grid; }
int lane_index() { return g_current->lane; }

namespace {

void return_to_host(Thread& thread) {
  g_current = nullptr;
  cuemu_switch(&thread.stack_pointer, g_block.host_stack_pointer);
}

std::string hexadecimal(uint32_t v) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", v);
  return text;
}

// No thread can run, yet some have not exited.
[[noreturn]] void report_deadlock() {
  const Uninterrupted uninterrupted;
  constexpr int kShown = 4;
  const char* kind = "deadlock";
  std::string text = "no thread can run;";
  int exited = 0, shown = 0;
  for (int i = 0; i < g_block.threads; ++i) {
    const Thread& t = g_block.thread[static_cast<size_t>(i)];
    if (t.state == State::kAtWarpOperation && (t.mask & ~t.warp->alive) != 0) kind = "warp mask";
    if (t.state == State::kExited) {
      ++exited;
    } else if (shown++ < kShown) {
      text += " thread " + std::to_string(i) + " waits at " + describe(t.place) +
              (t.state == State::kAtBlockBarrier
                   ? " (block barrier);"
                   : " (warp operation, mask " + hexadecimal(t.mask) + ");");
    }
  }
  abandon(kind, text + " " + std::to_string(g_block.at_barrier) + " of " +
                    std::to_string(g_block.threads) + " threads are at a block barrier, " +
                    std::to_string(exited) + " have exited");
}

void suspend(Thread& thread, State state) {
  thread.state = state;
  thread.warp->runnable &= ~(1u << thread.turn);
  if (thread.warp->runnable == 0) g_block.runnable_warps &= ~(1u << thread.warp->turn);
}

void wake(Thread& thread) {
  thread.state = State::kRunnable;
  thread.warp->runnable |= 1u << thread.turn;
  g_block.runnable_warps |= 1u << thread.warp->turn;
}

Thread& next_thread(Warp* preferred) {
  Warp* warp = preferred;
  if (warp == nullptr || warp->runnable == 0) {
    warp = g_block.warp_by_turn[__builtin_ctz(g_block.runnable_warps)];
  }
  return *warp->by_turn[__builtin_ctz(warp->runnable)];
}

// Gives way to the thread whose turn it is, the lanes of the same warp first.
void run_others(Thread& self) {
  if (g_block.runnable_warps == 0) {
    if (g_block.alive > 0) report_deadlock();
    return return_to_host(self);
  }
  Thread& next = next_thread(self.warp);
  if (&next == &self) return;
  g_current = &next;
  cuemu_switch(&self.stack_pointer, next.stack_pointer);
}

// Sets the order in which threads run until the next block barrier.
void assign_turns() {
  int lane_turn[kWarpSize], warp_turn[kWarpSize];
  std::iota(lane_turn, lane_turn + kWarpSize, 0);
  std::iota(warp_turn, warp_turn + g_block.warps, 0);
  const Order order = config().order;
  if (order == Order::kReverse) {
    std::reverse(lane_turn, lane_turn + kWarpSize);
    std::reverse(warp_turn, warp_turn + g_block.warps);
  } else if (order == Order::kRandom) {
    std::shuffle(warp_turn, warp_turn + g_block.warps, g_block.random);
  }
  g_block.runnable_warps = 0;
  for (int w = 0; w < g_block.warps; ++w) {
    Warp& warp = g_block.warp[w];
    warp.turn = warp_turn[w];
    g_block.warp_by_turn[warp.turn] = &warp;
    warp.runnable = 0;
    if (order == Order::kRandom) {
      std::shuffle(lane_turn, lane_turn + kWarpSize, g_block.random);
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      Thread* thread = warp.by_lane[lane];
      if (thread == nullptr) continue;
      thread->turn = lane_turn[lane];
      warp.by_turn[thread->turn] = thread;
      if (thread->state == State::kRunnable) warp.runnable |= 1u << thread->turn;
    }
    if (warp.runnable != 0) g_block.runnable_warps |= 1u << warp.turn;
  }
}

void thread_main() {
  g_block.body(g_block.context);
  check_no_copy_left();
  Thread& self = *g_current;
  suspend(self, State::kExited);
  self.warp->alive &= ~(1u << self.lane);
  --g_block.alive;
  run_others(self);
  __builtin_trap();  // an exited thread is never resumed
}

void reset_thread(int i) {
  Thread& t = g_block.thread[static_cast<size_t>(i)];
  const unsigned x = g_block.dimensions.x, y = g_block.dimensions.y, n = static_cast<unsigned>(i);
  t.index = {n % x, n / x % y, n / x / y};
  t.linear = i;
  t.lane = i % kWarpSize;
  t.warp = &g_block.warp[i / kWarpSize];
  t.warp->by_lane[t.lane] = &t;
  t.warp->alive |= 1u << t.lane;
  t.state = State::kRunnable;
  t.operation = nullptr;
  t.warp_epoch = 0;
  t.copies.clear();
  t.committed_groups.clear();
  t.stack = g_block.stacks + static_cast<size_t>(i) * kStackBytes;
  // Tops are staggered: in equal sets of the cache a switch costs twice as much.
  t.stack_pointer = make_context(t.stack + kStackBytes - 64 - t.lane * 192, thread_main);
}

void run_block(uint64_t number, size_t shared_bytes) {
  const dim3 grid = g_block.grid;
  g_block.index = {static_cast<unsigned>(number % grid.x),
                   static_cast<unsigned>(number / grid.x % grid.y),
                   static_cast<unsigned>(number / grid.x / grid.y)};
  g_block.random.seed(config().seed * 7919 + number);
  g_block.at_barrier = 0;
  g_block.alive = g_block.threads;
  for (Warp& warp : g_block.warp) warp = Warp{};
  begin_shared_memory(shared_bytes);
  check_begin_block();
  for (int i = 0; i < g_block.threads; ++i) reset_thread(i);
  assign_turns();
  g_current = &next_thread(nullptr);
  cuemu_switch(&g_block.host_stack_pointer, g_current->stack_pointer);
  forget_uninterrupted();
  if (!g_block.abandoned) check_shared_guards();
}

char* map_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return pages == MAP_FAILED ? nullptr : static_cast<char*>(pages);
}

bool is_valid_launch(uint64_t blocks, dim3 grid, uint64_t threads, dim3 block, size_t shared) {
  const auto sizes = [](dim3 d) {
    return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
  };
  if (blocks > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 && threads > 0 &&
      threads <= kMaxThreads && block.z <= 64 && shared <= config().shared_limit) {
    return true;
  }
  report("launch", "invalid configuration: grid " + sizes(grid) + ", block " + sizes(block) + ", " +
                       std::to_string(shared) + " bytes of shared memory");
  return false;
}

}  // namespace

void abandon(const char* kind, const std::string& text) {
  const Uninterrupted uninterrupted;
  report(kind, describe(*g_current) + ": " + text);
  g_block.abandoned = true;
  return_to_host(*g_current);
  __builtin_unreachable();
}

void block_barrier(Place place) {
  Thread& self = *g_current;
  self.place = place;
  suspend(self, State::kAtBlockBarrier);
  if (++g_block.at_barrier == g_block.threads) {
    for (int i = 0; i < g_block.threads; ++i) {
      Thread& t = g_block.thread[static_cast<size_t>(i)];
      if (t.place.line != place.line || std::strcmp(t.place.file, place.file) != 0) {
        abandon("divergent barrier",
                "some threads wait at " + describe(place) + ", others at " + describe(t.place));
      }
      t.state = State::kRunnable;
    }
    g_block.at_barrier = 0;
    check_block_barrier();
    assign_turns();
  }
  run_others(self);
}

void warp_operation(uint32_t mask, void* operand, WarpOperation operation, Place place) {
  Thread& self = *g_current;
  Warp& warp = *self.warp;
  const uint32_t mine = 1u << self.lane;
  self.place = place;
  self.mask = mask;
  self.operand = operand;
  self.operation = operation;
  if ((mask & mine) == 0) {
    abandon("warp mask",
            "mask " + hexadecimal(mask) + " leaves the calling lane out, at " + describe(place));
  }
  if ((mask & ~warp.alive) != 0) {
    abandon("warp mask", "mask " + hexadecimal(mask) +
                             " names lanes that have exited or do not exist, at " +
                             describe(place));
  }
  warp.arrived |= mine;
  bool complete = (warp.arrived & mask) == mask;
  for (uint32_t left = mask; complete && left != 0; left &= left - 1) {
    const Thread& t = *warp.by_lane[__builtin_ctz(left)];
    complete = t.operation == operation && t.mask == mask;
  }
  if (!complete) {
    suspend(self, State::kAtWarpOperation);
    return run_others(self);
  }
  operation(warp, mask);
  warp.arrived &= ~mask;
  for (uint32_t left = mask & ~mine; left != 0; left &= left - 1) {
    wake(*warp.by_lane[__builtin_ctz(left)]);
  }
}

int launch_grid(void (*body)(void*), void* context, dim3 grid, dim3 block, size_t shared_bytes) {
  if (g_block.launches++ == config().failing_launch) return cudaErrorLaunchFailure;
  if (g_block.abandoned) return cudaErrorLaunchFailure;  // by an earlier launch of the same call
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (!is_valid_launch(blocks, grid, threads, block, shared_bytes)) {
    g_block.abandoned = true;
    return cudaErrorInvalidConfiguration;
  }
  if (g_block.stacks == nullptr) {
    g_block.stacks = map_pages(kMaxThreads * kStackBytes);
    g_block.arena = map_pages(kArenaBytes);
    g_block.thread.resize(kMaxThreads);
  }
  g_block.body = body;
  g_block.context = context;
  g_block.grid = grid;
  g_block.dimensions = block;
  g_block.threads = static_cast<int>(threads);
  g_block.warps = (g_block.threads + kWarpSize - 1) / kWarpSize;
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (config().order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (config().order == Order::kRandom) {
    std::shuffle(order.begin(), order.end(), std::mt19937_64(config().seed));
  }
  check_begin_grid();
  for (const uint64_t number : order) {
    if (has_expired()) {
      report("timeout", "the launch takes too long");
      g_block.abandoned = true;
    } else {
      run_block(number, shared_bytes);
    }
    if (g_block.abandoned) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace cuemu
