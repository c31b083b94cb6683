// numpy's type names and the project's dtypes.
#pragma once

#include <stdexcept>

#include "binding.h"
#include "common/dtype.h"

namespace cuemu {

// numpy has no bfloat16: its bits come as uint16.
inline mafnet::Dtype dtype_of(const Array& array) {
  if (array.type == "f4") return mafnet::Dtype::kFloat32;
  if (array.type == "f8") return mafnet::Dtype::kFloat64;
  if (array.type == "f2") return mafnet::Dtype::kFloat16;
  if (array.type == "u2") return mafnet::Dtype::kBFloat16;
  throw std::invalid_argument(array.name + ": no dtype for numpy's " + array.type);
}

}  // namespace cuemu
