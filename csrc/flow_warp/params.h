// What crosses the line between binding.cpp and the kernels of flow_warp.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/sampler.h"

namespace mafnet {

// Strides are in elements, in the order N C H W; those of flow and grad_flow in the order N H W 2.
struct FlowWarpParams {
  Dtype dtype;       // of input, output, mask, grad_output
  Dtype flow_dtype;  // of flow and grad_flow: dtype, or float32
  Interpolation interpolation;
  Padding padding;
  bool channels_last;  // channel strides of input, output and the gradients are 1

  int64_t batch, channels;
  int height, width;          // of input
  int out_height, out_width;  // of flow and output

  const void* input;
  const void* flow;
  int64_t input_stride[4], flow_stride[4];

  // Forward. output is dense, channels_last where that is set and else planar. mask (N, 1,
  // out_height, out_width) is contiguous, or null.
  void* output;
  void* mask;
  int64_t output_stride[4];

  // Backward; a gradient that is not wanted is null. grad_output is contiguous unless
  // channels_last. grad_input is dense, planar or channels_last. On CUDA it holds accumulators
  // (float; double for double) and comes zeroed; on the CPU it is in dtype and every element is
  // written. grad_flow is contiguous.
  const void* grad_output;
  void* grad_input;
  void* grad_flow;
  int64_t grad_output_stride[4], grad_input_stride[4];

  // Deterministic backward on CUDA: (N, out_height * out_width * taps), the input pixel of each tap
  // (height * width: none), the same sorted within each image, and where each came from. Here
  // grad_input is in dtype and every element is written.
  int64_t* taps;
  const int64_t* sorted_taps;
  const int64_t* tap_order;
};

// Return 0, or a CUDA error code. stream is a cudaStream_t; the CPU ignores it.
int launch_flow_warp_forward(const FlowWarpParams& params, void* stream);
int launch_flow_warp_backward(const FlowWarpParams& params, void* stream);

// grad_input in a fixed order, CUDA only: fill taps, sort them, gather.
int launch_flow_warp_backward_taps(const FlowWarpParams& params, void* stream);
int launch_flow_warp_backward_gather(const FlowWarpParams& params, void* stream);

}  // namespace mafnet
