// pointwise_conv, pool_concat_conv (1 x 1 and 3 x 3), resize_conv and resize_add_conv forward: one
// launch each. Per output pixel what it is made of is read once from DRAM, and nothing is written
// but the output.
#include "pyramid_spatial_attention/convolution.cuh"

namespace mafnet {
namespace {

template <typename T>
Product<T> product_of(const PyramidConvParams& p, ConvForm form) {
  const int parts = form == ConvForm::kPool || form == ConvForm::kPoolKernel ? 2 : 1;
  const int taps = form == ConvForm::kResize || form == ConvForm::kPoolKernel ? 9 : 1;
  const int64_t part = int64_t{taps} * p.channels;  // the taps of a channel lie side by side
  return {static_cast<const T*>(p.weight),
          parts * part,
          1,
          part,
          taps,
          p.out_channels,
          p.channels,
          taps,
          p.batch * p.out_height * p.out_width,
          p.out_height,
          p.out_width};
}

template <typename T>
int launch_form(const PyramidConvParams& p, ConvForm form, void* stream) {
  const Product<T> product = product_of<T>(p, form);
  const Activate<T, T> epilogue{view_of<T, kOwn>(p.output, p.out_channels),
                                static_cast<const T*>(p.bias), p.negative_slope};
  const auto image = view_of<const T, kOwn>(p.input, p.channels);
  const Pooled<T> pooled{image, p.height, p.width};
  if (form == ConvForm::kPool) return launch_product(product, pooled, epilogue, stream);
  if (form == ConvForm::kPoolKernel) {
    const PooledMap<T> features{pooled, p.out_height, p.out_width};
    return launch_product(product, features, epilogue, stream);
  }
  const Resized<T> resized{image, p.height, p.width, p.out_height, p.out_width, product.taps};
  if (form == ConvForm::kResizeAdd) {
    const auto other = view_of<const T, kOwn>(p.other, p.channels);
    return launch_product(product, ResizedSum<T>{resized, other}, epilogue, stream);
  }
  if (p.height == p.out_height && p.width == p.out_width) {
    return launch_product(product, Pixels<T>{image, p.height, p.width, product.taps}, epilogue,
                          stream);
  }
  return launch_product(product, resized, epilogue, stream);
}

int launch_forward(const PyramidConvParams& p, ConvForm form, void* stream) {
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    return launch_form<typename decltype(type)::type>(p, form, stream);
  });
}

}  // namespace

int launch_pointwise_conv_forward(const PyramidConvParams& p, void* stream) {
  return launch_forward(p, ConvForm::kPointwise, stream);
}

int launch_pool_concat_conv_forward(const PyramidConvParams& p, void* stream) {
  return launch_forward(p, ConvForm::kPool, stream);
}

int launch_pool_concat_conv_3x3_forward(const PyramidConvParams& p, void* stream) {
  return launch_forward(p, ConvForm::kPoolKernel, stream);
}

int launch_resize_conv_forward(const PyramidConvParams& p, void* stream) {
  return launch_forward(p, ConvForm::kResize, stream);
}

int launch_resize_add_conv_forward(const PyramidConvParams& p, void* stream) {
  return launch_forward(p, ConvForm::kResizeAdd, stream);
}

}  // namespace mafnet
