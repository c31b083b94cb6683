// What crosses the line between torch and the kernels of channel attention.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mafnet {

// Images without gaps: (batch, pixels, channels) where channels_last, else (batch, channels,
// pixels). Values per channel are (batch, channels), without gaps, too. All in one dtype.
struct ChannelImages {
  Dtype dtype;
  bool channels_last;
  int64_t batch, pixels;  // pixels is at least 1
  int channels;
};

// Row n of statistics (batch, 2, channels) holds the means of image n, then its maxima.
struct ChannelStatisticsParams {
  ChannelImages images;
  const void* input;
  void* statistics;  // backward: what forward gave, which is only read

  const void* grad_statistics;  // backward only, as below
  void* grad_input;
};

// Of output = input * gate: grad_input = grad_output * gate, grad_gate = the sums of grad_output *
// input over the pixels.
struct ChannelScaleParams {
  ChannelImages images;
  const void *grad_output, *input, *gate;
  void *grad_input, *grad_gate;  // null where not wanted
};

// Each returns 0 or a CUDA error; stream is a cudaStream_t, unused on the CPU.
int launch_channel_statistics_forward(const ChannelStatisticsParams& params, void* stream);
int launch_channel_statistics_backward(const ChannelStatisticsParams& params, void* stream);
int launch_channel_scale_backward(const ChannelScaleParams& params, void* stream);

}  // namespace mafnet
