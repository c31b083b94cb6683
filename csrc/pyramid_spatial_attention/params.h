// What crosses the line between torch and the kernels of pyramid spatial attention.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mafnet {

// A tensor (N, C, H, W) with its strides in elements, any.
template <typename Pointer>
struct ImageOf {
  Pointer data;
  Dtype dtype;
  int64_t stride[4];
};
using Source = ImageOf<const void*>;
using Target = ImageOf<void*>;

// f of the convolutions below: nothing (pointwise_conv), both poolings side by side
// (pool_concat_conv) or a bilinear resize under a 3 x 3 kernel (resize_conv). Two have a forward
// only: both poolings under a 3 x 3 kernel, and a bilinear resize plus another image
// (resize_add_conv).
enum class ConvForm { kPointwise, kPool, kResize, kPoolKernel, kResizeAdd };

// output = leaky_relu(W f(input) + bias). pool_concat is f alone.
struct PyramidConvParams {
  Dtype dtype;  // of every tensor
  int64_t batch;
  int channels, height, width;  // of input
  int out_channels, out_height, out_width;
  double negative_slope;  // at least 0; 1 for no activation
  Source input;
  Source other;        // resize_add_conv: what is added, of the size of output
  const void* weight;  // contiguous: (out_channels, channels or twice as many), 1 x 1 or 3 x 3
  const void* bias;    // may be null
  Target output;       // backward: what forward gave, which is only read

  Source grad_output;  // backward only, as all below
  Target grad_input;   // null data where not wanted, as both below
  void* grad_weight;
  void* grad_bias;
  void* workspace;  // CUDA: pyramid_conv_workspace bytes
};

// map = leaky_relu(W1 input + bias1), output = leaky_relu(W2 pool_concat(map) + bias2); forward
// only.
struct ConvPoolConvParams {
  Dtype dtype;  // of every tensor
  int64_t batch;
  int channels, height, width;  // of input
  int map_channels, out_channels, out_height, out_width;
  double negative_slope;
  Source input;
  const void *first_weight, *weight;  // contiguous, 1 x 1
  const void *first_bias, *bias;      // may be null
  Target output;
};

// output = resize(input) + other; backward: grad_input = the transpose of resize on grad_output.
struct ResizeAddParams {
  Dtype dtype;
  int64_t batch;
  int channels, height, width, out_height, out_width;
  Source input, other, grad_output;
  Target output, grad_input;
};

// feature = leaky_relu(W mask + bias), output = input * sigmoid(mask or feature) * scale + feature.
struct SpatialGateParams {
  Dtype dtype;       // of mask and of weight and bias
  Dtype wide_dtype;  // of input and output: dtype, or float32 beside a half-precision mask
  int64_t batch;
  int channels, height, width;
  double scale, negative_slope;
  bool from_feature;
  Source input, mask;
  const void* weight;  // contiguous (channels, channels)
  const void* bias;    // may be null
  Target output;

  Source grad_output;  // backward only, as all below
  Target grad_input, grad_mask;
  void* grad_weight;
  void* grad_bias;
  void* workspace;  // CUDA: spatial_gate_workspace bytes
};

// The bytes that a backward on CUDA needs, with the gradients that params ask for.
int64_t pyramid_conv_workspace(const PyramidConvParams& params, ConvForm form);
int64_t spatial_gate_workspace(const SpatialGateParams& params);

// Each returns 0 or a CUDA error; stream is a cudaStream_t, unused on the CPU.
int launch_pointwise_conv_forward(const PyramidConvParams& params, void* stream);
int launch_pointwise_conv_backward(const PyramidConvParams& params, void* stream);
int launch_pool_concat_forward(const PyramidConvParams& params, void* stream);
int launch_pool_concat_backward(const PyramidConvParams& params, void* stream);
int launch_pool_concat_conv_forward(const PyramidConvParams& params, void* stream);
int launch_pool_concat_conv_backward(const PyramidConvParams& params, void* stream);
int launch_resize_conv_forward(const PyramidConvParams& params, void* stream);
int launch_resize_conv_backward(const PyramidConvParams& params, void* stream);
// On CUDA only; the CPU takes the two steps.
int launch_pool_concat_conv_3x3_forward(const PyramidConvParams& params, void* stream);
int launch_resize_add_conv_forward(const PyramidConvParams& params, void* stream);
// Half precision, of few channels and in layouts that tensor cores take.
bool has_conv_pool_conv(const ConvPoolConvParams& params);
int launch_conv_pool_conv_forward(const ConvPoolConvParams& params, void* stream);
// On the CPU only: what resize_conv is at the size of its input.
int launch_conv_3x3_forward(const PyramidConvParams& params);
int launch_conv_3x3_backward(const PyramidConvParams& params);
int launch_resize_add_forward(const ResizeAddParams& params, void* stream);
int launch_resize_add_backward(const ResizeAddParams& params, void* stream);
int launch_spatial_gate_forward(const SpatialGateParams& params, void* stream);
int launch_spatial_gate_backward(const SpatialGateParams& params, void* stream);

}  // namespace mafnet
