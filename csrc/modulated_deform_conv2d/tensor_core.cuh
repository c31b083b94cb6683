// What the tensor-core kernels of modulated_deform_conv2d, forward and backward, share: tiles, and
// for which calls they are.
#pragma once

#include "modulated_deform_conv2d/sample.cuh"
#include "modulated_deform_conv2d/tensor_core_products.cuh"
#include "modulated_deform_conv2d/tensor_core_samples.cuh"

namespace mafnet {

constexpr int kStepChannels = 32;  // four lanes share a pixel, with kLaneChannels each
constexpr int kOutputs = 64;       // output channels of a tile

// A lane's channels, from `channel` on, of the image that begins at input.
template <typename T>
DEVICE Image image_of(const ModulatedDeformConv2dParams& p, const T* input, int channel) {
  return {reinterpret_cast<const unsigned char*>(input + channel),
          static_cast<uint32_t>(p.input_stride[2] * sizeof(T)),
          static_cast<uint32_t>(p.input_stride[3] * sizeof(T))};
}

DEVICE void move(float (&positions)[2], float by) {
  positions[0] += by;
  positions[1] += by;
}

// Without a mask, every sample reads the 1 that lies behind the packed weights.
inline ModulatedDeformConv2dParams with_mask(const ModulatedDeformConv2dParams& params,
                                             int64_t vectors_of_weights) {
  ModulatedDeformConv2dParams p = params;
  if (p.mask != nullptr) return p;
  p.mask = static_cast<const uint4*>(p.packed_weight) + vectors_of_weights;
  p.mask_dtype = Dtype::kFloat32;
  for (int64_t& stride : p.mask_stride) stride = 0;
  return p;
}

// By one thread of the kernel that packs them, to their end.
DEVICE void store_mask_of_ones(uint4* end) { *end = make_uint4(__float_as_uint(1.0f), 0, 0, 0); }

// Bounds under which coordinates are exact in float and in split_floor, pixels fit into int and
// byte offsets from where an image begins into 32 bits, and products with reciprocals find the
// offset group.
constexpr int64_t kMostPositions = int64_t{1} << 22;
constexpr int64_t kMostPixels = int64_t{1} << 30;
constexpr int64_t kMostBytes = (int64_t{1} << 32) - 1;
constexpr int kMostChannels = 2048;
constexpr int64_t kMostImages = 65535;  // of the grid's second dimension

inline bool is_aligned(const void* pointer, int64_t first_stride, int64_t second_stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && first_stride % kLaneChannels == 0 &&
         second_stride % kLaneChannels == 0;
}

// Whether an image of `planes` planes, at these strides of planes and pixels, is within kMostBytes.
inline bool fits(int64_t planes, int64_t pixels, int64_t plane_stride, int64_t pixel_stride,
                 Dtype dtype) {
  const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
  return ((planes - 1) * plane_stride + (pixels - 1) * pixel_stride + 1) * size <= kMostBytes;
}

inline bool is_small(const ModulatedDeformConv2dParams& p) {
  const auto reach = [](int64_t out, int64_t stride, int64_t padding, int64_t kernel,
                        int64_t dilation) { return out * stride + padding + kernel * dilation; };
  const int64_t planes = int64_t{p.offset_groups} * p.taps(), pixels = p.pixels();
  const int64_t (&offset)[3] = p.offset_stride, (&mask)[3] = p.mask_stride;
  // Strides of what is not there are 0.
  const bool coordinates_fit =
      fits(2 * planes, pixels, offset[1], offset[2], p.offset_dtype) &&
      fits(planes, pixels, mask[1], mask[2], p.mask_dtype) &&
      fits(2, pixels, p.raw.flow_stride[0][2], p.raw.flow_stride[0][1], p.raw.flow_dtype) &&
      fits(2, pixels, p.raw.flow_stride[1][2], p.raw.flow_stride[1][1], p.raw.flow_dtype);
  const int64_t columns = (p.width - 1) * p.input_stride[3] + p.channels;
  return coordinates_fit && fits(p.height, columns, p.input_stride[2], 1, p.dtype) &&
         p.batch <= kMostImages && pixels <= kMostPixels && p.height <= kMostPositions &&
         p.width <= kMostPositions &&
         reach(p.out_height, p.stride_h, p.padding_h, p.kernel_h, p.dilation_h) <= kMostPositions &&
         reach(p.out_width, p.stride_w, p.padding_w, p.kernel_w, p.dilation_w) <= kMostPositions;
}

// What they all ask for, beside a type and the layout of output or grad_output: offset groups of
// whole runs of channels, and an image with pixels, which they may read.
inline bool suits_tensor_cores(const ModulatedDeformConv2dParams& p, int run) {
  const bool has_channels = p.groups == 1 && p.channels % kStepChannels == 0 &&
                            p.channels <= kMostChannels && p.offset_group_channels() % run == 0 &&
                            p.out_channels % kLaneChannels == 0;
  const bool has_layout = p.input_stride[1] == 1 && p.input_stride[0] % kLaneChannels == 0 &&
                          is_aligned(p.input, p.input_stride[2], p.input_stride[3]);
  return has_channels && has_layout && p.height > 0 && p.width > 0 && is_small(p);
}

// Those of the backward, which has none for a batch without pixels.
inline bool backward_suits_tensor_cores(const ModulatedDeformConv2dParams& p) {
  const bool has_type =
      p.dtype == Dtype::kFloat16 || (p.dtype == Dtype::kBFloat16 && has_bfloat16_tensor_cores());
  return has_type && suits_tensor_cores(p, kLaneChannels) && p.batch * p.pixels() > 0 &&
         p.grad_output_stride[1] == 1 &&
         is_aligned(p.grad_output, p.grad_output_stride[0], p.grad_output_stride[2]);
}

}  // namespace mafnet
