// Torch side of spatial_gate: check, allocate, fill params, launch.
#include "pyramid_spatial_attention/binding.h"

namespace mafnet::spatial_gate_binding {
namespace {

void flatten_pixels(SpatialGateParams& p) {
  if (int64_t{p.height} * p.width > std::numeric_limits<int>::max() / 2) return;
  if (!is_flat(p.input, p.height, p.width) || !is_flat(p.mask, p.height, p.width) ||
      !is_flat(p.output, p.height, p.width) || !is_flat(p.grad_output, p.height, p.width) ||
      !is_flat(p.grad_input, p.height, p.width) || !is_flat(p.grad_mask, p.height, p.width)) {
    return;
  }
  flatten(p.input, p.width);
  flatten(p.mask, p.width);
  flatten(p.output, p.width);
  flatten(p.grad_output, p.width);
  flatten(p.grad_input, p.width);
  flatten(p.grad_mask, p.width);
  p.width *= p.height;
  p.height = 1;
}

struct GateCall {
  SpatialGateParams params{};
  Tensor weight, bias;
};

GateCall make_gate(const Tensor& input, const Tensor& mask, const Tensor& weight,
                   const std::optional<Tensor>& bias, double scale, double slope,
                   bool from_feature) {
  constexpr const char* kOp = "spatial_gate";
  GateCall call;
  SpatialGateParams& p = call.params;
  p.input = source_of(kOp, "input", input);
  p.mask = source_of(kOp, "mask", mask);
  p.dtype = p.mask.dtype;
  p.wide_dtype = p.input.dtype;
  MAFNET_CHECK(
      p.wide_dtype == p.dtype || (p.wide_dtype == Dtype::kFloat32 && p.dtype != Dtype::kFloat64),
      kOp, "input", "the dtype of mask, or float32 beside a half-precision mask",
      torch::headeronly::toString(input.scalar_type()));
  check_same_device(kOp, "mask", mask, input);
  check_shape(kOp, "mask", mask, {input.size(0), input.size(1), input.size(2), input.size(3)});
  check_like(kOp, "weight", weight, mask);
  check_shape(kOp, "weight", weight, {input.size(1), input.size(1), 1, 1});
  check_slope(kOp, slope);
  p.batch = input.size(0);
  p.channels = extent_of(kOp, "input", input, 1);
  p.height = extent_of(kOp, "input", input, 2);
  p.width = extent_of(kOp, "input", input, 3);
  p.scale = scale;
  p.negative_slope = slope;
  p.from_feature = from_feature;
  call.weight = torch::stable::contiguous(weight);
  p.weight = call.weight.const_data_ptr();
  if (bias.has_value()) {
    check_bias(kOp, *bias, weight);
    call.bias = torch::stable::contiguous(*bias);
    p.bias = call.bias.const_data_ptr();
  }
  return call;
}

Tensor spatial_gate_forward(const Tensor& input, const Tensor& mask, const Tensor& weight,
                            const std::optional<Tensor>& bias, double scale, double slope,
                            bool from_feature) {
  constexpr const char* kOp = "spatial_gate";
  GateCall call = make_gate(input, mask, weight, bias, scale, slope, from_feature);
  SpatialGateParams& p = call.params;
  DeviceScope scope(input);
  Tensor output = grad_like(input, true);
  p.output = target_of(kOp, output);
  if (p.batch * p.height * p.width * p.channels == 0) return output;
  flatten_pixels(p);
  check_launch(kOp, launch_spatial_gate_forward(p, scope.stream()));
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> spatial_gate_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& mask, const Tensor& weight,
    const std::optional<Tensor>& bias, double scale, double slope, bool from_feature,
    bool need_input, bool need_mask, bool need_weight, bool need_bias) {
  constexpr const char* kOp = "spatial_gate";
  GateCall call = make_gate(input, mask, weight, bias, scale, slope, from_feature);
  SpatialGateParams& p = call.params;
  check_like(kOp, "grad_output", grad_output, input);
  check_shape(kOp, "grad_output", grad_output,
              {input.size(0), input.size(1), input.size(2), input.size(3)});
  DeviceScope scope(input);
  p.grad_output = source_of(kOp, "grad_output", grad_output);
  Tensor grad_input = grad_like(input, need_input), grad_mask = grad_like(mask, need_mask);
  Tensor grad_weight = grad_weight_like(weight, need_weight);
  Tensor grad_bias = grad_bias_like(weight, need_bias);
  p.grad_input = need_input ? target_of(kOp, grad_input) : Target{};
  p.grad_mask = need_mask ? target_of(kOp, grad_mask) : Target{};
  p.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
  p.grad_bias = need_bias ? grad_bias.mutable_data_ptr() : nullptr;
  flatten_pixels(p);
  Tensor workspace;
  if constexpr (kIsCuda) {
    workspace = make_workspace(mask, spatial_gate_workspace(p));
    p.workspace = workspace.mutable_data_ptr();
  }
  check_launch(kOp, launch_spatial_gate_backward(p, scope.stream()));
  return {grad_input, grad_mask, grad_weight, grad_bias};
}

}  // namespace

MAFNET_LIBRARY_IMPL(module) {
  module.impl("spatial_gate_forward", TORCH_BOX(&spatial_gate_forward));
  module.impl("spatial_gate_backward", TORCH_BOX(&spatial_gate_backward));
}

}  // namespace mafnet::spatial_gate_binding
