#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "runtime.h"

namespace cuemu {

namespace {
constexpr size_t kAlignment = 256;  // of cudaMalloc
}

bool HostArray::is_empty() const {
  return std::any_of(shape.begin(), shape.end(), [](int64_t n) { return n == 0; });
}

size_t HostArray::span() const {
  if (is_empty()) return 0;
  int64_t last = 0;
  for (size_t axis = 0; axis < shape.size(); ++axis) last += (shape[axis] - 1) * strides[axis];
  return static_cast<size_t>(last) + item_size;
}

// The array ends as close to the forbidden page as its alignment lets it; `phase` bytes off the
// alignment where the caller's own array is, so that misaligned arguments stay so.
Buffer::Buffer(const HostArray& array, Mode buffer_mode) : host(&array), mode(buffer_mode) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t size = array.span();
  const size_t phase = array.offset % kAlignment;
  const size_t room = (phase + size + kAlignment - 1) / kAlignment * kAlignment;
  const size_t inner = (std::max<size_t>(room, 1) + page - 1) / page * page;
  page_bytes = inner + 2 * page;
  void* mapped = mmap(nullptr, page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::runtime_error("no memory for " + array.name);
  pages = static_cast<char*>(mapped);
  mprotect(pages + page, inner, PROT_READ | PROT_WRITE);
  begin = pages + page + inner - room + phase;
  end = begin + size;
  std::memset(pages + page, kPoison, inner);
  if (!is_fresh(mode)) std::memcpy(begin, array.data, size);
}

Buffer::~Buffer() { munmap(pages, page_bytes); }

void Buffer::copy_back() const {
  if (mode == Mode::kIn || mode == Mode::kScratch) return;
  for_each_element(*host, [&](int64_t offset) {
    std::memcpy(host->data + offset, begin + offset, host->item_size);
  });
}

void Buffer::check_slack() const {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const auto check = [&](const char* from, const char* to, const char* where) {
    for (const char* p = from; p < to; ++p) {
      if (static_cast<unsigned char>(*p) == kPoison) continue;
      report("out of bounds", "a write " + std::string(where) + " of '" + host->name + "'");
      return;
    }
  };
  check(pages + page, begin, "before the beginning");
  check(end, pages + page_bytes - page, "past the end");
}

}  // namespace cuemu
