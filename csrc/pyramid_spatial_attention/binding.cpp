// Torch side of pyramid spatial attention, compiled into _C and into _C_cuda: check, allocate, fill
// params, launch. Images come in any strides; results have the layout of the tensor that the
// docstrings in Python name.
#include "pyramid_spatial_attention/binding.h"

namespace mafnet::pyramid_spatial_attention_binding {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

// Params, and the tensors that own what they point at.
struct ConvCall {
  ConvForm form;
  PyramidConvParams params{};
  Tensor weight, bias;
};

ConvCall make_call(const char* op, ConvForm form, const Tensor& input, const Tensor* weight,
                   const std::optional<Tensor>& bias, int64_t out_height, int64_t out_width,
                   double slope) {
  const bool pools = form == ConvForm::kPool || form == ConvForm::kPoolKernel;
  ConvCall call{form, {}, {}, {}};
  PyramidConvParams& p = call.params;
  p.input = source_of(op, "input", input);
  p.dtype = p.input.dtype;
  p.batch = input.size(0);
  p.channels = extent_of(op, "input", input, 1);
  p.height = extent_of(op, "input", input, 2);
  p.width = extent_of(op, "input", input, 3);
  MAFNET_CHECK(p.height > 0 && p.width > 0, op, "input", "H and W of at least 1",
               "shape " + shape_of(input));
  p.out_height = pools ? (p.height + 1) / 2 : static_cast<int>(out_height);
  p.out_width = pools ? (p.width + 1) / 2 : static_cast<int>(out_width);
  p.negative_slope = slope;
  check_slope(op, slope);
  const int64_t inputs = pools ? 2 * p.channels : p.channels;
  if (weight == nullptr) {  // pool_concat alone
    p.out_channels = static_cast<int>(inputs);
    return call;
  }
  check_like(op, "weight", *weight, input);
  const int64_t kernel = form == ConvForm::kResize || form == ConvForm::kPoolKernel ? 3 : 1;
  check_shape(op, "weight", *weight, {weight->size(0), inputs, kernel, kernel});
  p.out_channels = extent_of(op, "weight", *weight, 0);
  call.weight = torch::stable::contiguous(*weight);
  p.weight = call.weight.const_data_ptr();
  if (bias.has_value()) {
    check_bias(op, *bias, *weight);
    call.bias = torch::stable::contiguous(*bias);
    p.bias = call.bias.const_data_ptr();
  }
  return call;
}

void flatten_pixels(PyramidConvParams& p) {
  if (int64_t{p.height} * p.width > std::numeric_limits<int>::max() / 2) return;
  if (!is_flat(p.input, p.height, p.width) || !is_flat(p.output, p.height, p.width) ||
      !is_flat(p.grad_output, p.height, p.width) || !is_flat(p.grad_input, p.height, p.width)) {
    return;
  }
  flatten(p.input, p.width);
  flatten(p.output, p.width);
  flatten(p.grad_output, p.width);
  flatten(p.grad_input, p.width);
  p.width *= p.height;
  p.out_width = p.width;
  p.height = p.out_height = 1;
}

Tensor conv_forward(const char* op, ConvCall& call, const Tensor& input, bool channels_last,
                    int (*launch)(const PyramidConvParams&, void*), bool pixelwise = false) {
  PyramidConvParams& p = call.params;
  DeviceScope scope(input);
  Tensor output =
      empty_on(input, {p.batch, p.out_channels, p.out_height, p.out_width}, input.scalar_type(),
               channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  p.output = target_of(op, output);
  if (pixelwise) flatten_pixels(p);
  check_launch(op, launch(p, scope.stream()));
  return output;
}

Three conv_backward(const char* op, ConvCall& call, const Tensor& grad_output, const Tensor& input,
                    const Tensor& weight, const Tensor& output, const std::array<bool, 3>& needs,
                    int (*launch)(const PyramidConvParams&, void*), bool pixelwise = false) {
  PyramidConvParams& p = call.params;
  check_like(op, "grad_output", grad_output, input);
  check_like(op, "output", output, input);
  const std::array<int64_t, 4> shape{p.batch, p.out_channels, p.out_height, p.out_width};
  check_shape(op, "grad_output", grad_output, shape);
  check_shape(op, "output", output, shape);
  DeviceScope scope(input);
  p.grad_output = source_of(op, "grad_output", grad_output);
  const Source result = source_of(op, "output", output);
  p.output = {const_cast<void*>(result.data), result.dtype, {}};
  copy_strides(output, p.output.stride);
  Tensor grad_input = grad_like(input, needs[0]);
  Tensor grad_weight = grad_weight_like(weight, needs[1]);
  Tensor grad_bias = grad_bias_like(weight, needs[2]);
  p.grad_input = needs[0] ? target_of(op, grad_input) : Target{};
  p.grad_weight = needs[1] ? grad_weight.mutable_data_ptr() : nullptr;
  p.grad_bias = needs[2] ? grad_bias.mutable_data_ptr() : nullptr;
  if (pixelwise) flatten_pixels(p);
  Tensor workspace;
  if constexpr (kIsCuda) {
    workspace = make_workspace(input, pyramid_conv_workspace(p, call.form));
    p.workspace = workspace.mutable_data_ptr();
  }
  check_launch(op, launch(p, scope.stream()));
  return {grad_input, grad_weight, grad_bias};
}

// -------------------------------------------------------------------------------- convolutions

Tensor pointwise_conv_forward(const Tensor& input, const Tensor& weight,
                              const std::optional<Tensor>& bias, double slope, bool channels_last) {
  constexpr const char* kOp = "pointwise_conv";
  check_dims(kOp, "input", input, 4);
  ConvCall call = make_call(kOp, ConvForm::kPointwise, input, &weight, bias, input.size(2),
                            input.size(3), slope);
  return conv_forward(kOp, call, input, channels_last, &launch_pointwise_conv_forward, true);
}

Three pointwise_conv_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                              const Tensor& output, double slope, bool need_input, bool need_weight,
                              bool need_bias) {
  constexpr const char* kOp = "pointwise_conv";
  check_dims(kOp, "input", input, 4);
  ConvCall call = make_call(kOp, ConvForm::kPointwise, input, &weight, std::nullopt, input.size(2),
                            input.size(3), slope);
  return conv_backward(kOp, call, grad_output, input, weight, output,
                       {need_input, need_weight, need_bias}, &launch_pointwise_conv_backward, true);
}

Tensor pool_concat_forward(const Tensor& input) {
  constexpr const char* kOp = "pool_concat";
  ConvCall call = make_call(kOp, ConvForm::kPool, input, nullptr, std::nullopt, 0, 0, 1);
  return conv_forward(kOp, call, input, has_channels_last(input), &launch_pool_concat_forward);
}

Tensor pool_concat_backward(const Tensor& grad_output, const Tensor& input) {
  constexpr const char* kOp = "pool_concat";
  ConvCall call = make_call(kOp, ConvForm::kPool, input, nullptr, std::nullopt, 0, 0, 1);
  PyramidConvParams& p = call.params;
  check_like(kOp, "grad_output", grad_output, input);
  check_shape(kOp, "grad_output", grad_output,
              {p.batch, p.out_channels, p.out_height, p.out_width});
  DeviceScope scope(input);
  Tensor grad_input = grad_like(input, true);
  p.grad_output = source_of(kOp, "grad_output", grad_output);
  p.grad_input = target_of(kOp, grad_input);
  check_launch(kOp, launch_pool_concat_backward(p, scope.stream()));
  return grad_input;
}

Tensor resize_conv_forward(const Tensor& input, const Tensor& weight,
                           const std::optional<Tensor>& bias, int64_t height, int64_t width,
                           double slope) {
  constexpr const char* kOp = "resize_conv";
  check_size(kOp, height, width);
  ConvCall call = make_call(kOp, ConvForm::kResize, input, &weight, bias, height, width, slope);
  return conv_forward(kOp, call, input, has_channels_last(input), &launch_resize_conv_forward);
}

Three resize_conv_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                           const Tensor& output, double slope, bool need_input, bool need_weight,
                           bool need_bias) {
  constexpr const char* kOp = "resize_conv";
  check_dims(kOp, "output", output, 4);
  check_size(kOp, output.size(2), output.size(3));
  ConvCall call = make_call(kOp, ConvForm::kResize, input, &weight, std::nullopt, output.size(2),
                            output.size(3), slope);
  return conv_backward(kOp, call, grad_output, input, weight, output,
                       {need_input, need_weight, need_bias}, &launch_resize_conv_backward);
}

