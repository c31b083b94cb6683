// Torch side of modulated_deform_conv2d: check, allocate, fill params, launch.
#include "modulated_deform_conv2d/call.h"

namespace mafnet::modulated_deform_conv2d_binding {
namespace {

Call make_offset_call(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
                      const Tensor& weight, const Geometry& geometry) {
  Call call = make_call("modulated_deform_conv2d", input, "offset", offset, 2, weight, geometry, 1);
  ModulatedDeformConv2dParams& p = call.params;
  if (mask.has_value()) {
    check_shape(call.op, "mask", *mask, {p.batch, offset.size(1) / 2, p.out_height, p.out_width});
    check_same_device(call.op, "mask", *mask, input);
    p.mask_dtype = coordinate_dtype_of(call, "mask", *mask);
    call.mask = with_flat_pixels(*mask);
    p.mask = call.mask.const_data_ptr();
    copy_pixel_strides(call.mask, p.mask_stride);
  }
  return call;
}

Tensor modulated_deform_conv2d_forward(const Tensor& input, const Tensor& offset,
                                       const std::optional<Tensor>& mask, const Tensor& weight,
                                       const std::optional<Tensor>& bias, int64_t stride_h,
                                       int64_t stride_w, int64_t padding_h, int64_t padding_w,
                                       int64_t dilation_h, int64_t dilation_w, bool allow_tf32) {
  Call call = make_offset_call(input, offset, mask, weight,
                               {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w});
  return run_forward(call, bias, allow_tf32);
}

// What is not needed comes back with size 0 in its first dimension.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> modulated_deform_conv2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset,
    const std::optional<Tensor>& mask, const Tensor& weight, int64_t stride_h, int64_t stride_w,
    int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, bool need_input,
    bool need_offset, bool need_mask, bool need_weight, bool need_bias, bool deterministic) {
  Call call = make_offset_call(input, offset, mask, weight,
                               {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w});
  need_mask = need_mask && mask.has_value();
  Tensor grad_offset = gradient_like(offset, need_offset);
  Tensor grad_mask = gradient_like(mask.value_or(offset), need_mask);
  call.params.grad_offset = pointer_if(grad_offset, need_offset);
  call.params.grad_mask = pointer_if(grad_mask, need_mask);
  auto [grad_input, grad_weight, grad_bias] =
      run_backward(call, grad_output, need_input, need_weight, need_bias, deterministic);
  return {grad_input, grad_offset, grad_mask, grad_weight, grad_bias};
}

}  // namespace

MAFNET_LIBRARY_IMPL(module) {
  module.impl("modulated_deform_conv2d_forward", TORCH_BOX(&modulated_deform_conv2d_forward));
  module.impl("modulated_deform_conv2d_backward", TORCH_BOX(&modulated_deform_conv2d_backward));
}

}  // namespace mafnet::modulated_deform_conv2d_binding
