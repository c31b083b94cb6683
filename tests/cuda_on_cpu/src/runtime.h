// The emulator's inside: threads as fibers, their block, and what the parts of the runtime need of
// each other. One OS thread runs everything, so that nothing here is locked and every run repeats.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

namespace cuemu {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kArenaBytes = 512 << 10;        // shared memory of a block, with guards
constexpr size_t kGuardBytes = 256;              // between two shared arrays
constexpr size_t kStaticSharedLimit = 48 << 10;  // nvcc's, on every architecture
constexpr unsigned char kPoison = 0xff;          // NaN as any float, -1 as an int

enum class Order { kForward, kReverse, kRandom };

struct Config {
  Order order = Order::kForward;    // of threads between barriers, and of blocks
  uint64_t seed = 0;                // for kRandom
  double timeout = 60;              // seconds of its thread for one launch
  size_t shared_limit = 227 << 10;  // bytes of shared memory of a block, that of sm_90
  int failing_launch = -1;          // which launch of a call fails; -1: none
  int mutant = -1;                  // what the kernels lose, see mutants.py; -1: nothing
};
Config& config();

enum class State : uint8_t { kRunnable, kAtWarpOperation, kAtBlockBarrier, kExited };

struct Warp;
// Does a warp operation for the lanes of mask, once all have come.
using WarpOperation = void (*)(Warp& warp, uint32_t mask);

struct AsyncCopy {
  char* destination;
  const char* source;
  int source_size;
  Place place;
};

struct Thread {
  uint3 index;
  int linear, lane;
  Warp* warp;
  State state;
  int turn;  // in its warp: the lowest runnable turn goes first
  void* stack_pointer;
  char* stack;
  Place place;    // of the barrier or warp operation it waits at
  uint32_t mask;  // and that operation's mask, operand and kind
  void* operand;
  WarpOperation operation;
  uint32_t warp_epoch;            // grows with each warp barrier; ordered accesses differ in it
  std::vector<AsyncCopy> copies;  // issued and not waited for
  std::vector<size_t> committed_groups;  // how many of them each group has, oldest first
};

struct Warp {
  int turn;
  uint32_t runnable;        // turns of lanes that can run
  uint32_t arrived, alive;  // lanes
  Thread* by_lane[kWarpSize];
  Thread* by_turn[kWarpSize];
};

struct SharedArray {
  char* begin;
  size_t size;
  const char* name;
  const void* tag;
};

struct Block {
  uint3 index;
  dim3 dimensions, grid;
  int threads, warps, at_barrier, alive;
  uint32_t runnable_warps;  // turns
  Warp warp[kWarpSize];
  Warp* warp_by_turn[kWarpSize];
  std::vector<Thread> thread;
  void (*body)(void*);
  void* context;
  void* host_stack_pointer;
  bool abandoned;
  int launches;  // so far, of this call
  std::mt19937_64 random;
  std::vector<SharedArray> shared_arrays;
  size_t shared_used;  // of the arena
  size_t static_shared, dynamic_shared_size;
  char* dynamic_shared;
  char* arena;
  char* stacks;
};

extern Thread* g_current;  // null outside kernels
extern Block g_block;      // the block that runs

// ---- fibers.cpp

// Saves the running context at *save and continues the one at `to`.
extern "C" void cuemu_switch(void** save, void* to);
// A context on the stack that ends at `top`, which will call entry().
void* make_context(char* top, void (*entry)());

// ---- scheduler.cpp

// The last lane to come does operation for all of mask.
void warp_operation(uint32_t mask, void* operand, WarpOperation operation, Place place);
// Ends the launch with a report.
[[noreturn]] void abandon(const char* kind, const std::string& text);

// ---- shared_memory.cpp

void begin_shared_memory(size_t dynamic_size);
void check_shared_guards();
bool is_in_shared_array(const void* address, size_t size);

// ---- async_copy.cpp

void check_no_copy_left();  // when a thread exits

// ---- watchdog.cpp

// While it lives, a fault or too long a launch ends in a report.
class Watchdog {
 public:
  Watchdog();
  ~Watchdog();
};
bool has_expired();

// While it lives, too long a launch goes on: for all in a kernel's thread that allocates or changes
// what outlives the launch. The launch ends with it instead.
class Uninterrupted {
 public:
  Uninterrupted();
  ~Uninterrupted();
};
void forget_uninterrupted();  // those of fibers that were left

// ---- report.cpp

struct Finding {
  std::string kind, text;
};
std::vector<Finding>& findings();
void report(const char* kind, const std::string& text);
std::string describe(Place place);
std::string describe(const Thread& thread);  // with its block

}  // namespace cuemu
