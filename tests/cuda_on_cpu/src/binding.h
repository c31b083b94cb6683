// For the files in bindings/: how an op's launch functions are called with the arrays and numbers
// of a test. A binding fills the op's params and calls its launcher, no more.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <string>
#include <vector>

#include "memory.h"

namespace cuemu {

// An array as the kernel sees it; strides are in elements.
struct Array {
  void* data;
  std::string type;  // numpy's, without the byte order: "f4", "f2", "u2" (bfloat16), "i4"
  std::vector<int64_t> shape, stride;

  // Stride of the N axes; throws if the array has another number of axes.
  template <size_t N>
  void copy_strides(int64_t (&target)[N]) const {
    require_axes(N);
    for (size_t axis = 0; axis < N; ++axis) target[axis] = stride[axis];
  }
  void require_axes(size_t axes) const;

  std::string name;
};

// The named arguments of one call. Every one must be asked for.
class Arguments {
 public:
  Arguments(std::vector<HostArray> arrays, std::map<std::string, double> numbers);

  bool has(const std::string& name) const;
  // The kernel only reads an `in`; it must write all of an `out`, which it gets poisoned.
  Array in(const std::string& name) { return array(name, Mode::kIn); }
  Array out(const std::string& name) { return array(name, Mode::kOut); }
  Array in_out(const std::string& name) { return array(name, Mode::kInOut); }
  // Memory that no caller sees, of as many bytes as the op asks for; poison until it is written.
  void* scratch(const std::string& name, int64_t bytes);
  int64_t integer(const std::string& name);
  double number(const std::string& name);

  // After the launch: what outputs hold goes to the caller's arrays.
  void finish() const;

 private:
  Array array(const std::string& name, Mode mode);
  const Buffer& add_buffer(const HostArray& array, Mode mode);

  std::vector<HostArray> arrays_;
  std::map<std::string, double> numbers_;
  std::vector<std::string> used_;
  std::list<HostArray> scratch_;
  std::list<Buffer> buffers_;
};

using Entry = int (*)(Arguments& arguments);
std::map<std::string, Entry>& entries();

struct Registration {
  Registration(const char* name, Entry entry) { entries()[name] = entry; }
};

// CUEMU_ENTRY(forward) { ...; return launch_...(params, nullptr); }
#define CUEMU_ENTRY(name)                                       \
  static int name(::cuemu::Arguments& arguments);               \
  static const ::cuemu::Registration name##_entry(#name, name); \
  static int name(::cuemu::Arguments& arguments)

}  // namespace cuemu