// One launch, or two on the CPU.
Tensor pool_concat_conv_3x3_forward(const Tensor& input, const Tensor& weight,
                                    const std::optional<Tensor>& bias, double slope) {
  constexpr const char* kOp = "pool_concat_conv";
  if constexpr (kIsCuda) {
    ConvCall call = make_call(kOp, ConvForm::kPoolKernel, input, &weight, bias, 0, 0, slope);
    return conv_forward(kOp, call, input, has_channels_last(input),
                        &launch_pool_concat_conv_3x3_forward);
  } else {
    const Tensor pooled = pool_concat_forward(input);
    return resize_conv_forward(pooled, weight, bias, pooled.size(2), pooled.size(3), slope);
  }
}

Tensor pool_concat_conv_forward(const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias, double slope) {
  constexpr const char* kOp = "pool_concat_conv";
  check_dims(kOp, "weight", weight, 4);
  if (weight.size(2) == 3) return pool_concat_conv_3x3_forward(input, weight, bias, slope);
  ConvCall call = make_call(kOp, ConvForm::kPool, input, &weight, bias, 0, 0, slope);
  return conv_forward(kOp, call, input, has_channels_last(input), &launch_pool_concat_conv_forward);
}

Three pool_concat_conv_backward(const Tensor& grad_output, const Tensor& input,
                                const Tensor& weight, const Tensor& output, double slope,
                                bool need_input, bool need_weight, bool need_bias) {
  constexpr const char* kOp = "pool_concat_conv";
  ConvCall call = make_call(kOp, ConvForm::kPool, input, &weight, std::nullopt, 0, 0, slope);
  return conv_backward(kOp, call, grad_output, input, weight, output,
                       {need_input, need_weight, need_bias}, &launch_pool_concat_conv_backward);
}

