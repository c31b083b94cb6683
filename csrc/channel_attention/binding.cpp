// Torch side of channel attention: check, allocate, fill params, launch. The CPU kernels read
// images without gaps, contiguous or channels_last; others are copied. Those of CUDA read any.
#include <tuple>

#include "channel_attention/params.h"
#include "common/backend.h"

namespace mafnet::channel_attention_binding {
namespace {

ChannelImages images_of(const char* op, const Tensor& input) {
  check_dims(op, "input", input, 4);
  ChannelImages images{};
  images.dtype = dtype_of(op, "input", input);
  images.channels_last = has_channels_last(input);
  images.batch = input.size(0);
  images.channels = extent_of(op, "input", input, 1);
  images.height = input.size(2);
  images.width = input.size(3);
  images.pixels = images.height * images.width;
  MAFNET_CHECK(images.pixels > 0, op, "input", "H and W of at least 1", "shape " + shape_of(input));
  return images;
}

Tensor map_like(const Tensor& input, bool wanted = true) {
  return empty_on(input, {wanted ? input.size(0) : 0, input.size(1), input.size(2), input.size(3)},
                  input.scalar_type(), memory_format_of(input));
}

// An image as kernels read it, in the layout of input where that matters.
Tensor as_read(const Tensor& image, const Tensor& input) {
  return kIsCuda ? image : torch::stable::contiguous(image, memory_format_of(input));
}

Tensor make_workspace(const Tensor& input, int64_t bytes) {
  return empty_on(input, {1, 1, 1, bytes}, ScalarType::Byte, MemoryFormat::Contiguous);
}

template <size_t kDims>
Tensor empty_per_channel(const Tensor& input, std::array<int64_t, kDims> shape) {
  return torch::stable::empty({shape.data(), shape.size()}, input.scalar_type(), std::nullopt,
                              input.device(), std::nullopt, std::nullopt);
}

// `tensor`, which must have the dtype and device of input and the given shape.
template <size_t kDims>
void check_like(const char* op, const char* argument, const Tensor& tensor, const Tensor& input,
                std::array<int64_t, kDims> shape) {
  check_same_device(op, argument, tensor, input);
  MAFNET_CHECK(tensor.scalar_type() == input.scalar_type(), op, argument, "the dtype of input",
               torch::headeronly::toString(tensor.scalar_type()));
  bool same = tensor.dim() == static_cast<int64_t>(kDims);
  for (size_t d = 0; same && d < kDims; ++d) same = tensor.size(d) == shape[d];
  MAFNET_CHECK(same, op, argument, "a shape that goes with input " + shape_of(input),
               "shape " + shape_of(tensor));
}

std::array<int64_t, 4> shape_like(const Tensor& input) {
  return {input.size(0), input.size(1), input.size(2), input.size(3)};
}

// ---------------------------------------------------------------------------- channel_statistics

Tensor channel_statistics_forward(const Tensor& input) {
  constexpr const char* kOp = "channel_statistics";
  ChannelStatisticsParams p{};
  p.images = images_of(kOp, input);
  DeviceScope scope(input);
  const Tensor read = as_read(input, input);
  Tensor statistics = empty_per_channel<3>(input, {input.size(0), 2, input.size(1)});
  p.input = read.const_data_ptr();
  p.statistics = statistics.mutable_data_ptr();
  copy_strides(read, p.input_stride);
  Tensor workspace;
  if constexpr (kIsCuda) {
    workspace = make_workspace(input, channel_statistics_workspace(p, false));
    p.workspace = workspace.mutable_data_ptr();
  }
  check_launch(kOp, launch_channel_statistics_forward(p, scope.stream()));
  return statistics;
}

Tensor channel_statistics_backward(const Tensor& grad_output, const Tensor& input,
                                   const Tensor& statistics) {
  constexpr const char* kOp = "channel_statistics";
  ChannelStatisticsParams p{};
  p.images = images_of(kOp, input);
  const std::array<int64_t, 3> shape{input.size(0), 2, input.size(1)};
  check_like<3>(kOp, "grad_output", grad_output, input, shape);
  check_like<3>(kOp, "statistics", statistics, input, shape);
  DeviceScope scope(input);
  const Tensor read = as_read(input, input);
  const Tensor grads = torch::stable::contiguous(grad_output);
  const Tensor values = torch::stable::contiguous(statistics);
  Tensor grad_input = map_like(input);
  p.input = read.const_data_ptr();
  p.statistics = const_cast<void*>(values.const_data_ptr());
  p.grad_statistics = grads.const_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  copy_strides(read, p.input_stride);
  copy_strides(grad_input, p.grad_input_stride);
  Tensor workspace;
  if constexpr (kIsCuda) {
    workspace = make_workspace(input, channel_statistics_workspace(p, true));
    p.workspace = workspace.mutable_data_ptr();
  }
  check_launch(kOp, launch_channel_statistics_backward(p, scope.stream()));
  return grad_input;
}

// --------------------------------------------------------------------------------- channel_scale

Tensor channel_scale_forward(const Tensor& input, const Tensor& gate) {
  constexpr const char* kOp = "channel_scale";
  ChannelScaleParams p{};
  p.images = images_of(kOp, input);
  check_like<2>(kOp, "gate", gate, input, {input.size(0), input.size(1)});
  DeviceScope scope(input);
  const Tensor read = as_read(input, input);
  const Tensor gates = torch::stable::contiguous(gate);
  Tensor output = map_like(input);
  p.input = read.const_data_ptr();
  p.gate = gates.const_data_ptr();
  p.output = output.mutable_data_ptr();
  copy_strides(read, p.input_stride);
  copy_strides(output, p.output_stride);
  check_launch(kOp, launch_channel_scale_forward(p, scope.stream()));
  return output;
}

std::tuple<Tensor, Tensor> channel_scale_backward(const Tensor& grad_output, const Tensor& input,
                                                  const Tensor& gate, bool need_input,
                                                  bool need_gate) {
  constexpr const char* kOp = "channel_scale";
  ChannelScaleParams p{};
  p.images = images_of(kOp, input);
  check_like<2>(kOp, "gate", gate, input, {input.size(0), input.size(1)});
  check_like<4>(kOp, "grad_output", grad_output, input, shape_like(input));
  DeviceScope scope(input);
  const Tensor read = as_read(input, input);
  const Tensor grads = as_read(grad_output, input);
  const Tensor gates = torch::stable::contiguous(gate);
  Tensor grad_input = map_like(input, need_input);
  Tensor grad_gate = empty_per_channel<2>(input, {need_gate ? input.size(0) : 0, input.size(1)});
  p.input = read.const_data_ptr();
  p.gate = gates.const_data_ptr();
  p.grad_output = grads.const_data_ptr();
  p.grad_input = need_input ? grad_input.mutable_data_ptr() : nullptr;
  p.grad_gate = need_gate ? grad_gate.mutable_data_ptr() : nullptr;
  copy_strides(read, p.input_stride);
  copy_strides(grads, p.grad_output_stride);
  if (need_input) copy_strides(grad_input, p.grad_input_stride);
  Tensor workspace;
  if constexpr (kIsCuda) {
    workspace = make_workspace(input, need_gate ? channel_scale_workspace(p) : 0);
    p.workspace = workspace.mutable_data_ptr();
  }
  check_launch(kOp, launch_channel_scale_backward(p, scope.stream()));
  return {grad_input, grad_gate};
}

}  // namespace

MAFNET_LIBRARY_IMPL(module) {
  module.impl("channel_statistics_forward", TORCH_BOX(&channel_statistics_forward));
  module.impl("channel_statistics_backward", TORCH_BOX(&channel_statistics_backward));
  module.impl("channel_scale_forward", TORCH_BOX(&channel_scale_forward));
  module.impl("channel_scale_backward", TORCH_BOX(&channel_scale_backward));
}

}  // namespace mafnet::channel_attention_binding
