// Torch side of pyramid spatial attention: check, allocate, fill params, launch. Images come in any
// strides; results have the layout of the tensor that the docstrings in Python name.
#include <optional>
#include <tuple>

#include "common/backend.h"
#include "pyramid_spatial_attention/params.h"

namespace mafnet {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

Source source_of(const char* op, const char* argument, const Tensor& tensor) {
  check_dims(op, argument, tensor, 4);
  Source source{tensor.const_data_ptr(), dtype_of(op, argument, tensor), {}};
  copy_strides(tensor, source.stride);
  return source;
}

Target target_of(const char* op, Tensor& tensor) {
  Target target{tensor.mutable_data_ptr(), dtype_of(op, "output", tensor), {}};
  copy_strides(tensor, target.stride);
  return target;
}

// A gradient that may not be wanted: of the shape of like, or of no elements.
Tensor grad_like(const Tensor& like, bool wanted) {
  return empty_on(like, {wanted ? like.size(0) : 0, like.size(1), like.size(2), like.size(3)},
                  like.scalar_type(), memory_format_of(like));
}

Tensor grad_weight_like(const Tensor& weight, bool wanted) {
  return empty_on(weight,
                  {wanted ? weight.size(0) : 0, weight.size(1), weight.size(2), weight.size(3)},
                  weight.scalar_type(), MemoryFormat::Contiguous);
}

Tensor grad_bias_like(const Tensor& weight, bool wanted) {
  const int64_t size = wanted ? weight.size(0) : 0;
  return torch::stable::empty({&size, 1}, weight.scalar_type(), std::nullopt, weight.device(),
                              std::nullopt, std::nullopt);
}

void check_like(const char* op, const char* argument, const Tensor& tensor, const Tensor& input) {
  check_same_device(op, argument, tensor, input);
  MAFNET_CHECK(tensor.scalar_type() == input.scalar_type(), op, argument, "the dtype of input",
               torch::headeronly::toString(tensor.scalar_type()));
}

void check_bias(const char* op, const Tensor& bias, const Tensor& weight) {
  check_like(op, "bias", bias, weight);
  MAFNET_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), op, "bias",
               "shape (" + std::to_string(weight.size(0)) + ")", "shape " + shape_of(bias));
}

void check_slope(const char* op, double slope) {
  MAFNET_CHECK(slope >= 0, op, "negative_slope", "at least 0", slope);
}

// What a convolution does to the size of its input.
enum class Form { kPointwise, kPool, kResize };

// Params, and the tensors that own what they point at.
struct ConvCall {
  PyramidConvParams params{};
  Tensor weight, bias;
};

ConvCall make_call(const char* op, Form form, const Tensor& input, const Tensor* weight,
                   const std::optional<Tensor>& bias, int64_t out_height, int64_t out_width,
                   double slope) {
  ConvCall call;
  PyramidConvParams& p = call.params;
  p.input = source_of(op, "input", input);
  p.dtype = p.input.dtype;
  p.batch = input.size(0);
  p.channels = extent_of(op, "input", input, 1);
  p.height = extent_of(op, "input", input, 2);
  p.width = extent_of(op, "input", input, 3);
  MAFNET_CHECK(p.height > 0 && p.width > 0, op, "input", "H and W of at least 1",
               "shape " + shape_of(input));
  p.out_height = form == Form::kPool ? (p.height + 1) / 2 : static_cast<int>(out_height);
  p.out_width = form == Form::kPool ? (p.width + 1) / 2 : static_cast<int>(out_width);
  p.negative_slope = slope;
  check_slope(op, slope);
  const int64_t inputs = form == Form::kPool ? 2 * p.channels : p.channels;
  if (weight == nullptr) {  // pool_concat alone
    p.out_channels = static_cast<int>(inputs);
    return call;
  }
  check_like(op, "weight", *weight, input);
  const int64_t kernel = form == Form::kResize ? 3 : 1;
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

template <typename Pointer>
bool is_flat(const ImageOf<Pointer>& image, int height, int width) {
  return image.data == nullptr || height == 1 || width == 1 ||
         image.stride[2] == width * image.stride[3];
}

template <typename Pointer>
void flatten(ImageOf<Pointer>& image, int width) {
  if (width == 1) image.stride[3] = image.stride[2];
}

// One long row instead of many, where the strides of all images allow that: pixels are on their
// own.
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
  check_launch(op, launch(p, scope.stream()));
  return {grad_input, grad_weight, grad_bias};
}

// -------------------------------------------------------------------------------- convolutions

Tensor pointwise_conv_forward(const Tensor& input, const Tensor& weight,
                              const std::optional<Tensor>& bias, double slope, bool channels_last) {
  constexpr const char* kOp = "pointwise_conv";
  check_dims(kOp, "input", input, 4);
  ConvCall call =
      make_call(kOp, Form::kPointwise, input, &weight, bias, input.size(2), input.size(3), slope);
  return conv_forward(kOp, call, input, channels_last, &launch_pointwise_conv_forward, true);
}

