// Torch-side checks and small helpers of the bindings. Only stable-ABI torch headers come in here.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "common/dtype.h"

// Every message says op, argument, expected, got.
#define MAFNET_CHECK(condition, op, argument, expected, got) \
  STD_TORCH_CHECK(condition, op, ": ", argument, ": expected ", expected, ", got ", got)

namespace mafnet {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d ? ", " : "") + std::to_string(tensor.size(d));
  }
  return text + ")";
}

// The dtype of tensor as kernels see it, or an error.
inline Dtype dtype_of(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      MAFNET_CHECK(false, op, argument, "dtype float64, float32, float16 or bfloat16",
                   torch::headeronly::toString(tensor.scalar_type()));
  }
  return Dtype::kFloat32;
}

inline void check_dims(const char* op, const char* argument, const Tensor& tensor, int64_t dims) {
  MAFNET_CHECK(tensor.dim() == dims, op, argument, std::to_string(dims) + " dimensions",
               "shape " + shape_of(tensor));
}

inline void check_shape(const char* op, const char* argument, const Tensor& tensor,
                        std::array<int64_t, 4> shape) {
  check_dims(op, argument, tensor, 4);
  for (int64_t d = 0; d < 4; ++d) {
    MAFNET_CHECK(tensor.size(d) == shape[d], op, argument,
                 "size " + std::to_string(shape[d]) + " in dimension " + std::to_string(d),
                 "shape " + shape_of(tensor));
  }
}

inline void check_same_device(const char* op, const char* argument, const Tensor& tensor,
                              const Tensor& first) {
  MAFNET_CHECK(tensor.device() == first.device(), op, argument, "the device of input",
               tensor.is_cuda() ? "a CUDA device" : "another device");
}

// Kernels count rows and columns in int, with room for the stencil beside them.
inline int extent_of(const char* op, const char* argument, const Tensor& tensor, int64_t dim) {
  constexpr int64_t kLimit = std::numeric_limits<int>::max() / 2 - 8;
  MAFNET_CHECK(tensor.size(dim) <= kLimit, op, argument, "at most 2^30 rows and columns",
               "shape " + shape_of(tensor));
  return static_cast<int>(tensor.size(dim));
}

// Channels that lie side by side are handled as channels_last, whatever the strides of the pixels.
// The fake kernels in Python follow the same rule.
inline bool has_channels_last(const Tensor& tensor) {
  return tensor.size(1) > 1 && tensor.stride(1) == 1;
}

inline MemoryFormat memory_format_of(const Tensor& tensor) {
  return has_channels_last(tensor) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

inline Tensor empty_on(const Tensor& like, std::array<int64_t, 4> shape, ScalarType dtype,
                       MemoryFormat format) {
  return torch::stable::empty({shape.data(), shape.size()}, dtype, std::nullopt, like.device(),
                              std::nullopt, format);
}

// The values in ascending order along the last dimension and where each came from; equal ones keep
// their order.
inline std::tuple<Tensor, Tensor> stable_sort(const Tensor& tensor) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(tensor), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{-1}), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

inline void copy_strides(const Tensor& tensor, int64_t (&strides)[4]) {
  for (int64_t d = 0; d < 4; ++d) strides[d] = tensor.stride(d);
}

}  // namespace mafnet
