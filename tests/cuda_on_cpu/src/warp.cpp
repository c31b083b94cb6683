// Warp operations other than those of the tensor cores, and atomics.
#include <algorithm>

#include "checker.h"

namespace cuemu {

namespace {

template <typename Body>
void for_each_lane(Warp& warp, uint32_t mask, const Body& body) {
  for (; mask != 0; mask &= mask - 1) body(*warp.by_lane[__builtin_ctz(mask)]);
}

// ---- shuffles

struct Shuffle {
  void* value;
  size_t size;
  int source;
  char received[16];
};

Shuffle& shuffle_of(const Thread& thread) { return *static_cast<Shuffle*>(thread.operand); }

void do_shuffle(Warp& warp, uint32_t mask) {
  for_each_lane(warp, mask, [&](Thread& thread) {
    Shuffle& mine = shuffle_of(thread);
    if ((mask >> mine.source & 1) == 0) {
      abandon("warp mask", "a shuffle reads lane " + std::to_string(mine.source) +
                               ", which is not in the mask, at " + describe(g_current->place));
    }
    std::memcpy(mine.received, shuffle_of(*warp.by_lane[mine.source]).value, mine.size);
  });
  for_each_lane(warp, mask, [](Thread& t) {
    std::memcpy(shuffle_of(t).value, shuffle_of(t).received, shuffle_of(t).size);
  });
}

}  // namespace

void shuffle(uint32_t mask, void* value, size_t size, int source, Place place) {
  Shuffle operand{value, size, source, {}};
  warp_operation(mask, &operand, do_shuffle, place);
}

// ---- votes and barriers

namespace {

struct Vote {
  bool predicate;
  uint32_t result;
};

void do_vote(Warp& warp, uint32_t mask) {
  uint32_t result = 0;
  for_each_lane(warp, mask, [&](const Thread& t) {
    if (static_cast<Vote*>(t.operand)->predicate) result |= 1u << t.lane;
  });
  for_each_lane(warp, mask,
                [&](const Thread& t) { static_cast<Vote*>(t.operand)->result = result; });
}

// Alone among warp operations it orders memory: shuffles and votes only exchange registers.
void do_warp_barrier(Warp& warp, uint32_t mask) {
  uint32_t epoch = 0;
  for_each_lane(warp, mask, [&](const Thread& t) { epoch = std::max(epoch, t.warp_epoch); });
  for_each_lane(warp, mask, [&](Thread& t) { t.warp_epoch = epoch + 1; });
}

}  // namespace

uint32_t ballot(uint32_t mask, bool predicate, Place place) {
  Vote operand{predicate, 0};
  warp_operation(mask, &operand, do_vote, place);
  return operand.result;
}

void warp_barrier(uint32_t mask, Place place) {
  warp_operation(mask, nullptr, do_warp_barrier, place);
}

// ---- atomics

void require_alignment(const void* address, size_t alignment, Place place) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    abandon("misaligned access",
            "not aligned to " + std::to_string(alignment) + " bytes, at " + describe(place));
  }
}

void atomic_access(const void* address, size_t size, Place place) {
  require_alignment(address, size, place);
  check_access(address, size, Access::kAtomic, place);
}

}  // namespace cuemu
