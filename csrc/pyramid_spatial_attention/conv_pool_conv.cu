// conv_pool_conv forward: one launch, where tensor_core_pool.cuh has a kernel for it. Per pixel the
// input is read once from DRAM, and nothing is written but the output.
#include "pyramid_spatial_attention/tensor_core_pool.cuh"

namespace mafnet {
namespace {

template <typename T>
Product<T> first_product(const ConvPoolConvParams& p) {
  const int64_t pixels = p.batch * p.height * p.width;
  return {static_cast<const T*>(p.first_weight),
          p.channels,
          0,
          0,
          1,
          p.map_channels,
          p.channels,
          1,
          pixels,
          p.height,
          p.width};
}

template <typename T>
Product<T> second_product(const ConvPoolConvParams& p) {
  const int64_t pixels = p.batch * p.out_height * p.out_width;
  const int channels = p.map_channels;
  return {static_cast<const T*>(p.weight),
          2 * channels,
          0,
          channels,
          1,
          p.out_channels,
          channels,
          1,
          pixels,
          p.out_height,
          p.out_width};
}

// body(input, first product, second product, epilogue) of half precision, else `otherwise`.
template <typename Result, typename Body>
Result dispatch_half(const ConvPoolConvParams& p, Result otherwise, const Body& body) {
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) -> Result {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      const Pixels<T> input{view_of<const T, kOwn>(p.input, p.channels), p.height, p.width, 1};
      const Activate<T, T> epilogue{view_of<T, kOwn>(p.output, p.out_channels),
                                    static_cast<const T*>(p.bias), p.negative_slope};
      return body(input, first_product<T>(p), second_product<T>(p), epilogue);
    } else {
      return otherwise;
    }
  });
}

}  // namespace

// Outputs have no gaps: where they are aligned their number is a multiple of 8, too.
bool has_conv_pool_conv(const ConvPoolConvParams& p) {
  return dispatch_half(
      p, false,
      [&](const auto& input, const auto& first, const auto& second, const auto& epilogue) {
        return suits_tensor_cores(first, input, epilogue) && first.channels <= kTile &&
               second.channels <= kTile && second.outputs <= kTile;
      });
}

int launch_conv_pool_conv_forward(const ConvPoolConvParams& p, void* stream) {
  constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue
  return dispatch_half(
      p, kInvalidValue,
      [&](const auto& input, const auto& first, const auto& second, const auto& epilogue) {
        const auto* bias = static_cast<decltype(first.weight)>(p.first_bias);
        return launch_conv_pool_conv(first, bias, static_cast<float>(p.negative_slope), input,
                                     second, epilogue, stream);
      });
}

}  // namespace mafnet
