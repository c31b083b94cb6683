// What the tensor-core kernels of modulated_deform_conv2d share: fp16 and bf16 in channels last,
// one group of the convolution, offset groups of whole vectors of 8 channels.
#pragma once

#include "modulated_deform_conv2d/sample.cuh"

namespace mafnet {

constexpr int kVectorChannels = 8;  // 16 bytes
constexpr int kStepChannels = 32;   // four lanes share a pixel, with a vector each
constexpr int kOutputs = 64;        // output channels of a tile

// Bounds under which coordinates are exact in float and in split_floor, pixels and element offsets
// of an image fit into int, and vector * reciprocal finds the offset group.
constexpr int64_t kMostPositions = int64_t{1} << 22;
constexpr int64_t kMostElements = (int64_t{1} << 31) - 1;
constexpr int kMostChannels = 2048;

inline bool is_aligned(const void* pointer, int64_t first_stride, int64_t second_stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && first_stride % kVectorChannels == 0 &&
         second_stride % kVectorChannels == 0;
}

inline bool has_exact_positions(const ModulatedDeformConv2dParams& p) {
  const auto reach = [](int64_t out, int64_t stride, int64_t padding, int64_t kernel,
                        int64_t dilation) { return out * stride + padding + kernel * dilation; };
  return p.height <= kMostPositions && p.width <= kMostPositions &&
         reach(p.out_height, p.stride_h, p.padding_h, p.kernel_h, p.dilation_h) <= kMostPositions &&
         reach(p.out_width, p.stride_w, p.padding_w, p.kernel_w, p.dilation_w) <= kMostPositions;
}

// What both tensor-core kernels of the backward ask for.
inline bool backward_suits_tensor_cores(const ModulatedDeformConv2dParams& p) {
  const bool has_type =
      p.dtype == Dtype::kFloat16 || (p.dtype == Dtype::kBFloat16 && has_bfloat16_tensor_cores());
  const bool has_channels = p.groups == 1 && p.channels % kStepChannels == 0 &&
                            p.channels <= kMostChannels &&
                            p.offset_group_channels() % kVectorChannels == 0 &&
                            p.out_channels % kVectorChannels == 0 && p.out_channels > 0;
  const bool has_pixels = p.height > 0 && p.width > 0 && p.pixels() <= kMostElements - kThreads;
  const bool has_layout =
      p.input_stride[1] == 1 && p.grad_output_stride[1] == 1 &&
      p.grad_output_stride[0] % kVectorChannels == 0 && p.input_stride[0] % kVectorChannels == 0 &&
      is_aligned(p.input, p.input_stride[2], p.input_stride[3]) &&
      is_aligned(p.grad_output, p.grad_output_stride[2], p.grad_output_stride[2]);
  const int64_t elements =
      (p.height - 1) * p.input_stride[2] + (p.width - 1) * p.input_stride[3] + p.channels;
  return has_type && has_channels && has_pixels && has_layout && elements <= kMostElements &&
         has_exact_positions(p);
}

}  // namespace mafnet
