// Torch side of flow_warp, compiled into _C and into _C_cuda: check, allocate, fill params, launch.
#include <tuple>

#include "common/backend.h"
#include "flow_warp/params.h"

namespace mafnet::flow_warp_binding {
namespace {

constexpr const char* kOp = "flow_warp";

FlowWarpParams make_params(const Tensor& input, const Tensor& flow, int64_t interpolation,
                           int64_t padding) {
  check_dims(kOp, "input", input, 4);
  MAFNET_CHECK(input.size(2) > 0 && input.size(3) > 0, kOp, "input", "H and W of at least 1",
               "shape " + shape_of(input));
  check_dims(kOp, "flow", flow, 4);
  check_shape(kOp, "flow", flow, {input.size(0), flow.size(1), flow.size(2), 2});
  check_same_device(kOp, "flow", flow, input);
  MAFNET_CHECK(interpolation >= 0 && interpolation <= 2, kOp, "interpolation", "0, 1 or 2",
               interpolation);
  MAFNET_CHECK(padding >= 0 && padding <= 2, kOp, "padding_mode", "0, 1 or 2", padding);

  FlowWarpParams params{};
  params.dtype = dtype_of(kOp, "input", input);
  params.flow_dtype = dtype_of(kOp, "flow", flow);
  MAFNET_CHECK(params.flow_dtype == params.dtype ||
                   (params.flow_dtype == Dtype::kFloat32 && params.dtype != Dtype::kFloat64),
               kOp, "flow", "the dtype of input, or float32 beside a half-precision input",
               torch::headeronly::toString(flow.scalar_type()));
  params.interpolation = static_cast<Interpolation>(interpolation);
  params.padding = static_cast<Padding>(padding);
  params.channels_last = has_channels_last(input);
  params.batch = input.size(0);
  params.channels = input.size(1);
  params.height = extent_of(kOp, "input", input, 2);
  params.width = extent_of(kOp, "input", input, 3);
  params.out_height = extent_of(kOp, "flow", flow, 1);
  params.out_width = extent_of(kOp, "flow", flow, 2);
  params.input = input.const_data_ptr();
  params.flow = flow.const_data_ptr();
  copy_strides(input, params.input_stride);
  copy_strides(flow, params.flow_stride);
  return params;
}

std::tuple<Tensor, Tensor> flow_warp_forward(const Tensor& input, const Tensor& flow,
                                             int64_t interpolation, int64_t padding,
                                             bool return_mask) {
  FlowWarpParams params = make_params(input, flow, interpolation, padding);
  const int64_t n = input.size(0), out_h = flow.size(1), out_w = flow.size(2);
  DeviceScope scope(input);
  const ScalarType dtype = input.scalar_type();
  Tensor output = empty_on(input, {n, input.size(1), out_h, out_w}, dtype, memory_format_of(input));
  Tensor mask =
      empty_on(input, {return_mask ? n : 0, 1, out_h, out_w}, dtype, MemoryFormat::Contiguous);
  params.output = output.mutable_data_ptr();
  params.mask = return_mask ? mask.mutable_data_ptr() : nullptr;
  copy_strides(output, params.output_stride);
  if (n * out_h * out_w > 0) {
    check_launch(kOp, launch_flow_warp_forward(params, scope.stream()));
  }
  return {output, mask};
}

// Sums grad_input by atomics, or, deterministic, from taps that are sorted by the pixel they read.
void launch_backward(FlowWarpParams& params, const Tensor& flow, bool deterministic, void* stream) {
  if constexpr (kIsCuda) {
    if (deterministic && params.grad_input != nullptr) {
      const int64_t stencil = params.interpolation == Interpolation::kNearest    ? 1
                              : params.interpolation == Interpolation::kBilinear ? 4
                                                                                 : 16;
      const int64_t count = flow.size(1) * flow.size(2) * stencil;
      const Tensor taps =
          empty_on(flow, {1, 1, params.batch, count}, ScalarType::Long, MemoryFormat::Contiguous);
      params.taps = static_cast<int64_t*>(taps.mutable_data_ptr());
      check_launch(kOp, launch_flow_warp_backward_taps(params, stream));
      const auto [sorted, order] = stable_sort(taps);
      params.sorted_taps = static_cast<const int64_t*>(sorted.const_data_ptr());
      params.tap_order = static_cast<const int64_t*>(order.const_data_ptr());
      check_launch(kOp, launch_flow_warp_backward_gather(params, stream));
      params.grad_input = nullptr;  // done
    }
  }
  if (params.grad_input == nullptr && params.grad_flow == nullptr) return;
  check_launch(kOp, launch_flow_warp_backward(params, stream));
}

std::tuple<Tensor, Tensor> flow_warp_backward(const Tensor& grad_output, const Tensor& input,
                                              const Tensor& flow, int64_t interpolation,
                                              int64_t padding, bool need_input, bool need_flow,
                                              bool deterministic) {
  FlowWarpParams params = make_params(input, flow, interpolation, padding);
  check_shape(kOp, "grad_output", grad_output,
              {input.size(0), input.size(1), flow.size(1), flow.size(2)});
  check_same_device(kOp, "grad_output", grad_output, input);
  MAFNET_CHECK(grad_output.scalar_type() == input.scalar_type(), kOp, "grad_output",
               "the dtype of input", torch::headeronly::toString(grad_output.scalar_type()));
  DeviceScope scope(input);

  const bool as_wanted = params.channels_last && grad_output.stride(1) == 1;
  const Tensor grad =
      as_wanted ? grad_output : torch::stable::contiguous(grad_output, memory_format_of(input));
  params.grad_output = grad.const_data_ptr();
  copy_strides(grad, params.grad_output_stride);

  const ScalarType dtype = input.scalar_type();
  const bool atomic = kIsCuda && !deterministic;
  const bool wide = atomic && dtype != ScalarType::Double;  // atomics are in float
  std::array<int64_t, 4> input_shape{input.size(0), input.size(1), input.size(2), input.size(3)};
  std::array<int64_t, 4> flow_shape{flow.size(0), flow.size(1), flow.size(2), 2};
  if (!need_input) input_shape[0] = 0;
  if (!need_flow) flow_shape[0] = 0;
  Tensor grad_input =
      empty_on(input, input_shape, wide ? ScalarType::Float : dtype, memory_format_of(input));
  Tensor grad_flow = empty_on(input, flow_shape, flow.scalar_type(), MemoryFormat::Contiguous);
  if (need_input) {
    if (atomic) torch::stable::zero_(grad_input);
    params.grad_input = grad_input.mutable_data_ptr();
    copy_strides(grad_input, params.grad_input_stride);
  }
  params.grad_flow = need_flow ? grad_flow.mutable_data_ptr() : nullptr;
  if (input.size(0) > 0) launch_backward(params, flow, deterministic, scope.stream());
  if (grad_input.scalar_type() != dtype) grad_input = torch::stable::to(grad_input, dtype);
  return {grad_input, grad_flow};
}

}  // namespace

MAFNET_LIBRARY_IMPL(module) {
  module.impl("flow_warp_forward", TORCH_BOX(&flow_warp_forward));
  module.impl("flow_warp_backward", TORCH_BOX(&flow_warp_backward));
}

}  // namespace mafnet::flow_warp_binding
