// cp.async, as late as the rules allow: from the issue of a copy to the wait for its group its
// destination is poison, and the source is read at the wait.
#include <algorithm>
#include <numeric>

#include "checker.h"

namespace cuemu {

namespace {
constexpr int kCopyBytes = 16;
}

void async_copy(void* destination, const void* source, int source_size, Place place) {
  const Uninterrupted uninterrupted;
  require_alignment(destination, kCopyBytes, place);
  require_alignment(source, kCopyBytes, place);  // of a copy that only fills with zeros as well
  if (!is_in_shared_array(destination, kCopyBytes)) {
    abandon("out of bounds", "cp.async writes outside every shared array, at " + describe(place));
  }
  if (source_size > 0) {
    check_access(source, static_cast<size_t>(source_size), Access::kRead, place);
  }
  check_access(destination, kCopyBytes, Access::kInFlight, place);
  std::memset(destination, kPoison, kCopyBytes);
  g_current->copies.push_back(
      {static_cast<char*>(destination), static_cast<const char*>(source), source_size, place});
}

void async_commit() {
  const Uninterrupted uninterrupted;
  Thread& t = *g_current;
  const size_t committed =
      std::accumulate(t.committed_groups.begin(), t.committed_groups.end(), size_t{0});
  t.committed_groups.push_back(t.copies.size() - committed);
}

void async_wait(int groups_left) {
  const Uninterrupted uninterrupted;
  Thread& t = *g_current;
  const size_t groups = t.committed_groups.size();
  const size_t done = groups - std::min(groups, static_cast<size_t>(groups_left));
  const auto group_end = t.committed_groups.begin() + static_cast<std::ptrdiff_t>(done);
  const auto copies = std::accumulate(t.committed_groups.begin(), group_end, std::ptrdiff_t{0});
  for (auto copy = t.copies.begin(); copy != t.copies.begin() + copies; ++copy) {
    check_access(copy->destination, kCopyBytes, Access::kWrite, copy->place);
    std::memset(copy->destination, 0, kCopyBytes);
    if (copy->source_size > 0) {
      std::memcpy(copy->destination, copy->source, static_cast<size_t>(copy->source_size));
    }
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + copies);
  t.committed_groups.erase(t.committed_groups.begin(), group_end);
}

void check_no_copy_left() {
  if (g_current->copies.empty()) return;
  const Uninterrupted uninterrupted;
  abandon("cp.async", "exits with copies that it never waited for, issued at " +
                          describe(g_current->copies.front().place));
}

}  // namespace cuemu
