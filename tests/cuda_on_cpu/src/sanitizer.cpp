// The functions that -fsanitize=thread and -fsanitize=undefined make the kernels call. Their
// libraries are not linked: these definitions take their place.
#include "sanitizer.h"

using cuemu::Access;

namespace {

// Every data block of UBSan begins with the place.
struct UndefinedBehaviour {
  const char* file;
  uint32_t line, column;
};

}  // namespace

extern "C" {

#define ACCESS(name, size, kind, aligned)                                                        \
  void __tsan_##name##size(void* address) {                                                      \
    cuemu::check_instrumented_access(address, size, kind, aligned, __builtin_return_address(0)); \
  }
#define ACCESSES(size)                               \
  ACCESS(read, size, Access::kRead, true)            \
  ACCESS(write, size, Access::kWrite, true)          \
  ACCESS(volatile_read, size, Access::kRead, true)   \
  ACCESS(volatile_write, size, Access::kWrite, true) \
  ACCESS(unaligned_read, size, Access::kRead, false) \
  ACCESS(unaligned_write, size, Access::kWrite, false)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
#undef ACCESSES
#undef ACCESS

void __tsan_read_range(void* address, size_t size) {
  cuemu::check_instrumented_access(address, size, Access::kRead, false,
                                   __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t size) {
  cuemu::check_instrumented_access(address, size, Access::kWrite, false,
                                   __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define HANDLER(name, kind, what, ...)                                                        \
  void __ubsan_handle_##name(UndefinedBehaviour* data, ##__VA_ARGS__) {                       \
    cuemu::check_undefined_behaviour(kind, what, {data->file, static_cast<int>(data->line)}); \
  }
#define UNDEFINED(name, what, ...) HANDLER(name, "undefined behaviour", what, ##__VA_ARGS__)
UNDEFINED(out_of_bounds, "array index out of bounds", void*)
HANDLER(type_mismatch_v1, "misaligned access", "pointer to a type of larger alignment", void*)
UNDEFINED(pointer_overflow, "pointer arithmetic overflows", void*, void*)
UNDEFINED(add_overflow, "integer overflow", void*, void*)
UNDEFINED(sub_overflow, "integer overflow", void*, void*)
UNDEFINED(mul_overflow, "integer overflow", void*, void*)
UNDEFINED(negate_overflow, "integer overflow", void*)
UNDEFINED(divrem_overflow, "division by zero or overflow", void*, void*)
UNDEFINED(shift_out_of_bounds, "bad shift", void*, void*)
UNDEFINED(float_cast_overflow, "conversion of a float that no integer of the type holds", void*)
UNDEFINED(load_invalid_value, "invalid bool or enum", void*)
UNDEFINED(nonnull_arg, "null argument")
UNDEFINED(builtin_unreachable, "unreachable code was reached")
UNDEFINED(missing_return, "function without return")
UNDEFINED(vla_bound_not_positive, "array size is not positive", void*)
#undef UNDEFINED
#undef HANDLER

}  // extern "C"
