// What crosses the line between torch and the kernels of channel attention.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mafnet {

// On the CPU images without gaps: (batch, pixels, channels) where channels_last, else (batch,
// channels, pixels). On CUDA, where channels_last only says which way is fast, of any strides: in
// elements, N C H W. Values per channel are (batch, channels), without gaps. All in one dtype.
struct ChannelImages {
  Dtype dtype;
  bool channels_last;
  int64_t batch, pixels;  // pixels is at least 1
  int channels;
  int64_t height, width;
};

// Row n of statistics (batch, 2, channels) holds the means of image n, then its maxima.
struct ChannelStatisticsParams {
  ChannelImages images;
  const void* input;
  void* statistics;  // backward: what forward gave, which is only read

  const void* grad_statistics;  // backward only, as below
  void* grad_input;

  int64_t input_stride[4], grad_input_stride[4];  // CUDA only, as below
  void* workspace;                                // channel_statistics_workspace bytes
};

// Of output = input * gate: grad_input = grad_output * gate, grad_gate = the sums of grad_output *
// input over the pixels.
struct ChannelScaleParams {
  ChannelImages images;
  const void *grad_output, *input, *gate;
  void *grad_input, *grad_gate;  // null where not wanted
  void* output;                  // forward

  // CUDA only, as below
  int64_t input_stride[4], grad_output_stride[4], grad_input_stride[4], output_stride[4];
  void* workspace;  // channel_scale_workspace bytes
};

// The bytes that a call on CUDA needs.
int64_t channel_statistics_workspace(const ChannelStatisticsParams& params, bool backward);
int64_t channel_scale_workspace(const ChannelScaleParams& params);

// Each returns 0 or a CUDA error; stream is a cudaStream_t, unused on the CPU.
int launch_channel_statistics_forward(const ChannelStatisticsParams& params, void* stream);
int launch_channel_statistics_backward(const ChannelStatisticsParams& params, void* stream);
int launch_channel_scale_forward(const ChannelScaleParams& params, void* stream);
int launch_channel_scale_backward(const ChannelScaleParams& params, void* stream);

}  // namespace mafnet
