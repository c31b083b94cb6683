// Torch side of modulated_deform_conv2d: check, allocate, fill params, launch. Tensors come as the
// Python side lays them out: float, images channels_last, the rest contiguous.
#include <optional>
#include <tuple>

#include "common/backend.h"
#include "modulated_deform_conv2d/params.h"

namespace mafnet {
namespace {

constexpr const char* kOp = "modulated_deform_conv2d";

const float* float_data(const char* argument, const Tensor& tensor, bool channels_last) {
  MAFNET_CHECK(tensor.scalar_type() == ScalarType::Float, kOp, argument, "dtype float32",
               torch::headeronly::toString(tensor.scalar_type()));
  int64_t expected = 1;
  for (int64_t i = 3; i >= 0; --i) {  // dense in the order N C H W, or N H W C
    const int64_t d = channels_last ? (i == 3 ? 1 : i == 0 ? 0 : i + 1) : i;
    if (d >= tensor.dim()) continue;
    MAFNET_CHECK(
        tensor.size(d) == 1 || tensor.stride(d) == expected, kOp, argument,
        channels_last ? "a dense channels_last tensor" : "a contiguous tensor",
        "stride " + std::to_string(tensor.stride(d)) + " in dimension " + std::to_string(d));
    expected *= tensor.size(d);
  }
  return static_cast<const float*>(tensor.const_data_ptr());
}

ModulatedDeformConv2dParams make_params(const Tensor& input, const Tensor& offset,
                                        const std::optional<Tensor>& mask, const Tensor& weight,
                                        int64_t stride_h, int64_t stride_w, int64_t padding_h,
                                        int64_t padding_w, int64_t dilation_h, int64_t dilation_w) {
  check_dims(kOp, "input", input, 4);
  check_dims(kOp, "offset", offset, 4);
  check_dims(kOp, "weight", weight, 4);
  ModulatedDeformConv2dParams p{};
  p.batch = input.size(0);
  p.channels = extent_of(kOp, "input", input, 1);
  p.height = extent_of(kOp, "input", input, 2);
  p.width = extent_of(kOp, "input", input, 3);
  p.out_channels = extent_of(kOp, "weight", weight, 0);
  p.kernel_h = extent_of(kOp, "weight", weight, 2);
  p.kernel_w = extent_of(kOp, "weight", weight, 3);
  p.out_height = extent_of(kOp, "offset", offset, 2);
  p.out_width = extent_of(kOp, "offset", offset, 3);
  p.stride_h = static_cast<int>(stride_h);
  p.stride_w = static_cast<int>(stride_w);
  p.padding_h = static_cast<int>(padding_h);
  p.padding_w = static_cast<int>(padding_w);
  p.dilation_h = static_cast<int>(dilation_h);
  p.dilation_w = static_cast<int>(dilation_w);
  MAFNET_CHECK(weight.size(1) > 0 && p.channels % weight.size(1) == 0, kOp, "weight",
               "shape[1] to divide the channels of input", "shape " + shape_of(weight));
  p.groups = p.channels / static_cast<int>(weight.size(1));
  MAFNET_CHECK(p.taps() > 0 && offset.size(1) % (2 * p.taps()) == 0 && offset.size(1) > 0, kOp,
               "offset", "a multiple of 2 * kernel_h * kernel_w channels",
               "shape " + shape_of(offset));
  p.offset_groups = static_cast<int>(offset.size(1) / (2 * p.taps()));
  MAFNET_CHECK(p.channels % p.offset_groups == 0 && p.out_channels % p.groups == 0, kOp, "input",
               "channels that groups and offset groups divide", "shape " + shape_of(input));
  check_shape(kOp, "offset", offset, {p.batch, offset.size(1), p.out_height, p.out_width});
  p.input = float_data("input", input, true);
  p.offset = float_data("offset", offset, false);
  p.weight = float_data("weight", weight, false);
  if (mask.has_value()) {
    check_shape(kOp, "mask", *mask, {p.batch, offset.size(1) / 2, p.out_height, p.out_width});
    p.mask = float_data("mask", *mask, false);
  }
  return p;
}

Tensor modulated_deform_conv2d_forward(const Tensor& input, const Tensor& offset,
                                       const std::optional<Tensor>& mask, const Tensor& weight,
                                       const std::optional<Tensor>& bias, int64_t stride_h,
                                       int64_t stride_w, int64_t padding_h, int64_t padding_w,
                                       int64_t dilation_h, int64_t dilation_w) {
  auto p = make_params(input, offset, mask, weight, stride_h, stride_w, padding_h, padding_w,
                       dilation_h, dilation_w);
  if (bias.has_value()) {
    MAFNET_CHECK(bias->dim() == 1 && bias->size(0) == p.out_channels, kOp, "bias", "shape (C_out,)",
                 "shape " + shape_of(*bias));
    p.bias = float_data("bias", *bias, false);
  }
  Tensor output = empty_on(input, {p.batch, p.out_channels, p.out_height, p.out_width},
                           ScalarType::Float, MemoryFormat::ChannelsLast);
  p.output = static_cast<float*>(output.mutable_data_ptr());
  check_launch(kOp, launch_modulated_deform_conv2d_forward(p, nullptr));
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> modulated_deform_conv2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset,
    const std::optional<Tensor>& mask, const Tensor& weight, int64_t stride_h, int64_t stride_w,
    int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w) {
  auto p = make_params(input, offset, mask, weight, stride_h, stride_w, padding_h, padding_w,
                       dilation_h, dilation_w);
  check_shape(kOp, "grad_output", grad_output,
              {p.batch, p.out_channels, p.out_height, p.out_width});
  p.grad_output = float_data("grad_output", grad_output, true);
  const auto like = [&](const Tensor& t, int64_t batch, MemoryFormat format) {
    return empty_on(input, {batch, t.size(1), t.size(2), t.size(3)}, ScalarType::Float, format);
  };
  const Tensor& masked = mask.has_value() ? *mask : offset;
  Tensor grad_input = like(input, p.batch, MemoryFormat::ChannelsLast);
  Tensor grad_offset = like(offset, p.batch, MemoryFormat::Contiguous);
  Tensor grad_mask = like(masked, mask.has_value() ? p.batch : 0, MemoryFormat::Contiguous);
  Tensor grad_weight = like(weight, weight.size(0), MemoryFormat::Contiguous);
  p.grad_input = static_cast<float*>(grad_input.mutable_data_ptr());
  p.grad_offset = static_cast<float*>(grad_offset.mutable_data_ptr());
  p.grad_mask = mask.has_value() ? static_cast<float*>(grad_mask.mutable_data_ptr()) : nullptr;
  p.grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
  check_launch(kOp, launch_modulated_deform_conv2d_backward(p, nullptr));
  return {grad_input, grad_offset, grad_mask, grad_weight};
}

}  // namespace

MAFNET_LIBRARY_IMPL(module) {
  module.impl("modulated_deform_conv2d_forward", TORCH_BOX(&modulated_deform_conv2d_forward));
  module.impl("modulated_deform_conv2d_backward", TORCH_BOX(&modulated_deform_conv2d_backward));
}

}  // namespace mafnet
