// Shared memory of the running block: arrays in an arena, poisoned, with guards between them.
#include "checker.h"

namespace cuemu {

namespace {

constexpr size_t kAlignment = 128;

size_t padded(size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

char* add_array(size_t size, const char* name, const void* tag) {
  char* begin = g_block.arena + g_block.shared_used;
  const size_t room = padded(size) + kGuardBytes;
  std::memset(begin, kPoison, room);
  g_block.shared_used += room;
  g_block.shared_arrays.push_back({begin, size, name, tag});
  return begin;
}

void require_shared_bytes(size_t size, size_t limit, const char* what, Place place) {
  if (size > limit) {
    abandon("launch", std::to_string(size) + " bytes of " + what + ", at most " +
                          std::to_string(limit) + " are there, at " + describe(place));
  }
}

}  // namespace

void begin_shared_memory(size_t dynamic_size) {
  g_block.shared_arrays.clear();
  g_block.shared_used = g_block.static_shared = 0;
  g_block.dynamic_shared_size = dynamic_size;
  g_block.dynamic_shared = add_array(dynamic_size, "dynamic shared memory", nullptr);
}

void* shared_array(const void* tag, size_t size, const char* name, Place place) {
  for (const SharedArray& array : g_block.shared_arrays) {
    if (array.tag == tag) return array.begin;
  }
  const Uninterrupted uninterrupted;
  g_block.static_shared += size;
  require_shared_bytes(g_block.static_shared, kStaticSharedLimit, "static shared memory", place);
  require_shared_bytes(g_block.static_shared + g_block.dynamic_shared_size, config().shared_limit,
                       "shared memory", place);
  return add_array(size, name, tag);
}

void* dynamic_shared() { return g_block.dynamic_shared; }

bool is_in_shared_array(const void* address, size_t size) {
  const char* p = static_cast<const char*>(address);
  for (const SharedArray& array : g_block.shared_arrays) {
    if (p >= array.begin && p + size <= array.begin + array.size) return true;
  }
  return false;
}

void check_shared_guards() {
  for (const SharedArray& array : g_block.shared_arrays) {
    const char* end = array.begin + array.size;
    const char* guard_end = array.begin + padded(array.size) + kGuardBytes;
    for (const char* p = end; p < guard_end; ++p) {
      if (static_cast<unsigned char>(*p) == kPoison) continue;
      report("out of bounds", "a write " + std::to_string(p - end) + " bytes past the end of '" +
                                  array.name + "' (" + std::to_string(array.size) + " bytes)");
      break;
    }
  }
}

}  // namespace cuemu
