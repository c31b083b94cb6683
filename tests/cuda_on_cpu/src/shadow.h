// What the checker remembers of each cell of memory: who touched it last, and in which epoch.
//
// Two accesses by different threads conflict unless both read, both are atomic, or something orders
// them: the end of a grid, a block barrier, or a warp barrier between lanes of one warp. Whether
// they conflict does not depend on the order in which the emulator ran them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "locate.h"
#include "runtime.h"

namespace cuemu {

// A set of threads of one block: one, some lanes of one warp, or some of several warps.
class ThreadSet {
 public:
  ThreadSet() = default;
  explicit ThreadSet(int thread) : bits_(static_cast<uint16_t>(thread)) {}

  bool is_only(int thread) const { return bits_ == thread; }
  bool is_within_warp(int warp) const {
    return bits_ != kSeveralWarps && (bits_ & kLanes ? bits_ & ~kLanes : bits_ / 32) == warp;
  }
  void add(int thread) {
    if (is_only(thread)) return;
    bits_ =
        is_within_warp(thread / 32) ? static_cast<uint16_t>(kLanes | (thread / 32)) : kSeveralWarps;
  }
  std::string describe() const {
    if (bits_ == kSeveralWarps) return "threads of several warps";
    if ((bits_ & kLanes) != 0) return "lanes of warp " + std::to_string(bits_ & ~kLanes);
    return "thread " + std::to_string(bits_);
  }

 private:
  static constexpr uint16_t kSeveralWarps = 0xffff, kLanes = 0x8000;
  uint16_t bits_ = 0;
};

// Where the clock stands. An epoch is the time between two block barriers of one block.
struct Clock {
  uint32_t epoch = 1, block_start = 1, grid_start = 1;

  void begin_grid() { grid_start = block_start = ++epoch; }
  void begin_block() { block_start = ++epoch; }
  void pass_barrier() { ++epoch; }
};

// The last accesses of one kind (reads, or writes) that nothing orders among each other.
struct Trace {
  uint32_t epoch = 0;  // 0: none in this call
  uint32_t warp_epoch = 0;
  Site site = 0;
  ThreadSet threads;
  bool atomic = false;

  // Whether an access by this thread of this block could run at the same time.
  bool races_with(const Thread& thread, const Clock& clock) const {
    if (epoch != clock.epoch || threads.is_only(thread.linear)) return false;
    return !threads.is_within_warp(thread.linear / 32) || warp_epoch >= thread.warp_epoch;
  }
  // Adds an access. It joins those before it if neither is ordered after the other and `joins` says
  // that such accesses do not conflict; else it takes their place: what races with them races with
  // it, or was reported when it did not join.
  void record(const Thread& thread, const Clock& clock, Site new_site, bool is_atomic, bool joins) {
    const bool concurrent =
        joins && epoch == clock.epoch &&
        !(threads.is_within_warp(thread.linear / 32) && warp_epoch < thread.warp_epoch);
    if (concurrent) {
      threads.add(thread.linear);
      warp_epoch = std::max(warp_epoch, thread.warp_epoch);
    } else {
      threads = ThreadSet(thread.linear);
      warp_epoch = thread.warp_epoch;
    }
    epoch = clock.epoch;
    site = new_site;
    atomic = is_atomic;
  }
};

struct OtherBlocks {
  uint32_t epoch = 0;
  Site site = 0;
  bool atomic = false;
};

struct Cell {
  Trace read, write;
  OtherBlocks other_read, other_write;  // the last by an earlier block of this grid
  bool in_flight = false;               // the last write is a cp.async that was not waited for
  bool is_gap = false;                  // between the elements of a strided array
};

}  // namespace cuemu
