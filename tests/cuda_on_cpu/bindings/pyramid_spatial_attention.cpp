// Binds the CUDA launchers of pyramid spatial attention. Images are in the order N C H W. What a
// backward is given besides its forward's arrays: grad_output, output, and any of the gradients.
#include <algorithm>

#include "binding.h"
#include "dtypes.h"
#include "pyramid_spatial_attention/params.h"

namespace {

using cuemu::Arguments;
using cuemu::Array;
using mafnet::ConvForm;
using mafnet::PyramidConvParams;
using mafnet::ResizeAddParams;
using mafnet::SpatialGateParams;

template <typename Image>
Image image_of(const Array& array) {
  Image image{array.data, cuemu::dtype_of(array), {}};
  array.copy_strides(image.stride);
  return image;
}

mafnet::Source source(Arguments& arguments, const char* name) {
  return image_of<mafnet::Source>(arguments.in(name));
}

mafnet::Target target(Arguments& arguments, const char* name) {
  return image_of<mafnet::Target>(arguments.out(name));
}

mafnet::Target optional_target(Arguments& arguments, const char* name) {
  return arguments.has(name) ? target(arguments, name) : mafnet::Target{};
}

void* optional_out(Arguments& arguments, const char* name) {
  return arguments.has(name) ? arguments.out(name).data : nullptr;
}

const void* optional_in(Arguments& arguments, const char* name) {
  return arguments.has(name) ? arguments.in(name).data : nullptr;
}

// Of pool_concat too, which has no weight.
PyramidConvParams conv_params(Arguments& arguments) {
  const Array input = arguments.in("input");
  PyramidConvParams p{};
  p.input = image_of<mafnet::Source>(input);
  p.dtype = p.input.dtype;
  p.batch = input.shape[0];
  p.channels = static_cast<int>(input.shape[1]);
  p.height = static_cast<int>(input.shape[2]);
  p.width = static_cast<int>(input.shape[3]);
  p.out_channels = static_cast<int>(arguments.integer("out_channels"));
  p.out_height = static_cast<int>(arguments.integer("out_height"));
  p.out_width = static_cast<int>(arguments.integer("out_width"));
  p.negative_slope = arguments.number("negative_slope");
  p.weight = optional_in(arguments, "weight");
  return p;
}

PyramidConvParams conv_forward_params(Arguments& arguments) {
  PyramidConvParams p = conv_params(arguments);
  p.bias = optional_in(arguments, "bias");
  p.output = target(arguments, "output");
  return p;
}

// Of just the bytes that the op asks for, if they are not too many.
bool take_workspace(Arguments& arguments, int64_t bytes, void*& workspace) {
  if (bytes > arguments.integer("most_workspace")) return false;
  workspace = arguments.scratch("workspace", bytes);
  return true;
}

template <typename Launch>
int conv_backward(Arguments& arguments, ConvForm form, Launch launch) {
  PyramidConvParams p = conv_params(arguments);
  const mafnet::Source output = source(arguments, "output");
  p.output.data = const_cast<void*>(output.data);
  std::copy(output.stride, output.stride + 4, p.output.stride);
  p.grad_output = source(arguments, "grad_output");
  p.grad_input = optional_target(arguments, "grad_input");
  p.grad_weight = optional_out(arguments, "grad_weight");
  p.grad_bias = optional_out(arguments, "grad_bias");
  if (!take_workspace(arguments, mafnet::pyramid_conv_workspace(p, form), p.workspace)) return -1;
  return launch(p, nullptr);
}

SpatialGateParams gate_params(Arguments& arguments) {
  const Array input = arguments.in("input");
  SpatialGateParams p{};
  p.input = image_of<mafnet::Source>(input);
  p.mask = source(arguments, "mask");
  p.dtype = p.mask.dtype;
  p.wide_dtype = p.input.dtype;
  p.batch = input.shape[0];
  p.channels = static_cast<int>(input.shape[1]);
  p.height = static_cast<int>(input.shape[2]);
  p.width = static_cast<int>(input.shape[3]);
  p.scale = arguments.number("scale");
  p.negative_slope = arguments.number("negative_slope");
  p.from_feature = arguments.integer("from_feature") != 0;
  p.weight = arguments.in("weight").data;
  p.bias = optional_in(arguments, "bias");
  return p;
}

}  // namespace

CUEMU_ENTRY(pointwise_conv_forward) {
  return mafnet::launch_pointwise_conv_forward(conv_forward_params(arguments), nullptr);
}

CUEMU_ENTRY(pool_concat_forward) {
  return mafnet::launch_pool_concat_forward(conv_forward_params(arguments), nullptr);
}

CUEMU_ENTRY(pool_concat_conv_forward) {
  return mafnet::launch_pool_concat_conv_forward(conv_forward_params(arguments), nullptr);
}

CUEMU_ENTRY(pool_concat_conv_3x3_forward) {
  return mafnet::launch_pool_concat_conv_3x3_forward(conv_forward_params(arguments), nullptr);
}

