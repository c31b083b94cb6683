// Torch side of deform_align, the same kernels on raw offsets: check, allocate, fill params,
// launch.

#include "modulated_deform_conv2d/call.h"

namespace mafnet::deform_align_binding {
namespace {

constexpr const char* kFlowNames[2] = {"flow_1", "flow_2"};

void set_flow(Call& call, int index, const Tensor& flow) {
  ModulatedDeformConv2dParams& p = call.params;
  RawOffsets& raw = p.raw;
  const char* name = kFlowNames[index];
  check_shape(call.op, name, flow, {p.batch, p.out_height, p.out_width, 2});
  check_same_device(call.op, name, flow, call.input);
  const Dtype dtype = coordinate_dtype_of(call, name, flow);
  MAFNET_CHECK(index == 0 || dtype == raw.flow_dtype, call.op, name, "the dtype of flow_1",
               torch::headeronly::toString(flow.scalar_type()));
  raw.flow_dtype = dtype;
  call.flow[index] = with_flat_pixels(flow, 1);
  raw.flow[index] = call.flow[index].const_data_ptr();
  raw.flow_stride[index][0] = call.flow[index].stride(0);
  raw.flow_stride[index][1] = pixel_stride(call.flow[index], 1);
  raw.flow_stride[index][2] = call.flow[index].stride(3);
}

Call make_raw_call(const Tensor& input, const Tensor& raw, const std::optional<Tensor>& flow_1,
                   const std::optional<Tensor>& flow_2, const Tensor& weight, double max_residue,
                   const Geometry& geometry, int64_t parts) {
  Call call = make_call("deform_align", input, "raw", raw, 3, weight, geometry, parts);
  ModulatedDeformConv2dParams& p = call.params;
  p.raw.used = true;
  p.raw.max_residue = max_residue;
  // The last third of the planes.
  p.mask_dtype = p.offset_dtype;
  for (int i = 0; i < 3; ++i) p.mask_stride[i] = p.offset_stride[i];
  const int64_t first = int64_t{2} * p.offset_groups * p.taps() * p.offset_stride[1];
  p.mask = static_cast<const char*>(p.offset) + first * call.offset.element_size();
  MAFNET_CHECK(!flow_2.has_value() || flow_1.has_value(), call.op, "flow_1",
               "a tensor where flow_2 is given", "None");
  MAFNET_CHECK(!flow_2.has_value() || p.offset_groups % 2 == 0, call.op, "raw",
               "an even number of offset groups for two flows", p.offset_groups);
  if (flow_1.has_value()) set_flow(call, 0, *flow_1);
  if (flow_2.has_value()) set_flow(call, 1, *flow_2);
  return call;
}

Tensor deform_align_forward(const Tensor& input, const Tensor& raw,
                            const std::optional<Tensor>& flow_1,
                            const std::optional<Tensor>& flow_2, const Tensor& weight,
                            const std::optional<Tensor>& bias, double max_residue_magnitude,
                            int64_t stride_h, int64_t stride_w, int64_t padding_h,
                            int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
                            int64_t parts, bool allow_tf32) {
  Call call =
      make_raw_call(input, raw, flow_1, flow_2, weight, max_residue_magnitude,
                    {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w}, parts);
  return run_forward(call, bias, allow_tf32);
}

// What is not needed comes back with size 0 in its first dimension.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> deform_align_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& raw,
    const std::optional<Tensor>& flow_1, const std::optional<Tensor>& flow_2, const Tensor& weight,
    double max_residue_magnitude, int64_t stride_h, int64_t stride_w, int64_t padding_h,
    int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t parts, bool need_input,
    bool need_raw, bool need_flow_1, bool need_flow_2, bool need_weight, bool need_bias,
    bool deterministic) {
  Call call =
      make_raw_call(input, raw, flow_1, flow_2, weight, max_residue_magnitude,
                    {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w}, parts);
  ModulatedDeformConv2dParams& p = call.params;
  Tensor grad_raw = gradient_like(raw, need_raw);
  if (need_raw) {
    const int64_t planes = int64_t{2} * p.offset_groups * p.taps();
    p.grad_offset = grad_raw.mutable_data_ptr();
    p.grad_mask = static_cast<char*>(p.grad_offset) + planes * p.pixels() * grad_raw.element_size();
  }
  const auto grad_flow = [&](const std::optional<Tensor>& flow, int index, bool needed) {
    needed = needed && flow.has_value();
    Tensor grad = empty_on(flow.value_or(raw), {needed ? p.batch : 0, p.out_height, p.out_width, 2},
                           flow.value_or(raw).scalar_type(), MemoryFormat::Contiguous);
    p.raw.grad_flow[index] = pointer_if(grad, needed);
    return grad;
  };
  Tensor grad_flow_1 = grad_flow(flow_1, 0, need_flow_1);
  Tensor grad_flow_2 = grad_flow(flow_2, 1, need_flow_2);
  auto [grad_input, grad_weight, grad_bias] =
      run_backward(call, grad_output, need_input, need_weight, need_bias, deterministic);
  return {grad_input, grad_raw, grad_flow_1, grad_flow_2, grad_weight, grad_bias};
}

}  // namespace

MAFNET_LIBRARY_IMPL(module) {
  module.impl("deform_align_forward", TORCH_BOX(&deform_align_forward));
  module.impl("deform_align_backward", TORCH_BOX(&deform_align_backward));
}

}  // namespace mafnet::deform_align_binding
