// Binds the CUDA launchers of modulated_deform_conv2d and deform_align. Images, offset and mask are
// in the order N C H W, flows N H W 2. A max_residue makes offset and mask raw.
#include "binding.h"
#include "dtypes.h"
#include "modulated_deform_conv2d/params.h"

namespace {

using cuemu::Array;

// Strides of N, C and pixels; rows follow each other.
void copy_pixel_strides(const Array& array, int64_t (&target)[3]) {
  array.require_axes(4);
  target[0] = array.stride[0];
  target[1] = array.stride[1];
  target[2] = array.shape[3] == 1 ? array.stride[2] : array.stride[3];
}

void set_raw(cuemu::Arguments& arguments, mafnet::ModulatedDeformConv2dParams& p) {
  p.raw.used = true;
  p.raw.max_residue = arguments.number("max_residue");
  const char* const names[2] = {"flow_1", "flow_2"};
  for (int i = 0; i < 2; ++i) {
    if (!arguments.has(names[i])) continue;
    const Array flow = arguments.in(names[i]);
    flow.require_axes(4);
    p.raw.flow[i] = flow.data;
    p.raw.flow_dtype = cuemu::dtype_of(flow);
    p.raw.flow_stride[i][0] = flow.stride[0];
    p.raw.flow_stride[i][1] = flow.shape[2] == 1 ? flow.stride[1] : flow.stride[2];
    p.raw.flow_stride[i][2] = flow.stride[3];
  }
}

mafnet::ModulatedDeformConv2dParams make_params(cuemu::Arguments& arguments) {
  const Array input = arguments.in("input"), offset = arguments.in("offset");
  const Array weight = arguments.in("weight");
  mafnet::ModulatedDeformConv2dParams p{};
  p.dtype = cuemu::dtype_of(input);
  p.offset_dtype = cuemu::dtype_of(offset);
  p.batch = input.shape[0];
  p.channels = static_cast<int>(input.shape[1]);
  p.height = static_cast<int>(input.shape[2]);
  p.width = static_cast<int>(input.shape[3]);
  p.out_channels = static_cast<int>(weight.shape[0]);
  p.kernel_h = static_cast<int>(weight.shape[2]);
  p.kernel_w = static_cast<int>(weight.shape[3]);
  p.out_height = static_cast<int>(offset.shape[2]);
  p.out_width = static_cast<int>(offset.shape[3]);
  p.stride_h = static_cast<int>(arguments.integer("stride_h"));
  p.stride_w = static_cast<int>(arguments.integer("stride_w"));
  p.padding_h = static_cast<int>(arguments.integer("padding_h"));
  p.padding_w = static_cast<int>(arguments.integer("padding_w"));
  p.dilation_h = static_cast<int>(arguments.integer("dilation_h"));
  p.dilation_w = static_cast<int>(arguments.integer("dilation_w"));
  p.groups = static_cast<int>(input.shape[1] / weight.shape[1]);
  p.offset_groups = static_cast<int>(offset.shape[1] / (2 * p.taps()));
  p.allow_tf32 = arguments.has("allow_tf32") && arguments.integer("allow_tf32") != 0;
  if (arguments.has("parts")) p.parts = static_cast<int>(arguments.integer("parts"));
  p.input = input.data;
  input.copy_strides(p.input_stride);
  p.offset = offset.data;
  copy_pixel_strides(offset, p.offset_stride);
  if (arguments.has("mask")) {
    const Array mask = arguments.in("mask");
    p.mask = mask.data;
    p.mask_dtype = cuemu::dtype_of(mask);
    copy_pixel_strides(mask, p.mask_stride);
  }
  if (arguments.has("max_residue")) set_raw(arguments, p);
  p.weight = weight.data;
  return p;
}

mafnet::ModulatedDeformConv2dParams make_backward_params(cuemu::Arguments& arguments) {
  mafnet::ModulatedDeformConv2dParams p = make_params(arguments);
  const Array grad_output = arguments.in("grad_output");
  p.grad_output = grad_output.data;
  copy_pixel_strides(grad_output, p.grad_output_stride);
  return p;
}

}  // namespace

