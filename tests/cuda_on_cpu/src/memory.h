// Global memory: each array of a launch is copied to pages of its own between two forbidden ones,
// so that no kernel can harm the process, and copied back if the kernel may write it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cuemu {

enum class Mode { kIn, kOut, kInOut, kScratch };

// Whether nothing is there before the kernel writes it.
inline bool is_fresh(Mode mode) { return mode == Mode::kOut || mode == Mode::kScratch; }

// An array of the caller; of scratch memory, which nobody has, the shape alone. Strides are in
// bytes and not negative.
struct HostArray {
  std::string name, type;  // type is numpy's without the byte order: "f4", "u2"
  char* data;
  size_t item_size;
  size_t offset;  // bytes of misalignment that the kernel shall see
  std::vector<int64_t> shape, strides;

  bool is_empty() const;
  size_t span() const;  // bytes from the first to past the last element
};

// Its copy for the kernel. What lies between the elements of a strided array is not the kernel's.
struct Buffer {
  const HostArray* host;
  Mode mode;
  char *pages, *begin, *end;
  size_t page_bytes;

  Buffer(const HostArray& host, Mode mode);
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  void copy_back() const;
  // Reports writes into the slack between the pages and the array.
  void check_slack() const;
};

// Calls body(offset in bytes) for every element.
template <typename Body>
void for_each_element(const HostArray& array, const Body& body) {
  if (array.is_empty()) return;
  std::vector<int64_t> index(array.shape.size(), 0);
  int64_t offset = 0;
  while (true) {
    body(offset);
    size_t axis = index.size();
    while (axis > 0) {
      --axis;
      offset += array.strides[axis];
      if (++index[axis] < array.shape[axis]) break;
      offset -= array.strides[axis] * array.shape[axis];
      index[axis] = 0;
      if (axis == 0) return;
    }
    if (index.empty()) return;
  }
}

}  // namespace cuemu
