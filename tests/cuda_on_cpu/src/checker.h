// What the runtime tells the checker. The fast build links checker_off.cpp, where all of it is
// empty.
#pragma once

#include "memory.h"
#include "runtime.h"

namespace cuemu {

enum class Access : uint8_t { kRead, kWrite, kAtomic, kInFlight };  // kInFlight: cp.async's target

extern const bool kIsChecked;

void check_access(const void* address, size_t size, Access access, Place place);
void check_begin_call();
void check_add_buffer(const Buffer& buffer);  // which must live until the end of the call
void check_begin_grid();
void check_begin_block();
void check_block_barrier();
void check_end_call();

}  // namespace cuemu
