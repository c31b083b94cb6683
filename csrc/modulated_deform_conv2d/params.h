// What crosses the line between binding.cpp and the kernels of modulated_deform_conv2d.
#pragma once

#include <cstdint>

namespace mafnet {

// All tensors are float. Images are dense channels_last; offset, mask and their gradients are dense
// planar (N, channels, out_height, out_width); weight is (out_channels, channels / groups,
// kernel_h, kernel_w), dense.
struct ModulatedDeformConv2dParams {
  int64_t batch;
  int channels, height, width;              // of input
  int out_channels, out_height, out_width;  // of output
  int kernel_h, kernel_w;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int groups, offset_groups;

  const float* input;
  const float* offset;  // (dy, dx) pairs
  const float* mask;    // null: all ones
  const float* weight;
  const float* bias;  // null: none

  float* output;

  // Backward. All of it is written; grad_mask is null where mask is.
  const float* grad_output;
  float* grad_input;
  float* grad_offset;
  float* grad_mask;
  float* grad_weight;

  int taps() const { return kernel_h * kernel_w; }
  int64_t pixels() const { return int64_t{out_height} * out_width; }
};

int launch_modulated_deform_conv2d_forward(const ModulatedDeformConv2dParams& params, void* stream);
int launch_modulated_deform_conv2d_backward(const ModulatedDeformConv2dParams& params,
                                            void* stream);

}  // namespace mafnet
