// Large outputs: what the memory behind a new tensor costs to write, and how to make that cheaper.
//
// malloc returns large blocks to the system and gets them back as pages that do not exist yet. Each
// is zeroed when first touched, and 4 kB at a time that takes longer than the kernel that writes
// it.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mafnet {

// Outputs from this size on are treated specially: above what fits in the L2 cache of any core.
constexpr int64_t kLargeOutput = 4 << 20;

// Prepares memory that is about to be written from end to end: pages of a large one that do not
// exist are made 2 MB at a time where the system allows that.
inline void prepare_output(void* data, int64_t bytes) {
#if defined(__linux__)
  if (bytes < kLargeOutput) return;
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t begin = (reinterpret_cast<int64_t>(data) + page - 1) / page * page;
  const int64_t end = (reinterpret_cast<int64_t>(data) + bytes) / page * page;
  // One page in the middle stands for all: a block comes from the system whole or was used whole.
  unsigned char exists = 0;
  void* middle = reinterpret_cast<void*>(begin + (end - begin) / 2 / page * page);
  if (mincore(middle, static_cast<size_t>(page), &exists) == 0 && (exists & 1)) return;
#if defined(MADV_HUGEPAGE)
  madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#endif
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace mafnet
