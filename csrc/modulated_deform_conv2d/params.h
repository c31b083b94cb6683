// What crosses the line between binding.cpp and the kernels of modulated_deform_conv2d.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mafnet {

// Strides are in elements. The pixels of offset, mask, output and their gradients follow each other
// at one stride, row after row; input may have any strides. Weight and bias are dense.
struct ModulatedDeformConv2dParams {
  Dtype dtype;  // of input, weight, bias, output and their gradients
  Dtype offset_dtype, mask_dtype;

  int64_t batch;
  int channels, height, width;              // of input
  int out_channels, out_height, out_width;  // of output
  int kernel_h, kernel_w;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int groups, offset_groups;

  const void* input;
  int64_t input_stride[4];   // N, C, H, W
  const void* offset;        // (dy, dx) pairs, (offset group, tap)
  int64_t offset_stride[3];  // N, C, pixel
  const void* mask;          // (offset group, tap); null: all ones
  int64_t mask_stride[3];
  const void* weight;  // (out_channels, channels / groups, kernel_h, kernel_w)
  const void* bias;    // null: none

  void* output;
  int64_t output_stride[3];

  // Backward. A gradient that is not wanted is null; the others are written, not added to.
  // grad_offset and grad_mask are dense (N, C, pixel).
  const void* grad_output;
  int64_t grad_output_stride[3];
  void* grad_input;
  int64_t grad_input_stride[3];
  void* grad_offset;
  void* grad_mask;
  void* grad_weight;
  void* grad_bias;

  int taps() const { return kernel_h * kernel_w; }
  int group_channels() const { return channels / groups; }
  int group_outputs() const { return out_channels / groups; }
  int offset_group_channels() const { return channels / offset_groups; }
  int64_t pixels() const { return int64_t{out_height} * out_width; }
};

int launch_modulated_deform_conv2d_forward(const ModulatedDeformConv2dParams& params, void* stream);
int launch_modulated_deform_conv2d_backward(const ModulatedDeformConv2dParams& params,
                                            void* stream);

}  // namespace mafnet
