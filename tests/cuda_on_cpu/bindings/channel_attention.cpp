// Binds the CUDA launchers of channel attention. Images are in the order N C H W.
#include "binding.h"
#include "channel_attention/params.h"
#include "dtypes.h"

namespace {

using cuemu::Arguments;
using cuemu::Array;
using mafnet::ChannelImages;
using mafnet::ChannelScaleParams;
using mafnet::ChannelStatisticsParams;

ChannelImages images_of(const Array& input) {
  const int64_t height = input.shape[2], width = input.shape[3];
  const int channels = static_cast<int>(input.shape[1]);
  const bool channels_last = channels > 1 && input.stride[1] == 1;
  return {cuemu::dtype_of(input),
          channels_last,
          input.shape[0],
          height * width,
          channels,
          height,
          width};
}

// Of just the bytes that the op asks for, if they are not too many.
bool take_workspace(Arguments& arguments, int64_t bytes, void*& workspace) {
  if (bytes > arguments.integer("most_workspace")) return false;
  workspace = arguments.scratch("workspace", bytes);
  return true;
}

// Null where it is not given.
void* image_out(Arguments& arguments, const char* name, int64_t (&stride)[4]) {
  if (!arguments.has(name)) return nullptr;
  const Array array = arguments.out(name);
  array.copy_strides(stride);
  return array.data;
}

// With images and input.
template <typename Params>
Params params_of(Arguments& arguments) {
  const Array input = arguments.in("input");
  Params p{};
  p.images = images_of(input);
  p.input = input.data;
  input.copy_strides(p.input_stride);
  return p;
}

}  // namespace

CUEMU_ENTRY(channel_statistics_forward) {
  auto p = params_of<ChannelStatisticsParams>(arguments);
  p.statistics = arguments.out("statistics").data;
  const int64_t bytes = mafnet::channel_statistics_workspace(p, false);
  if (!take_workspace(arguments, bytes, p.workspace)) return -1;
  return mafnet::launch_channel_statistics_forward(p, nullptr);
}

CUEMU_ENTRY(channel_statistics_backward) {
  auto p = params_of<ChannelStatisticsParams>(arguments);
  p.statistics = const_cast<void*>(arguments.in("statistics").data);
  p.grad_statistics = arguments.in("grad_statistics").data;
  p.grad_input = image_out(arguments, "grad_input", p.grad_input_stride);
  const int64_t bytes = mafnet::channel_statistics_workspace(p, true);
  if (!take_workspace(arguments, bytes, p.workspace)) return -1;
  return mafnet::launch_channel_statistics_backward(p, nullptr);
}

CUEMU_ENTRY(channel_scale_forward) {
  auto p = params_of<ChannelScaleParams>(arguments);
  p.gate = arguments.in("gate").data;
  p.output = image_out(arguments, "output", p.output_stride);
  return mafnet::launch_channel_scale_forward(p, nullptr);
}

CUEMU_ENTRY(channel_scale_backward) {
  auto p = params_of<ChannelScaleParams>(arguments);
  p.gate = arguments.in("gate").data;
  const Array grad_output = arguments.in("grad_output");
  p.grad_output = grad_output.data;
  grad_output.copy_strides(p.grad_output_stride);
  p.grad_input = image_out(arguments, "grad_input", p.grad_input_stride);
  p.grad_gate = arguments.has("grad_gate") ? arguments.out("grad_gate").data : nullptr;
  const int64_t bytes = p.grad_gate == nullptr ? 0 : mafnet::channel_scale_workspace(p);
  if (!take_workspace(arguments, bytes, p.workspace)) return -1;
  return mafnet::launch_channel_scale_backward(p, nullptr);
}