Three pointwise_conv_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                              const Tensor& output, double slope, bool need_input, bool need_weight,
                              bool need_bias) {
  constexpr const char* kOp = "pointwise_conv";
  check_dims(kOp, "input", input, 4);
  ConvCall call = make_call(kOp, Form::kPointwise, input, &weight, std::nullopt, input.size(2),
                            input.size(3), slope);
  return conv_backward(kOp, call, grad_output, input, weight, output,
                       {need_input, need_weight, need_bias}, &launch_pointwise_conv_backward, true);
}

Tensor pool_concat_forward(const Tensor& input) {
  constexpr const char* kOp = "pool_concat";
  ConvCall call = make_call(kOp, Form::kPool, input, nullptr, std::nullopt, 0, 0, 1);
  return conv_forward(kOp, call, input, has_channels_last(input), &launch_pool_concat_forward);
}

Tensor pool_concat_backward(const Tensor& grad_output, const Tensor& input) {
  constexpr const char* kOp = "pool_concat";
  ConvCall call = make_call(kOp, Form::kPool, input, nullptr, std::nullopt, 0, 0, 1);
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

Tensor pool_concat_conv_forward(const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias, double slope) {
  constexpr const char* kOp = "pool_concat_conv";
  ConvCall call = make_call(kOp, Form::kPool, input, &weight, bias, 0, 0, slope);
  return conv_forward(kOp, call, input, has_channels_last(input), &launch_pool_concat_conv_forward);
}

Three pool_concat_conv_backward(const Tensor& grad_output, const Tensor& input,
                                const Tensor& weight, const Tensor& output, double slope,
                                bool need_input, bool need_weight, bool need_bias) {
  constexpr const char* kOp = "pool_concat_conv";
  ConvCall call = make_call(kOp, Form::kPool, input, &weight, std::nullopt, 0, 0, slope);
  return conv_backward(kOp, call, grad_output, input, weight, output,
                       {need_input, need_weight, need_bias}, &launch_pool_concat_conv_backward);
}

void check_size(const char* op, int64_t height, int64_t width) {
  constexpr int64_t kLimit = std::numeric_limits<int>::max() / 2 - 8;
  MAFNET_CHECK(height > 0 && width > 0 && height <= kLimit && width <= kLimit, op, "size",
               "1 to 2^30 rows and columns",
               std::to_string(height) + " x " + std::to_string(width));
}

Tensor resize_conv_forward(const Tensor& input, const Tensor& weight,
                           const std::optional<Tensor>& bias, int64_t height, int64_t width,
                           double slope) {
  constexpr const char* kOp = "resize_conv";
  check_size(kOp, height, width);
  ConvCall call = make_call(kOp, Form::kResize, input, &weight, bias, height, width, slope);
  return conv_forward(kOp, call, input, has_channels_last(input), &launch_resize_conv_forward);
}

Three resize_conv_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                           const Tensor& output, double slope, bool need_input, bool need_weight,
                           bool need_bias) {
  constexpr const char* kOp = "resize_conv";
  check_dims(kOp, "output", output, 4);
  check_size(kOp, output.size(2), output.size(3));
  ConvCall call = make_call(kOp, Form::kResize, input, &weight, std::nullopt, output.size(2),
                            output.size(3), slope);
  return conv_backward(kOp, call, grad_output, input, weight, output,
                       {need_input, need_weight, need_bias}, &launch_resize_conv_backward);
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

// ------------------------------------------------------------------------------- spatial_gate

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
  check_launch(kOp, launch_spatial_gate_backward(p, scope.stream()));
  return {grad_input, grad_mask, grad_weight, grad_bias};
}

}  // namespace

MAFNET_LIBRARY_IMPL(module) {
  module.impl("pointwise_conv_forward", TORCH_BOX(&pointwise_conv_forward));
  module.impl("pointwise_conv_backward", TORCH_BOX(&pointwise_conv_backward));
  module.impl("pool_concat_forward", TORCH_BOX(&pool_concat_forward));
  module.impl("pool_concat_backward", TORCH_BOX(&pool_concat_backward));
  module.impl("pool_concat_conv_forward", TORCH_BOX(&pool_concat_conv_forward));
  module.impl("pool_concat_conv_backward", TORCH_BOX(&pool_concat_conv_backward));
  module.impl("resize_conv_forward", TORCH_BOX(&resize_conv_forward));
  module.impl("resize_conv_backward", TORCH_BOX(&resize_conv_backward));
  module.impl("resize_add_forward", TORCH_BOX(&resize_add_forward));
  module.impl("resize_add_backward", TORCH_BOX(&resize_add_backward));
  module.impl("spatial_gate_forward", TORCH_BOX(&spatial_gate_forward));
  module.impl("spatial_gate_backward", TORCH_BOX(&spatial_gate_backward));
}

}  // namespace mafnet
