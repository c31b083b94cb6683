// Binds the CUDA launchers of flow_warp. Arrays are in the order N C H W, flow in N H W 2.
#include "binding.h"
#include "dtypes.h"
#include "flow_warp/params.h"

namespace {

using cuemu::Array;

mafnet::FlowWarpParams make_params(cuemu::Arguments& arguments) {
  const Array input = arguments.in("input"), flow = arguments.in("flow");
  mafnet::FlowWarpParams p{};
  p.dtype = cuemu::dtype_of(input);
  p.flow_dtype = cuemu::dtype_of(flow);
  p.interpolation = static_cast<mafnet::Interpolation>(arguments.integer("interpolation"));
  p.padding = static_cast<mafnet::Padding>(arguments.integer("padding"));
  p.channels_last = arguments.integer("channels_last") != 0;
  input.copy_strides(p.input_stride);
  flow.copy_strides(p.flow_stride);
  p.batch = input.shape[0];
  p.channels = input.shape[1];
  p.height = static_cast<int>(input.shape[2]);
  p.width = static_cast<int>(input.shape[3]);
  p.out_height = static_cast<int>(flow.shape[1]);
  p.out_width = static_cast<int>(flow.shape[2]);
  p.input = input.data;
  p.flow = flow.data;
  return p;
}

}  // namespace

// mask is optional.
CUEMU_ENTRY(flow_warp_forward) {
  mafnet::FlowWarpParams p = make_params(arguments);
  const Array output = arguments.out("output");
  p.output = output.data;
  output.copy_strides(p.output_stride);
  if (arguments.has("mask")) p.mask = arguments.out("mask").data;
  return mafnet::launch_flow_warp_forward(p, nullptr);
}

// grad_input (accumulators, zeroed) and grad_flow are optional.
CUEMU_ENTRY(flow_warp_backward) {
  mafnet::FlowWarpParams p = make_params(arguments);
  const Array grad_output = arguments.in("grad_output");
  p.grad_output = grad_output.data;
  grad_output.copy_strides(p.grad_output_stride);
  if (arguments.has("grad_input")) {
    const Array grad_input = arguments.in_out("grad_input");
    p.grad_input = grad_input.data;
    grad_input.copy_strides(p.grad_input_stride);
  }
  if (arguments.has("grad_flow")) p.grad_flow = arguments.out("grad_flow").data;
  return mafnet::launch_flow_warp_backward(p, nullptr);
}

CUEMU_ENTRY(flow_warp_backward_taps) {
  mafnet::FlowWarpParams p = make_params(arguments);
  p.taps = static_cast<int64_t*>(arguments.out("taps").data);
  return mafnet::launch_flow_warp_backward_taps(p, nullptr);
}

// sorted_taps and tap_order are what torch's stable sort makes of the taps.
CUEMU_ENTRY(flow_warp_backward_gather) {
  mafnet::FlowWarpParams p = make_params(arguments);
  const Array grad_output = arguments.in("grad_output");
  p.grad_output = grad_output.data;
  grad_output.copy_strides(p.grad_output_stride);
  p.sorted_taps = static_cast<const int64_t*>(arguments.in("sorted_taps").data);
  p.tap_order = static_cast<const int64_t*>(arguments.in("tap_order").data);
  const Array grad_input = arguments.out("grad_input");
  p.grad_input = grad_input.data;
  grad_input.copy_strides(p.grad_input_stride);
  return mafnet::launch_flow_warp_backward_gather(p, nullptr);
}
