// Torch side of modulated_deform_conv2d: check, allocate, fill params, launch. Input, offset, mask
// and grad_output come in any layout; what the kernels cannot read where it lies is made
// contiguous.
#include <optional>
#include <tuple>

#include "common/backend.h"
#include "modulated_deform_conv2d/params.h"

namespace mafnet {
namespace {

constexpr const char* kOp = "modulated_deform_conv2d";

int int_of(const char* argument, int64_t value) {
  constexpr int64_t kLimit = std::numeric_limits<int>::max() / 4;
  MAFNET_CHECK(value >= 0 && value <= kLimit, kOp, argument, "at most 2^29", value);
  return static_cast<int>(value);
}

void check_dtype(const char* argument, const Tensor& tensor, const Tensor& input) {
  MAFNET_CHECK(tensor.scalar_type() == input.scalar_type(), kOp, argument, "the dtype of input",
               torch::headeronly::toString(tensor.scalar_type()));
}

// Of offset and mask: that of input, or float32 beside half precision.
Dtype coordinate_dtype_of(const char* argument, const Tensor& tensor, const Tensor& input) {
  const Dtype dtype = dtype_of(kOp, argument, tensor), of_input = dtype_of(kOp, "input", input);
  MAFNET_CHECK(dtype == of_input || (dtype == Dtype::kFloat32 && of_input != Dtype::kFloat64), kOp,
               argument, "the dtype of input, or float32 beside a half-precision input",
               torch::headeronly::toString(tensor.scalar_type()));
  return dtype;
}

// The tensor with its pixels at one stride, and its strides of N, C and pixels.
Tensor with_flat_pixels(const Tensor& tensor, int64_t (&strides)[3]) {
  const bool flat = tensor.size(2) <= 1 || tensor.size(3) < 1 ||
                    tensor.stride(2) == tensor.size(3) * tensor.stride(3);
  const Tensor flattened =
      flat ? tensor : torch::stable::contiguous(tensor, MemoryFormat::Contiguous);
  strides[0] = flattened.stride(0);
  strides[1] = flattened.stride(1);
  // The stride of a single column is arbitrary: its pixels follow at that of the rows.
  strides[2] = flattened.size(3) == 1 ? flattened.stride(2) : flattened.stride(3);
  return flattened;
}

void set_output_strides(const Tensor& tensor, int64_t (&strides)[3]) {
  const bool channels_last = has_channels_last(tensor);
  const int64_t pixels = tensor.size(2) * tensor.size(3);
  strides[0] = tensor.size(1) * pixels;
  strides[1] = channels_last ? 1 : pixels;
  strides[2] = channels_last ? tensor.size(1) : 1;
}

Tensor workspace_on(const Tensor& like, int64_t count, ScalarType dtype) {
  return empty_on(like, {1, 1, 1, count}, dtype, MemoryFormat::Contiguous);
}

// Params, and the tensors that own what they point at.
struct Call {
  ModulatedDeformConv2dParams params{};
  Tensor offset, mask, weight, bias, grad_output;
  Tensor packed_weight, weight_partials, fixed_sums, exponents;  // on CUDA
};

Call make_call(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
               const Tensor& weight, int64_t stride_h, int64_t stride_w, int64_t padding_h,
               int64_t padding_w, int64_t dilation_h, int64_t dilation_w) {
  check_dims(kOp, "input", input, 4);
  check_dims(kOp, "offset", offset, 4);
  check_dims(kOp, "weight", weight, 4);
  check_same_device(kOp, "offset", offset, input);
  check_same_device(kOp, "weight", weight, input);
  check_dtype("weight", weight, input);
  Call call;
  ModulatedDeformConv2dParams& p = call.params;
  p.dtype = dtype_of(kOp, "input", input);
  p.offset_dtype = coordinate_dtype_of("offset", offset, input);
  p.batch = input.size(0);
  p.channels = extent_of(kOp, "input", input, 1);
  p.height = extent_of(kOp, "input", input, 2);
  p.width = extent_of(kOp, "input", input, 3);
  MAFNET_CHECK(p.channels > 0, kOp, "input", "at least 1 channel", "shape " + shape_of(input));
  p.out_channels = extent_of(kOp, "weight", weight, 0);
  p.kernel_h = extent_of(kOp, "weight", weight, 2);
  p.kernel_w = extent_of(kOp, "weight", weight, 3);
  p.out_height = extent_of(kOp, "offset", offset, 2);
  p.out_width = extent_of(kOp, "offset", offset, 3);
  p.stride_h = int_of("stride", stride_h);
  p.stride_w = int_of("stride", stride_w);
  p.padding_h = int_of("padding", padding_h);
  p.padding_w = int_of("padding", padding_w);
  p.dilation_h = int_of("dilation", dilation_h);
  p.dilation_w = int_of("dilation", dilation_w);
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
  p.input = input.const_data_ptr();
  copy_strides(input, p.input_stride);
  call.offset = with_flat_pixels(offset, p.offset_stride);
  p.offset = call.offset.const_data_ptr();
  call.weight = torch::stable::contiguous(weight, MemoryFormat::Contiguous);
  p.weight = call.weight.const_data_ptr();
  if (mask.has_value()) {
    check_shape(kOp, "mask", *mask, {p.batch, offset.size(1) / 2, p.out_height, p.out_width});
    check_same_device(kOp, "mask", *mask, input);
    p.mask_dtype = coordinate_dtype_of("mask", *mask, input);
    call.mask = with_flat_pixels(*mask, p.mask_stride);
    p.mask = call.mask.const_data_ptr();
  }
  return call;
}

Tensor modulated_deform_conv2d_forward(const Tensor& input, const Tensor& offset,
                                       const std::optional<Tensor>& mask, const Tensor& weight,
                                       const std::optional<Tensor>& bias, int64_t stride_h,
                                       int64_t stride_w, int64_t padding_h, int64_t padding_w,
                                       int64_t dilation_h, int64_t dilation_w) {
  Call call = make_call(input, offset, mask, weight, stride_h, stride_w, padding_h, padding_w,
                        dilation_h, dilation_w);
  ModulatedDeformConv2dParams& p = call.params;
  if (bias.has_value()) {
    MAFNET_CHECK(bias->dim() == 1 && bias->size(0) == p.out_channels, kOp, "bias", "shape (C_out,)",
                 "shape " + shape_of(*bias));
    check_same_device(kOp, "bias", *bias, input);
    check_dtype("bias", *bias, input);
    call.bias = torch::stable::contiguous(*bias, MemoryFormat::Contiguous);
    p.bias = call.bias.const_data_ptr();
  }
  DeviceScope scope(input);
  Tensor output = empty_on(input, {p.batch, p.out_channels, p.out_height, p.out_width},
                           input.scalar_type(), memory_format_of(input));
  p.output = output.mutable_data_ptr();
  set_output_strides(output, p.output_stride);
  Tensor packed_weight;
  if constexpr (kIsCuda) {
    const int64_t bytes = modulated_deform_conv2d_packed_weight_bytes(p);
    if (bytes > 0) {
      packed_weight = workspace_on(input, bytes, ScalarType::Byte);
      p.packed_weight = packed_weight.mutable_data_ptr();
    }
  }
  if (p.batch * p.pixels() * p.out_channels > 0) {
    check_launch(kOp, launch_modulated_deform_conv2d_forward(p, scope.stream()));
  }
  return output;
}

// What the kernels add to begins at zero, and what they write to is there. CUDA only.
void make_workspaces(const Tensor& input, bool deterministic, Tensor& grad_input, Call& call) {
  ModulatedDeformConv2dParams& p = call.params;
  if (p.grad_input != nullptr) {
    torch::stable::zero_(grad_input);
    if (deterministic) {
      const int64_t limbs = modulated_deform_conv2d_fixed_limbs(p.dtype);
      const int64_t elements = p.batch * p.channels * p.height * p.width;
      call.fixed_sums = workspace_on(input, limbs * elements, ScalarType::Long);
      call.exponents = workspace_on(input, kExponents, ScalarType::Int);
      torch::stable::zero_(call.fixed_sums);
      torch::stable::zero_(call.exponents);
      p.fixed_sums = static_cast<int64_t*>(call.fixed_sums.mutable_data_ptr());
      p.exponents = static_cast<int*>(call.exponents.mutable_data_ptr());
    }
  }
  if (p.grad_input != nullptr || p.grad_offset != nullptr || p.grad_mask != nullptr) {
    const int64_t bytes = modulated_deform_conv2d_backward_packed_weight_bytes(p);
    if (bytes > 0) {
      call.packed_weight = workspace_on(input, bytes, ScalarType::Byte);
      p.packed_weight = call.packed_weight.mutable_data_ptr();
    }
  }
  if (p.grad_weight != nullptr) {
    const ScalarType sums = p.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
    call.weight_partials = workspace_on(input, modulated_deform_conv2d_weight_partials(p), sums);
    p.weight_partials = call.weight_partials.mutable_data_ptr();
  }
}

// What is not needed comes back with size 0 in its first dimension.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> modulated_deform_conv2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset,
    const std::optional<Tensor>& mask, const Tensor& weight, int64_t stride_h, int64_t stride_w,
    int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, bool need_input,
    bool need_offset, bool need_mask, bool need_weight, bool need_bias,
    [[maybe_unused]] bool deterministic) {
  Call call = make_call(input, offset, mask, weight, stride_h, stride_w, padding_h, padding_w,
                        dilation_h, dilation_w);
  ModulatedDeformConv2dParams& p = call.params;
  check_shape(kOp, "grad_output", grad_output,
              {p.batch, p.out_channels, p.out_height, p.out_width});
  check_same_device(kOp, "grad_output", grad_output, input);
  check_dtype("grad_output", grad_output, input);
  DeviceScope scope(input);
  call.grad_output = with_flat_pixels(grad_output, p.grad_output_stride);
  p.grad_output = call.grad_output.const_data_ptr();

  need_mask = need_mask && mask.has_value();
  const auto shape_like = [](const Tensor& t, bool needed) {
    return std::array<int64_t, 4>{needed ? t.size(0) : 0, t.size(1), t.size(2), t.size(3)};
  };
  const auto like = [&](const Tensor& t, bool needed, MemoryFormat format) {
    return empty_on(t, shape_like(t, needed), t.scalar_type(), format);
  };
  const ScalarType dtype = input.scalar_type();
  const bool wide = kIsCuda && dtype != ScalarType::Double;  // sums over pixels are in float
  Tensor grad_input = empty_on(input, shape_like(input, need_input),
                               wide ? ScalarType::Float : dtype, memory_format_of(input));
  Tensor grad_offset = like(offset, need_offset, MemoryFormat::Contiguous);
  Tensor grad_mask = like(mask.value_or(offset), need_mask, MemoryFormat::Contiguous);
  Tensor grad_weight = like(weight, need_weight, MemoryFormat::Contiguous);
  const int64_t bias_size = need_bias ? p.out_channels : 0;
  Tensor grad_bias = torch::stable::empty({&bias_size, 1}, weight.scalar_type(), std::nullopt,
                                          weight.device(), std::nullopt, std::nullopt);
  const auto pointer = [](Tensor& t, bool needed) {
    return needed ? t.mutable_data_ptr() : nullptr;
  };
  p.grad_input = pointer(grad_input, need_input);
  set_output_strides(grad_input, p.grad_input_stride);
  p.grad_offset = pointer(grad_offset, need_offset);
  p.grad_mask = pointer(grad_mask, need_mask);
  p.grad_weight = pointer(grad_weight, need_weight);
  p.grad_bias = pointer(grad_bias, need_bias);
  if constexpr (kIsCuda) make_workspaces(input, deterministic, grad_input, call);
  check_launch(kOp, launch_modulated_deform_conv2d_backward(p, scope.stream()));
  if (grad_input.scalar_type() != dtype) grad_input = torch::stable::to(grad_input, dtype);
  return {grad_input, grad_offset, grad_mask, grad_weight, grad_bias};
}

}  // namespace

MAFNET_LIBRARY_IMPL(module) {
  module.impl("modulated_deform_conv2d_forward", TORCH_BOX(&modulated_deform_conv2d_forward));
  module.impl("modulated_deform_conv2d_backward", TORCH_BOX(&modulated_deform_conv2d_backward));
}

}  // namespace mafnet