CUEMU_ENTRY(resize_conv_forward) {
  return mafnet::launch_resize_conv_forward(conv_forward_params(arguments), nullptr);
}

CUEMU_ENTRY(resize_add_conv_forward) {
  PyramidConvParams p = conv_forward_params(arguments);
  p.other = source(arguments, "other");
  return mafnet::launch_resize_add_conv_forward(p, nullptr);
}

CUEMU_ENTRY(conv_pool_conv_forward) {
  const Array input = arguments.in("input"), output = arguments.out("output");
  mafnet::ConvPoolConvParams p{};
  p.input = image_of<mafnet::Source>(input);
  p.output = image_of<mafnet::Target>(output);
  p.dtype = p.input.dtype;
  p.batch = input.shape[0];
  p.channels = static_cast<int>(input.shape[1]);
  p.height = static_cast<int>(input.shape[2]);
  p.width = static_cast<int>(input.shape[3]);
  p.out_channels = static_cast<int>(output.shape[1]);
  p.out_height = static_cast<int>(output.shape[2]);
  p.out_width = static_cast<int>(output.shape[3]);
  const Array first_weight = arguments.in("first_weight");
  p.map_channels = static_cast<int>(first_weight.shape[0]);
  p.first_weight = first_weight.data;
  p.first_bias = optional_in(arguments, "first_bias");
  p.weight = arguments.in("weight").data;
  p.bias = optional_in(arguments, "bias");
  p.negative_slope = arguments.number("negative_slope");
  // The binding of torch takes two steps then.
  return mafnet::has_conv_pool_conv(p) ? mafnet::launch_conv_pool_conv_forward(p, nullptr) : -1;
}

CUEMU_ENTRY(pool_concat_backward) {
  PyramidConvParams p = conv_params(arguments);
  p.grad_output = source(arguments, "grad_output");
  p.grad_input = target(arguments, "grad_input");
  return mafnet::launch_pool_concat_backward(p, nullptr);
}

CUEMU_ENTRY(pointwise_conv_backward) {
  return conv_backward(arguments, ConvForm::kPointwise, &mafnet::launch_pointwise_conv_backward);
}

CUEMU_ENTRY(pool_concat_conv_backward) {
  return conv_backward(arguments, ConvForm::kPool, &mafnet::launch_pool_concat_conv_backward);
}

CUEMU_ENTRY(resize_conv_backward) {
  return conv_backward(arguments, ConvForm::kResize, &mafnet::launch_resize_conv_backward);
}

CUEMU_ENTRY(resize_add_forward) {
  const Array input = arguments.in("input"), other = arguments.in("other");
  ResizeAddParams p{};
  p.input = image_of<mafnet::Source>(input);
  p.other = image_of<mafnet::Source>(other);
  p.output = target(arguments, "output");
  p.dtype = p.input.dtype;
  p.batch = input.shape[0];
  p.channels = static_cast<int>(input.shape[1]);
  p.height = static_cast<int>(input.shape[2]);
  p.width = static_cast<int>(input.shape[3]);
  p.out_height = static_cast<int>(other.shape[2]);
  p.out_width = static_cast<int>(other.shape[3]);
  return mafnet::launch_resize_add_forward(p, nullptr);
}

CUEMU_ENTRY(resize_add_backward) {
  const Array grad_output = arguments.in("grad_output"), grad_input = arguments.out("grad_input");
  ResizeAddParams p{};
  p.grad_output = image_of<mafnet::Source>(grad_output);
  p.grad_input = image_of<mafnet::Target>(grad_input);
  p.dtype = p.grad_output.dtype;
  p.batch = grad_input.shape[0];
  p.channels = static_cast<int>(grad_input.shape[1]);
  p.height = static_cast<int>(grad_input.shape[2]);
  p.width = static_cast<int>(grad_input.shape[3]);
  p.out_height = static_cast<int>(grad_output.shape[2]);
  p.out_width = static_cast<int>(grad_output.shape[3]);
  return mafnet::launch_resize_add_backward(p, nullptr);
}

CUEMU_ENTRY(spatial_gate_forward) {
  SpatialGateParams p = gate_params(arguments);
  p.output = target(arguments, "output");
  return mafnet::launch_spatial_gate_forward(p, nullptr);
}

CUEMU_ENTRY(spatial_gate_backward) {
  SpatialGateParams p = gate_params(arguments);
  p.grad_output = source(arguments, "grad_output");
  p.grad_input = optional_target(arguments, "grad_input");
  p.grad_mask = optional_target(arguments, "grad_mask");
  p.grad_weight = optional_out(arguments, "grad_weight");
  p.grad_bias = optional_out(arguments, "grad_bias");
  if (!take_workspace(arguments, mafnet::spatial_gate_workspace(p), p.workspace)) return -1;
  return mafnet::launch_spatial_gate_backward(p, nullptr);
}
