// From the functions that instrumented code calls to the checker.
#pragma once

#include "checker.h"

namespace cuemu {

// `aligned`: the compiler counts on the address being a multiple of size.
void check_instrumented_access(const void* address, size_t size, Access access, bool aligned,
                               const void* return_address);
void check_undefined_behaviour(const char* kind, const char* what, Place place);

}  // namespace cuemu
