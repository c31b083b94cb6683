// What the bindings of pyramid spatial attention share: images as the kernels see them, gradients
// that may not be wanted, checks.
#pragma once

#include <optional>
#include <tuple>

#include "common/backend.h"
#include "pyramid_spatial_attention/params.h"

namespace mafnet {

inline Source source_of(const char* op, const char* argument, const Tensor& tensor) {
  check_dims(op, argument, tensor, 4);
  Source source{tensor.const_data_ptr(), dtype_of(op, argument, tensor), {}};
  copy_strides(tensor, source.stride);
  return source;
}

inline Target target_of(const char* op, Tensor& tensor) {
  Target target{tensor.mutable_data_ptr(), dtype_of(op, "output", tensor), {}};
  copy_strides(tensor, target.stride);
  return target;
}

// A gradient that may not be wanted: of the shape of like, or of no elements.
inline Tensor grad_like(const Tensor& like, bool wanted) {
  return empty_on(like, {wanted ? like.size(0) : 0, like.size(1), like.size(2), like.size(3)},
                  like.scalar_type(), memory_format_of(like));
}

inline Tensor grad_weight_like(const Tensor& weight, bool wanted) {
  return empty_on(weight,
                  {wanted ? weight.size(0) : 0, weight.size(1), weight.size(2), weight.size(3)},
                  weight.scalar_type(), MemoryFormat::Contiguous);
}

inline Tensor grad_bias_like(const Tensor& weight, bool wanted) {
  const int64_t size = wanted ? weight.size(0) : 0;
  return torch::stable::empty({&size, 1}, weight.scalar_type(), std::nullopt, weight.device(),
                              std::nullopt, std::nullopt);
}

inline void check_like(const char* op, const char* argument, const Tensor& tensor,
                       const Tensor& input) {
  check_same_device(op, argument, tensor, input);
  MAFNET_CHECK(tensor.scalar_type() == input.scalar_type(), op, argument, "the dtype of input",
               torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_bias(const char* op, const Tensor& bias, const Tensor& weight) {
  check_like(op, "bias", bias, weight);
  MAFNET_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), op, "bias",
               "shape (" + std::to_string(weight.size(0)) + ")", "shape " + shape_of(bias));
}

inline void check_slope(const char* op, double slope) {
  MAFNET_CHECK(slope >= 0, op, "negative_slope", "at least 0", slope);
}

inline void check_size(const char* op, int64_t height, int64_t width) {
  constexpr int64_t kLimit = std::numeric_limits<int>::max() / 2 - 8;
  MAFNET_CHECK(height > 0 && width > 0 && height <= kLimit && width <= kLimit, op, "size",
               "1 to 2^30 rows and columns",
               std::to_string(height) + " x " + std::to_string(width));
}

// One long row instead of many makes pixelwise work simpler, where the strides of all images allow
// that.
template <typename Pointer>
bool is_flat(const ImageOf<Pointer>& image, int height, int width) {
  return image.data == nullptr || height == 1 || width == 1 ||
         image.stride[2] == width * image.stride[3];
}

template <typename Pointer>
void flatten(ImageOf<Pointer>& image, int width) {
  if (width == 1) image.stride[3] = image.stride[2];
}

// Workspace of a backward on CUDA; the tensor owns it.
inline Tensor make_workspace(const Tensor& like, int64_t bytes) {
  return empty_on(like, {1, 1, 1, bytes}, ScalarType::Byte, MemoryFormat::Contiguous);
}

}  // namespace mafnet