// pool_concat_conv of pointwise_conv: one launch where there is a kernel for that, else two.
Tensor conv_pool_conv_forward(const Tensor& input, const Tensor& first_weight,
                              const std::optional<Tensor>& first_bias, const Tensor& weight,
                              const std::optional<Tensor>& bias, double slope) {
  constexpr const char* kOp = "conv_pool_conv";
  check_dims(kOp, "input", input, 4);
  if constexpr (kIsCuda) {
    const ConvCall first = make_call(kOp, ConvForm::kPointwise, input, &first_weight, first_bias,
                                     input.size(2), input.size(3), slope);
    ConvPoolConvParams p{};
    const PyramidConvParams& f = first.params;
    p.dtype = f.dtype;
    p.batch = f.batch;
    p.channels = f.channels;
    p.height = f.height;
    p.width = f.width;
    p.map_channels = f.out_channels;
    p.out_height = (p.height + 1) / 2;
    p.out_width = (p.width + 1) / 2;
    p.negative_slope = slope;
    p.input = f.input;
    p.first_weight = f.weight;
    p.first_bias = f.bias;
    check_like(kOp, "weight", weight, input);
    check_shape(kOp, "weight", weight, {weight.size(0), 2 * int64_t{p.map_channels}, 1, 1});
    p.out_channels = extent_of(kOp, "weight", weight, 0);
    const Tensor second = torch::stable::contiguous(weight);
    p.weight = second.const_data_ptr();
    Tensor second_bias;
    if (bias.has_value()) {
      check_bias(kOp, *bias, weight);
      second_bias = torch::stable::contiguous(*bias);
      p.bias = second_bias.const_data_ptr();
    }
    DeviceScope scope(input);
    Tensor output = empty_on(input, {p.batch, p.out_channels, p.out_height, p.out_width},
                             input.scalar_type(), MemoryFormat::ChannelsLast);
    p.output = target_of(kOp, output);
    if (has_conv_pool_conv(p)) {
      check_launch(kOp, launch_conv_pool_conv_forward(p, scope.stream()));
      return output;
    }
  }
  const Tensor map = pointwise_conv_forward(input, first_weight, first_bias, slope, true);
  return pool_concat_conv_forward(map, weight, bias, slope);
}

// --------------------------------------------------------------------------------- resize_add

