// memcheck, racecheck and initcheck for the instrumented kernels of the checked build. Exact for
// the accesses that were executed, whatever the order of threads.
#include "checker.h"

#include <pthread.h>

#include <algorithm>
#include <map>
#include <set>

#include "locate.h"
#include "runtime.h"
#include "sanitizer.h"
#include "shadow.h"

namespace cuemu {

const bool kIsChecked = true;

namespace {

// A buffer or the shared memory of the running block, in cells of `granule` bytes.
struct Region {
  const char *begin, *end;
  const Buffer* buffer;  // null for shared memory
  size_t granule;
  std::vector<Cell> cells;

  bool contains(const char* p) const { return p >= begin && p < end; }
  Cell& cell(const char* p) { return cells[static_cast<size_t>(p - begin) / granule]; }
};

struct Range {
  const char *begin, *end;
  bool contains(const char* p) const { return p >= begin && p < end; }
};

std::vector<Region> g_buffers;
Region* g_last_buffer;
Clock g_clock;
std::vector<std::pair<uint32_t, uint3>> g_block_starts;  // epoch, index
std::set<std::tuple<std::string, Site, std::string>> g_reported;
Range g_host_stack;

constexpr size_t kGranule = 2;  // bytes; no kernel here has smaller elements in shared memory

// Its cells grow on demand and are never cleared: the clock goes on, so old accesses stay old.
Region g_shared{nullptr, nullptr, nullptr, kGranule, {}};

bool is_write(Access access) { return access != Access::kRead; }

const char* verb(Access access) { return is_write(access) ? "write" : "read"; }

// ---- reports

// Once per kind, site and array of a call.
void complain(const char* kind, Site site, const std::string& array, const std::string& text) {
  if (!g_reported.emplace(kind, site, array).second) return;
  report(kind, describe(*g_current) + " at " + describe_site(site) + ": " + text);
}

struct Named {
  std::string array, place;
};

Named name_of(const Region& region, const char* p) {
  if (region.buffer != nullptr) {
    const std::string& name = region.buffer->host->name;
    return {name, "'" + name + "' byte " + std::to_string(p - region.begin)};
  }
  for (const SharedArray& a : g_block.shared_arrays) {
    if (p >= a.begin && p < a.begin + a.size) {
      return {a.name, "shared '" + std::string(a.name) + "' byte " + std::to_string(p - a.begin)};
    }
  }
  return {"", "shared memory"};
}

std::string block_of_epoch(uint32_t epoch) {
  auto after = std::upper_bound(
      g_block_starts.begin(), g_block_starts.end(), epoch,
      [](uint32_t e, const std::pair<uint32_t, uint3>& start) { return e < start.first; });
  const uint3 index = std::prev(after)->second;
  return "block (" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

void complain_of_race(Access access, const Region& region, const char* p, Site site,
                      const std::string& earlier) {
  const Named named = name_of(region, p);
  complain("race", site, named.array,
           std::string(verb(access)) + " of " + named.place + ", " + earlier +
               ", with nothing to order them");
}

// ---- one cell

void check_race(Access access, const Region& region, const char* p, Site site, const Trace& trace,
                const OtherBlocks& other, const char* done) {
  const bool atomic = access == Access::kAtomic;
  if (!(atomic && trace.atomic) && trace.races_with(*g_current, g_clock)) {
    complain_of_race(
        access, region, p, site,
        std::string(done) + " by " + trace.threads.describe() + " at " + describe_site(trace.site));
  }
  if (!(atomic && other.atomic) && other.epoch >= g_clock.grid_start) {
    complain_of_race(access, region, p, site,
                     std::string(done) + " by " + block_of_epoch(other.epoch) + " at " +
                         describe_site(other.site));
  }
}

// Moves what an earlier block of this grid left out of the way.
void set_aside(Trace& trace, OtherBlocks& other) {
  if (trace.epoch >= g_clock.block_start) return;
  if (trace.epoch >= g_clock.grid_start) other = {trace.epoch, trace.site, trace.atomic};
}

void check_initialised(const Region& region, const Cell& cell, const char* p, Site site) {
  if (region.buffer == nullptr) {
    const bool written = cell.write.epoch >= g_clock.block_start;
    if (written && !cell.in_flight) return;
    const Named named = name_of(region, p);
    if (!written) return complain("uninitialised", site, named.array, "read of " + named.place);
    complain("cp.async", site, named.array,
             "read of " + named.place + " before the wait for the copy issued by " +
                 cell.write.threads.describe() + " at " + describe_site(cell.write.site));
  } else if (is_fresh(region.buffer->mode) && cell.write.epoch == 0) {
    const Named named = name_of(region, p);
    complain("uninitialised", site, named.array, "read of " + named.place);
  }
}

void touch_cell(Region& region, Cell& cell, const char* p, Access access, Site site) {
  if (region.buffer != nullptr) {
    set_aside(cell.read, cell.other_read);
    set_aside(cell.write, cell.other_write);
  }
  if (access == Access::kRead || access == Access::kAtomic) {
    check_initialised(region, cell, p, site);
  }
  check_race(access, region, p, site, cell.write, cell.other_write, "written");
  if (access == Access::kRead) {
    cell.read.record(*g_current, g_clock, site, false, true);
    return;
  }
  check_race(access, region, p, site, cell.read, cell.other_read, "read");
  const bool atomic = access == Access::kAtomic;
  cell.write.record(*g_current, g_clock, site, atomic, atomic && cell.write.atomic);
  cell.in_flight = access == Access::kInFlight;
}

void touch(Region& region, const char* begin, size_t size, Access access, Site site) {
  for (const char* p = begin; p < begin + size;) {
    Cell& cell = region.cell(p);
    if (cell.is_gap) {
      const Named named = name_of(region, p);
      complain("out of bounds", site, named.array,
               std::string(verb(access)) + " of " + named.place +
                   ", between the elements of a strided array");
      return;
    }
    touch_cell(region, cell, p, access, site);
    p = region.begin +
        (static_cast<size_t>(p - region.begin) / region.granule + 1) * region.granule;
  }
}

// ---- one access

// The access would do harm or mislead all that follows: ends the launch.
[[noreturn]] void refuse(const char* kind, Site site, const std::string& text) {
  abandon(kind, "at " + describe_site(site) + ": " + text);
}

void access_shared(const char* p, size_t size, Access access, Site site) {
  g_shared.cells.resize(std::max(g_shared.cells.size(), g_block.shared_used / kGranule));
  const SharedArray* nearest = nullptr;
  for (const SharedArray& a : g_block.shared_arrays) {
    if (p >= a.begin && p + size <= a.begin + a.size) return touch(g_shared, p, size, access, site);
    if (p >= a.begin) nearest = &a;
  }
  std::string where;
  if (nearest != nullptr) {
    where = ", at byte " + std::to_string(p - nearest->begin) + " of '" + nearest->name + "' (" +
            std::to_string(nearest->size) + " bytes)";
  }
  refuse("out of bounds", site, std::string("shared ") + verb(access) + where);
}

void access_buffer(Region& region, const char* p, size_t size, Access access, Site site) {
  const Named named = name_of(region, p);
  if (p + size > region.end) {
    refuse("out of bounds", site,
           std::string("global ") + verb(access) + " of " + named.place + ", past the end");
  }
  if (is_write(access) && region.buffer->mode == Mode::kIn) {
    return complain("write to an input", site, named.array, "write of " + named.place);
  }
  touch(region, p, size, access, site);
}

std::string nearest_buffer(const char* p) {
  constexpr std::ptrdiff_t kNear = 1 << 20;
  std::string text;
  std::ptrdiff_t best = kNear;
  for (const Region& r : g_buffers) {
    const std::ptrdiff_t past = p - r.end, before = r.begin - p;
    if (past >= 0 && past < best) {
      best = past;
      text = ", " + std::to_string(past) + " bytes past the end of '" + r.buffer->host->name + "'";
    } else if (before > 0 && before < best) {
      best = before;
      text = ", " + std::to_string(before) + " bytes before '" + r.buffer->host->name + "'";
    }
  }
  return text;
}

Region* find_buffer(const char* p) {
  if (g_last_buffer != nullptr && g_last_buffer->contains(p)) return g_last_buffer;
  for (Region& region : g_buffers) {
    if (region.contains(p)) return g_last_buffer = &region;
  }
  return nullptr;
}

void access_memory(const char* p, size_t size, Access access, Site site) {
  const Range stacks{g_block.stacks, g_block.stacks + kMaxThreads * kStackBytes};
  if (stacks.contains(p)) {
    if (p >= g_current->stack && p + size <= g_current->stack + kStackBytes) return;
    refuse("out of bounds", site, std::string(verb(access)) + " of another thread's local memory");
  }
  if (g_shared.contains(p)) return access_shared(p, size, access, site);
  if (Region* region = find_buffer(p)) return access_buffer(*region, p, size, access, site);
  const bool constant = g_host_stack.contains(p) || is_in_image(p);  // kernel arguments, literals
  if (constant && !is_write(access)) return;
  refuse("out of bounds", site, std::string("global ") + verb(access) + nearest_buffer(p));
}

Region make_region(const Buffer& buffer) {
  Region region{buffer.begin, buffer.end, &buffer, std::min(kGranule, buffer.host->item_size), {}};
  const size_t size = static_cast<size_t>(buffer.end - buffer.begin);
  region.cells.resize((size + region.granule - 1) / region.granule);
  for (Cell& cell : region.cells) cell.is_gap = true;
  for_each_element(*buffer.host, [&](int64_t offset) {
    const char* element = buffer.begin + offset;
    for (size_t byte = 0; byte < buffer.host->item_size; byte += region.granule) {
      region.cell(element + byte).is_gap = false;
    }
  });
  return region;
}

void report_unwritten(Region& region) {
  int64_t elements = 0, unwritten = 0, first = 0;
  for_each_element(*region.buffer->host, [&](int64_t offset) {
    ++elements;
    bool written = true;
    for (size_t byte = 0; byte < region.buffer->host->item_size; byte += region.granule) {
      written = written && region.cell(region.begin + offset + byte).write.epoch != 0;
    }
    if (!written && unwritten++ == 0) first = offset;
  });
  if (unwritten == 0) return;
  report("unwritten output", std::to_string(unwritten) + " of " + std::to_string(elements) +
                                 " elements of '" + region.buffer->host->name +
                                 "', the first at byte " + std::to_string(first));
}

}  // namespace

// ---- from the compiler's instrumentation

void check_instrumented_access(const void* address, size_t size, Access access, bool aligned,
                               const void* return_address) {
  if (g_current == nullptr || size == 0) return;
  const Uninterrupted uninterrupted;
  const Site site = site_of(return_address);
  if (aligned && reinterpret_cast<uintptr_t>(address) % size != 0) {
    refuse("misaligned access", site,
           std::string(verb(access)) + " of " + std::to_string(size) + " bytes");
  }
  access_memory(static_cast<const char*>(address), size, access, site);
}

void check_undefined_behaviour(const char* kind, const char* what, Place place) {
  if (g_current == nullptr) return;
  const Uninterrupted uninterrupted;
  complain(kind, site_of(place), "", what);
}

// ---- from the runtime

void check_access(const void* address, size_t size, Access access, Place place) {
  const Uninterrupted uninterrupted;
  access_memory(static_cast<const char*>(address), size, access, site_of(place));
}

void check_begin_call() {
  g_buffers.clear();
  g_last_buffer = nullptr;
  g_reported.clear();
  pthread_attr_t attributes;
  void* stack = nullptr;
  size_t size = 0;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &stack, &size);
    pthread_attr_destroy(&attributes);
  }
  g_host_stack = {static_cast<const char*>(stack), static_cast<const char*>(stack) + size};
}

void check_add_buffer(const Buffer& buffer) { g_buffers.push_back(make_region(buffer)); }

void check_begin_grid() {
  g_shared.begin = g_block.arena;
  g_shared.end = g_block.arena + kArenaBytes;
  g_clock.begin_grid();
  g_block_starts.clear();
}

void check_begin_block() {
  g_clock.begin_block();
  g_block_starts.emplace_back(g_clock.epoch, g_block.index);
}

void check_block_barrier() { g_clock.pass_barrier(); }

void check_end_call() {
  if (g_block.abandoned) return;  // what it would have written is unknown
  for (Region& region : g_buffers) {
    if (region.buffer->mode == Mode::kOut) report_unwritten(region);
  }
}

}  // namespace cuemu
