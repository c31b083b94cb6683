// What the bindings of modulated_deform_conv2d and deform_align share: checks, allocation, params.
// Input, offsets, masks and grad_output come in any layout; what the kernels cannot read where it
// lies is made contiguous.
#pragma once

#include <optional>
#include <tuple>

#include "common/backend.h"
#include "modulated_deform_conv2d/params.h"

namespace mafnet {

// Stride, padding and dilation, each vertical and horizontal.
using Geometry = std::array<int64_t, 6>;

// Params, and the tensors that own what they point at.
struct Call {
  const char* op = nullptr;
  ModulatedDeformConv2dParams params{};
  Tensor input, offset, mask, weight, bias, grad_output, flow[2];
  Tensor packed_weight, weight_partials, flow_partials, fixed_sums, exponents;  // on CUDA
};

inline void check_dtype(const Call& call, const char* argument, const Tensor& tensor) {
  MAFNET_CHECK(tensor.scalar_type() == call.input.scalar_type(), call.op, argument,
               "the dtype of input", torch::headeronly::toString(tensor.scalar_type()));
}

// Of offsets, masks and flows: that of input, or float32 beside half precision.
inline Dtype coordinate_dtype_of(const Call& call, const char* argument, const Tensor& tensor) {
  const Dtype dtype = dtype_of(call.op, argument, tensor), of_input = call.params.dtype;
  MAFNET_CHECK(dtype == of_input || (dtype == Dtype::kFloat32 && of_input != Dtype::kFloat64),
               call.op, argument, "the dtype of input, or float32 beside a half-precision input",
               torch::headeronly::toString(tensor.scalar_type()));
  return dtype;
}

// The tensor with its pixels, of which dimension `row` counts the rows, at one stride.
inline Tensor with_flat_pixels(const Tensor& tensor, int64_t row = 2) {
  const int64_t columns = tensor.size(row + 1);
  const bool flat = tensor.size(row) <= 1 || columns < 1 ||
                    tensor.stride(row) == columns * tensor.stride(row + 1);
  return flat ? tensor : torch::stable::contiguous(tensor, MemoryFormat::Contiguous);
}

// The stride of a single column is arbitrary: its pixels follow at that of the rows.
inline int64_t pixel_stride(const Tensor& tensor, int64_t row = 2) {
  return tensor.size(row + 1) == 1 ? tensor.stride(row) : tensor.stride(row + 1);
}

// Strides of N, C and pixels.
inline void copy_pixel_strides(const Tensor& tensor, int64_t (&strides)[3]) {
  strides[0] = tensor.stride(0);
  strides[1] = tensor.stride(1);
  strides[2] = pixel_stride(tensor);
}

inline void set_output_strides(const Tensor& tensor, int64_t (&strides)[3]) {
  const bool channels_last = has_channels_last(tensor);
  const int64_t pixels = tensor.size(2) * tensor.size(3);
  strides[0] = tensor.size(1) * pixels;
  strides[1] = channels_last ? 1 : pixels;
  strides[2] = channels_last ? tensor.size(1) : 1;
}

inline Tensor workspace_on(const Tensor& like, int64_t count, ScalarType dtype) {
  return empty_on(like, {1, 1, 1, count}, dtype, MemoryFormat::Contiguous);
}

inline void set_geometry(Call& call, const Geometry& geometry) {
  constexpr int64_t kLimit = std::numeric_limits<int>::max() / 4;
  ModulatedDeformConv2dParams& p = call.params;
  const std::array<std::tuple<const char*, int*>, 6> targets{{{"stride", &p.stride_h},
                                                              {"stride", &p.stride_w},
                                                              {"padding", &p.padding_h},
                                                              {"padding", &p.padding_w},
                                                              {"dilation", &p.dilation_h},
                                                              {"dilation", &p.dilation_w}}};
  for (size_t i = 0; i < targets.size(); ++i) {
    const auto [argument, target] = targets[i];
    MAFNET_CHECK(geometry[i] >= 0 && geometry[i] <= kLimit, call.op, argument, "at most 2^29",
                 geometry[i]);
    *target = static_cast<int>(geometry[i]);
  }
}

// `offset`, of that name, has `planes` of every tap and offset group: (dy, dx), or raw ones of the
// mask too. Its pixels are those of the output.
inline Call make_call(const char* op, const Tensor& input, const char* name, const Tensor& offset,
                      int planes, const Tensor& weight, const Geometry& geometry, int64_t parts) {
  check_dims(op, "input", input, 4);
  check_dims(op, name, offset, 4);
  check_dims(op, "weight", weight, 4);
  check_same_device(op, name, offset, input);
  check_same_device(op, "weight", weight, input);
  Call call;
  call.op = op;
  call.input = input;
  ModulatedDeformConv2dParams& p = call.params;
  p.dtype = dtype_of(op, "input", input);
  check_dtype(call, "weight", weight);
  p.offset_dtype = coordinate_dtype_of(call, name, offset);
  p.batch = input.size(0);
  p.channels = extent_of(op, "input", input, 1);
  p.height = extent_of(op, "input", input, 2);
  p.width = extent_of(op, "input", input, 3);
  MAFNET_CHECK(p.channels > 0, op, "input", "at least 1 channel", "shape " + shape_of(input));
  p.out_channels = extent_of(op, "weight", weight, 0);
  p.kernel_h = extent_of(op, "weight", weight, 2);
  p.kernel_w = extent_of(op, "weight", weight, 3);
  p.out_height = extent_of(op, name, offset, 2);
  p.out_width = extent_of(op, name, offset, 3);
  set_geometry(call, geometry);
  MAFNET_CHECK(weight.size(1) > 0 && p.channels % weight.size(1) == 0, op, "weight",
               "shape[1] to divide the channels of input", "shape " + shape_of(weight));
  p.groups = p.channels / static_cast<int>(weight.size(1));
  const int64_t of_group = int64_t{planes} * p.taps();
  MAFNET_CHECK(of_group > 0 && offset.size(1) % of_group == 0 && offset.size(1) > 0, op, name,
               "a multiple of " + std::to_string(planes) + " * kernel_h * kernel_w channels",
               "shape " + shape_of(offset));
  p.offset_groups = extent_of(op, name, offset, 1) / static_cast<int>(of_group);
  MAFNET_CHECK(parts > 0 && parts <= p.channels, op, "parts", "1 to the channels of input", parts);
  p.parts = static_cast<int>(parts);
  MAFNET_CHECK(p.channels % (parts * p.offset_groups) == 0 && p.out_channels % p.groups == 0, op,
               "input", "channels that groups, parts and offset groups divide",
               "shape " + shape_of(input));
  check_shape(op, name, offset, {p.batch, offset.size(1), p.out_height, p.out_width});
  p.input = input.const_data_ptr();
  copy_strides(input, p.input_stride);
  call.offset = with_flat_pixels(offset);
  p.offset = call.offset.const_data_ptr();
  copy_pixel_strides(call.offset, p.offset_stride);
  call.weight = torch::stable::contiguous(weight, MemoryFormat::Contiguous);
  p.weight = call.weight.const_data_ptr();
  return call;
}

inline Tensor run_forward(Call& call, const std::optional<Tensor>& bias, bool allow_tf32) {
  ModulatedDeformConv2dParams& p = call.params;
  p.allow_tf32 = allow_tf32;
  if (bias.has_value()) {
    MAFNET_CHECK(bias->dim() == 1 && bias->size(0) == p.out_channels, call.op, "bias",
                 "shape (C_out,)", "shape " + shape_of(*bias));
    check_same_device(call.op, "bias", *bias, call.input);
    check_dtype(call, "bias", *bias);
    call.bias = torch::stable::contiguous(*bias, MemoryFormat::Contiguous);
    p.bias = call.bias.const_data_ptr();
  }
  DeviceScope scope(call.input);
  Tensor output = empty_on(call.input, {p.batch, p.out_channels, p.out_height, p.out_width},
                           call.input.scalar_type(), memory_format_of(call.input));
  p.output = output.mutable_data_ptr();
  set_output_strides(output, p.output_stride);
  Tensor packed_weight;
  if constexpr (kIsCuda) {
    const int64_t bytes = modulated_deform_conv2d_packed_weight_bytes(p);
    if (bytes > 0) {
      packed_weight = workspace_on(call.input, bytes, ScalarType::Byte);
      p.packed_weight = packed_weight.mutable_data_ptr();
    }
  }
  if (p.batch * p.pixels() * p.out_channels > 0) {
    check_launch(call.op, launch_modulated_deform_conv2d_forward(p, scope.stream()));
  }
  return output;
}

// What the kernels add to begins at zero, and what they write to is there. CUDA only.
inline void make_workspaces(bool deterministic, Tensor& grad_input, Call& call) {
  ModulatedDeformConv2dParams& p = call.params;
  if (p.grad_input != nullptr) {
    torch::stable::zero_(grad_input);
    if (deterministic) {
      const int64_t limbs = modulated_deform_conv2d_fixed_limbs(p.dtype);
      const int64_t elements = p.batch * p.channels * p.height * p.width;
      call.fixed_sums = workspace_on(call.input, limbs * elements, ScalarType::Long);
      call.exponents = workspace_on(call.input, kExponents, ScalarType::Int);
      torch::stable::zero_(call.fixed_sums);
      torch::stable::zero_(call.exponents);
      p.fixed_sums = static_cast<int64_t*>(call.fixed_sums.mutable_data_ptr());
      p.exponents = static_cast<int*>(call.exponents.mutable_data_ptr());
    }
  }
  const ScalarType sums = p.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  if (p.raw.grad_flow[0] != nullptr || p.raw.grad_flow[1] != nullptr) {
    call.flow_partials = workspace_on(call.input, modulated_deform_conv2d_flow_partials(p), sums);
    p.flow_partials = call.flow_partials.mutable_data_ptr();
  }
  if (p.grad_input != nullptr || p.grad_offset != nullptr || p.grad_mask != nullptr ||
      p.flow_partials != nullptr) {
    const int64_t bytes = modulated_deform_conv2d_backward_packed_weight_bytes(p);
    if (bytes > 0) {
      call.packed_weight = workspace_on(call.input, bytes, ScalarType::Byte);
      p.packed_weight = call.packed_weight.mutable_data_ptr();
    }
  }
  if (p.grad_weight != nullptr) {
    call.weight_partials =
        workspace_on(call.input, modulated_deform_conv2d_weight_partials(p), sums);
    p.weight_partials = call.weight_partials.mutable_data_ptr();
  }
}

// A gradient like `tensor`, dense; where it is not needed, of size 0 in its first dimension.
inline Tensor gradient_like(const Tensor& tensor, bool needed) {
  return empty_on(tensor,
                  {needed ? tensor.size(0) : 0, tensor.size(1), tensor.size(2), tensor.size(3)},
                  tensor.scalar_type(), MemoryFormat::Contiguous);
}

inline void* pointer_if(Tensor& tensor, bool needed) {
  return needed ? tensor.mutable_data_ptr() : nullptr;
}

// The gradients of input, weight and bias. Those of offsets, masks and flows are in the params, and
// written too.
inline std::tuple<Tensor, Tensor, Tensor> run_backward(Call& call, const Tensor& grad_output,
                                                       bool need_input, bool need_weight,
                                                       bool need_bias,
                                                       [[maybe_unused]] bool deterministic) {
  ModulatedDeformConv2dParams& p = call.params;
  check_shape(call.op, "grad_output", grad_output,
              {p.batch, p.out_channels, p.out_height, p.out_width});
  check_same_device(call.op, "grad_output", grad_output, call.input);
  check_dtype(call, "grad_output", grad_output);
  DeviceScope scope(call.input);
  // The tensor-core kernels on CUDA want it in the layout of input.
  const bool is_half = p.dtype == Dtype::kFloat16 || p.dtype == Dtype::kBFloat16;
  const bool moves = kIsCuda && is_half && has_channels_last(call.input) &&
                     grad_output.size(1) > 1 && !has_channels_last(grad_output);
  call.grad_output = with_flat_pixels(
      moves ? torch::stable::contiguous(grad_output, MemoryFormat::ChannelsLast) : grad_output);
  p.grad_output = call.grad_output.const_data_ptr();
  copy_pixel_strides(call.grad_output, p.grad_output_stride);

  const ScalarType dtype = call.input.scalar_type();
  const bool wide = kIsCuda && dtype != ScalarType::Double;  // sums over pixels are in float
  Tensor grad_input =
      empty_on(call.input, {need_input ? p.batch : 0, p.channels, p.height, p.width},
               wide ? ScalarType::Float : dtype, memory_format_of(call.input));
  Tensor grad_weight = gradient_like(call.weight, need_weight);
  const int64_t bias_size = need_bias ? p.out_channels : 0;
  Tensor grad_bias = torch::stable::empty({&bias_size, 1}, dtype, std::nullopt, call.input.device(),
                                          std::nullopt, std::nullopt);
  p.grad_input = pointer_if(grad_input, need_input);
  set_output_strides(grad_input, p.grad_input_stride);
  p.grad_weight = pointer_if(grad_weight, need_weight);
  p.grad_bias = pointer_if(grad_bias, need_bias);
  if constexpr (kIsCuda) make_workspaces(deterministic, grad_input, call);
  check_launch(call.op, launch_modulated_deform_conv2d_backward(p, scope.stream()));
  if (grad_input.scalar_type() != dtype) grad_input = torch::stable::to(grad_input, dtype);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace mafnet