ResizeAddParams make_resize(const Tensor& input, int64_t height, int64_t width) {
  constexpr const char* kOp = "resize_add";
  check_dims(kOp, "input", input, 4);
  check_size(kOp, input.size(2), input.size(3));
  check_size(kOp, height, width);
  ResizeAddParams p{};
  p.dtype = dtype_of(kOp, "input", input);
  p.batch = input.size(0);
  p.channels = extent_of(kOp, "input", input, 1);
  p.height = extent_of(kOp, "input", input, 2);
  p.width = extent_of(kOp, "input", input, 3);
  p.out_height = static_cast<int>(height);
  p.out_width = static_cast<int>(width);
  return p;
}

Tensor resize_add_forward(const Tensor& input, const Tensor& other) {
  constexpr const char* kOp = "resize_add";
  check_dims(kOp, "other", other, 4);
  check_like(kOp, "other", other, input);
  ResizeAddParams p = make_resize(input, other.size(2), other.size(3));
  check_shape(kOp, "other", other, {p.batch, p.channels, p.out_height, p.out_width});
  DeviceScope scope(input);
  Tensor output = empty_on(other, {p.batch, p.channels, p.out_height, p.out_width},
                           other.scalar_type(), memory_format_of(other));
  p.input = source_of(kOp, "input", input);
  p.other = source_of(kOp, "other", other);
  p.output = target_of(kOp, output);
  check_launch(kOp, launch_resize_add_forward(p, scope.stream()));
  return output;
}

// Of input alone, which has the dtype and device of grad_output; that of other is grad_output.
Tensor resize_add_backward(const Tensor& grad_output, int64_t height, int64_t width) {
  constexpr const char* kOp = "resize_add";
  check_dims(kOp, "grad_output", grad_output, 4);
  check_size(kOp, height, width);
  DeviceScope scope(grad_output);
  Tensor grad_input =
      empty_on(grad_output, {grad_output.size(0), grad_output.size(1), height, width},
               grad_output.scalar_type(), memory_format_of(grad_output));
  ResizeAddParams p = make_resize(grad_input, grad_output.size(2), grad_output.size(3));
  p.grad_output = source_of(kOp, "grad_output", grad_output);
  p.grad_input = target_of(kOp, grad_input);
  check_launch(kOp, launch_resize_add_backward(p, scope.stream()));
  return grad_input;
}

// The convolution of resize_add: one launch, or two on the CPU.
Tensor resize_add_conv_forward(const Tensor& input, const Tensor& other, const Tensor& weight,
                               const std::optional<Tensor>& bias, double slope) {
  constexpr const char* kOp = "resize_add_conv";
  if constexpr (kIsCuda) {
    check_dims(kOp, "other", other, 4);
    check_like(kOp, "other", other, input);
    check_size(kOp, other.size(2), other.size(3));
    ConvCall call = make_call(kOp, ConvForm::kResizeAdd, input, &weight, bias, other.size(2),
                              other.size(3), slope);
    PyramidConvParams& p = call.params;
    check_shape(kOp, "other", other, {p.batch, p.channels, p.out_height, p.out_width});
    p.other = source_of(kOp, "other", other);
    return conv_forward(kOp, call, input, has_channels_last(other),
                        &launch_resize_add_conv_forward);
  } else {
    return pointwise_conv_forward(resize_add_forward(input, other), weight, bias, slope,
                                  has_channels_last(other));
  }
}

}  // namespace

MAFNET_LIBRARY_IMPL(module) {
  module.impl("pointwise_conv_forward", TORCH_BOX(&pointwise_conv_forward));
  module.impl("pointwise_conv_backward", TORCH_BOX(&pointwise_conv_backward));
  module.impl("pool_concat_forward", TORCH_BOX(&pool_concat_forward));
  module.impl("pool_concat_backward", TORCH_BOX(&pool_concat_backward));
  module.impl("pool_concat_conv_forward", TORCH_BOX(&pool_concat_conv_forward));
  module.impl("pool_concat_conv_backward", TORCH_BOX(&pool_concat_conv_backward));
  module.impl("conv_pool_conv_forward", TORCH_BOX(&conv_pool_conv_forward));
  module.impl("resize_conv_forward", TORCH_BOX(&resize_conv_forward));
  module.impl("resize_conv_backward", TORCH_BOX(&resize_conv_backward));
  module.impl("resize_add_forward", TORCH_BOX(&resize_add_forward));
  module.impl("resize_add_backward", TORCH_BOX(&resize_add_backward));
  module.impl("resize_add_conv_forward", TORCH_BOX(&resize_add_conv_forward));
}

}  // namespace mafnet::pyramid_spatial_attention_binding
