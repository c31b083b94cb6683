// pointwise_conv, pool_concat_conv and resize_conv backward. The gradient of what the activation
// got is worked out wherever it is read.
//
// grad_input: the transposed convolution, which for pool_concat_conv and for resize_conv between
// two sizes goes to workspace and from there through the transpose of pooling or resizing.
// grad_weight and grad_bias: weight_gradient.cuh. Pooled and resized features are made again.
#include "pyramid_spatial_attention/passes.h"
#include "pyramid_spatial_attention/weight_gradient.cuh"

namespace mafnet {
namespace {

int slots_of(ConvForm form) {
  return form == ConvForm::kResize ? 9 : form == ConvForm::kPool ? 2 : 1;
}

bool is_same_size(const PyramidConvParams& p) {
  return p.height == p.out_height && p.width == p.out_width;
}

int64_t pixels_of(const PyramidConvParams& p) { return p.batch * p.out_height * p.out_width; }

WeightSums weight_sums(const PyramidConvParams& p, ConvForm form) {
  const int slots = slots_of(form);
  const bool is_kernel = form == ConvForm::kResize;
  return {p.grad_weight,
          p.grad_bias,
          int64_t{slots} * p.channels,
          is_kernel ? 1 : p.channels,
          is_kernel ? 9 : 1,
          p.out_channels,
          p.channels,
          slots,
          pixels_of(p),
          p.out_height,
          p.out_width};
}

// Of the map that the transposed convolution makes.
int map_channels(const PyramidConvParams& p, ConvForm form) {
  return form == ConvForm::kPool ? 2 * p.channels : p.channels;
}

bool needs_map(const PyramidConvParams& p, ConvForm form) {
  return p.grad_input.data != nullptr && (form == ConvForm::kPool || !is_same_size(p));
}

// The weight with outputs and channels exchanged, and of 3 x 3 taps the opposite one.
template <typename T>
Product<T> transposed(const PyramidConvParams& p, ConvForm form) {
  const auto* weight = static_cast<const T*>(p.weight);
  const bool is_kernel = form == ConvForm::kResize;
  const int inputs = map_channels(p, form);
  return {is_kernel ? weight + 8 : weight,
          is_kernel ? 9 : 1,
          -1,
          0,
          int64_t{is_kernel ? 9 : 1} * inputs,
          inputs,
          p.out_channels,
          is_kernel ? 9 : 1,
          pixels_of(p),
          p.out_height,
          p.out_width};
}

// From the map in workspace to grad_input.
int launch_transpose(const PyramidConvParams& p, ConvForm form, void* map, void* stream) {
  const int64_t channels = map_channels(p, form), row = p.out_width * channels;
  const Source gradients{map, p.dtype, {p.out_height * row, 1, row, channels}};
  if (form == ConvForm::kPool) return launch_unpool_accumulators(p, gradients, stream);
  ResizeAddParams resize{};
  resize.dtype = p.dtype;
  resize.batch = p.batch;
  resize.channels = p.channels;
  resize.height = p.height;
  resize.width = p.width;
  resize.out_height = p.out_height;
  resize.out_width = p.out_width;
  resize.grad_output = gradients;
  resize.grad_input = p.grad_input;
  return launch_resize_accumulators(resize, stream);
}

template <typename T>
Slopes<T> slopes_of(const PyramidConvParams& p, int taps) {
  return {view_of<const T, kOwn>(p.grad_output, p.out_channels),
          view_of<const T, kOwn>(p.output, p.out_channels),
          p.out_height,
          p.out_width,
          taps,
          p.negative_slope};
}

template <typename T>
int launch_grad_input(const PyramidConvParams& p, ConvForm form, Accumulator<T>* map,
                      void* stream) {
  using A = Accumulator<T>;
  const Product<T> product = transposed<T>(p, form);
  const Slopes<T> gradients = slopes_of<T>(p, product.taps);
  if (!needs_map(p, form)) {
    const Activate<T, T> epilogue{view_of<T, kOwn>(p.grad_input, p.channels), nullptr, 1};
    return launch_product(product, gradients, epilogue, stream);
  }
  const auto view = view_of_rows<A, kOwn>(map, p.out_height, p.out_width, map_channels(p, form));
  const Activate<T, A> epilogue{view, nullptr, 1};
  const int status = launch_product(product, gradients, epilogue, stream);
  if (status != 0) return status;
  return launch_transpose(p, form, map, stream);
}

template <typename T>
int launch_grad_weight(const PyramidConvParams& p, ConvForm form, void* workspace, void* stream) {
  const WeightSums sums = weight_sums(p, form);
  const Slopes<T> gradients = slopes_of<T>(p, 1);
  const auto image = view_of<const T, kOwn>(p.input, p.channels);
  if (form == ConvForm::kPool) {
    const Pooled<T> features{image, p.height, p.width};
    return launch_weight_gradient<T>(sums, features, gradients, workspace, stream);
  }
  const int taps = slots_of(form);
  if (is_same_size(p)) {
    const Pixels<T> features{image, p.height, p.width, taps};
    return launch_weight_gradient<T>(sums, features, gradients, workspace, stream);
  }
  const Resized<T> features{image, p.height, p.width, p.out_height, p.out_width, taps};
  return launch_weight_gradient<T>(sums, features, gradients, workspace, stream);
}

int launch_backward(const PyramidConvParams& p, ConvForm form, void* stream) {
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    auto* workspace = static_cast<Accumulator<T>*>(p.workspace);
    const int status = launch_grad_weight<T>(p, form, workspace, stream);
    if (status != 0 || p.grad_input.data == nullptr) return status;
    auto* map = workspace + partial_elements(weight_sums(p, form));
    return launch_grad_input<T>(p, form, map, stream);
  });
}

}  // namespace

int64_t pyramid_conv_workspace(const PyramidConvParams& p, ConvForm form) {
  const int64_t map = needs_map(p, form) ? pixels_of(p) * map_channels(p, form) : 0;
  const int64_t size = p.dtype == Dtype::kFloat64 ? sizeof(double) : sizeof(float);
  return (partial_elements(weight_sums(p, form)) + map) * size;
}

int launch_pointwise_conv_backward(const PyramidConvParams& p, void* stream) {
  return launch_backward(p, ConvForm::kPointwise, stream);
}

int launch_pool_concat_conv_backward(const PyramidConvParams& p, void* stream) {
  return launch_backward(p, ConvForm::kPool, stream);
}

int launch_resize_conv_backward(const PyramidConvParams& p, void* stream) {
  return launch_backward(p, ConvForm::kResize, stream);
}

}  // namespace mafnet