// mask and bias are optional; packed_weight, of as many bytes as packed_weight_bytes says, sends it
// to the tensor cores.
CUEMU_ENTRY(forward) {
  mafnet::ModulatedDeformConv2dParams p = make_params(arguments);
  if (arguments.has("bias")) p.bias = arguments.in("bias").data;
  const Array output = arguments.out("output");
  p.output = output.data;
  copy_pixel_strides(output, p.output_stride);
  if (arguments.has("packed_weight")) p.packed_weight = arguments.out("packed_weight").data;
  return mafnet::launch_modulated_deform_conv2d_forward(p, nullptr);
}

// sizes: bytes of packed_weight for these tensors.
CUEMU_ENTRY(packed_weight_bytes) {
  mafnet::ModulatedDeformConv2dParams p = make_params(arguments);
  const Array output = arguments.in("output");
  p.output = output.data;
  copy_pixel_strides(output, p.output_stride);
  *static_cast<int64_t*>(arguments.in_out("sizes").data) =
      mafnet::modulated_deform_conv2d_packed_weight_bytes(p);
  return 0;
}

// Every gradient is optional; that of raw offsets and masks is one. grad_input are accumulators,
// zeroed; fixed_sums and exponents, zeroed, make it deterministic; packed_weight, of as many bytes
// as workspace says, sends it to the tensor cores.
CUEMU_ENTRY(backward) {
  mafnet::ModulatedDeformConv2dParams p = make_backward_params(arguments);
  if (arguments.has("grad_input")) {
    const Array grad_input = arguments.in_out("grad_input");
    p.grad_input = grad_input.data;
    copy_pixel_strides(grad_input, p.grad_input_stride);
  }
  if (arguments.has("fixed_sums")) {
    p.fixed_sums = static_cast<int64_t*>(arguments.in_out("fixed_sums").data);
    p.exponents = static_cast<int*>(arguments.in_out("exponents").data);
  }
  if (arguments.has("packed_weight")) p.packed_weight = arguments.out("packed_weight").data;
  if (arguments.has("grad_offset")) p.grad_offset = arguments.out("grad_offset").data;
  if (arguments.has("grad_mask")) p.grad_mask = arguments.out("grad_mask").data;
  if (arguments.has("grad_raw")) {
    const Array grad_raw = arguments.out("grad_raw");
    const int element_size = grad_raw.type.back() - '0';
    const int64_t planes = int64_t{2} * p.offset_groups * p.taps();
    p.grad_offset = grad_raw.data;
    p.grad_mask = static_cast<char*>(grad_raw.data) + planes * p.pixels() * element_size;
  }
  if (arguments.has("grad_flow_1")) p.raw.grad_flow[0] = arguments.out("grad_flow_1").data;
  if (arguments.has("grad_flow_2")) p.raw.grad_flow[1] = arguments.out("grad_flow_2").data;
  if (arguments.has("flow_partials")) p.flow_partials = arguments.out("flow_partials").data;
  if (arguments.has("grad_weight")) {
    p.grad_weight = arguments.out("grad_weight").data;
    p.weight_partials = arguments.out("weight_partials").data;
  }
  if (arguments.has("grad_bias")) p.grad_bias = arguments.out("grad_bias").data;
  return mafnet::launch_modulated_deform_conv2d_backward(p, nullptr);
}

// sizes: elements of weight_partials, limbs of fixed_sums, elements of flow_partials, bytes of
// packed_weight. pixel_stride: that of grad_output, were it larger than memory.
CUEMU_ENTRY(workspace) {
  mafnet::ModulatedDeformConv2dParams p = make_backward_params(arguments);
  if (arguments.has("pixel_stride")) p.grad_output_stride[2] = arguments.integer("pixel_stride");
  auto* sizes = static_cast<int64_t*>(arguments.in_out("sizes").data);
  sizes[0] = mafnet::modulated_deform_conv2d_weight_partials(p);
  sizes[1] = mafnet::modulated_deform_conv2d_fixed_limbs(p.dtype);
  sizes[2] = mafnet::modulated_deform_conv2d_flow_partials(p);
  sizes[3] = mafnet::modulated_deform_conv2d_backward_packed_weight_bytes(p);
  return 0;
}
