// resize_add: output = input resized bilinearly + other; a thread owns a group of channels of one
// output pixel. Per output element one read of other and one write, and the input once from DRAM:
// the corners of neighbours overlap in L1.
//
// Backward is the transpose, gathered: a thread owns a group of an input pixel and visits the
// outputs that are made of it, in raster order.
#include "pyramid_spatial_attention/features.cuh"
#include "pyramid_spatial_attention/passes.h"

namespace mafnet {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    resize_add_forward_kernel(const ResizedSum<T> features, const View<T> output, int64_t pixels,
                              int height, int width, bool channels_last) {
  using A = Accumulator<T>;
  constexpr int N = kGroup<T>;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= pixels * ((output.channels + N - 1) / N)) return;
  const Item item = item_of<N>(index, pixels, output.channels, channels_last);
  const Place place = place_of(item.pixel, height, width);
  A values[1][N];
  features.load(place, 0, item.c, values);
  write_group(output, place, item.c, values[0]);
}

// Outputs first ... last may be made of input i. Positions are worked out in A, so that one may lie
// beside where it should: in float by a millionth of the size.
struct Uses {
  int first, last;
};

template <typename A>
DEVICE Uses uses_of(int i, int outputs, A scale) {
  const A slack = A(1) + static_cast<A>(outputs >> 20);
  const A low = (static_cast<A>(i) - A(0.5)) / scale - slack;
  const A high = (static_cast<A>(i) + A(1.5)) / scale + slack;
  const A end = static_cast<A>(outputs - 1);
  return {static_cast<int>(min(max(low, A(0)), end)),
          min(static_cast<int>(min(high, end)), outputs - 1)};
}

// The weight of input i in an output.
template <typename A>
DEVICE A weight_in(const Blend<A>& blend, int i) {
  return i == blend.low ? blend.weight[0] : i == blend.low + 1 ? blend.weight[1] : A(0);
}

// G is the type of the gradients: T, or accumulators in workspace.
template <typename T, typename G>
__global__ void __launch_bounds__(kThreads)
    resize_add_backward_kernel(const View<const G> grad_output, const View<T> grad_input,
                               int64_t pixels, int height, int width, int out_height, int out_width,
                               bool channels_last) {
  using A = Accumulator<T>;
  constexpr int N = kGroup<T>;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= pixels * ((grad_input.channels + N - 1) / N)) return;
  const Item item = item_of<N>(index, pixels, grad_input.channels, channels_last);
  const Place place = place_of(item.pixel, height, width);
  const A scale_y = static_cast<A>(height) / static_cast<A>(out_height);
  const A scale_x = static_cast<A>(width) / static_cast<A>(out_width);
  const Uses rows = uses_of(place.y, out_height, scale_y);
  const Uses columns = uses_of(place.x, out_width, scale_x);
  A sums[N] = {};
  for (int y = rows.first; y <= rows.last; ++y) {
    const A weight_y = weight_in(blend_of(y, height, scale_y), place.y);
    if (weight_y == 0) continue;
    for (int x = columns.first; x <= columns.last; ++x) {
      const A weight = weight_y * weight_in(blend_of(x, width, scale_x), place.x);
      if (weight == 0) continue;
      A some[N];
      read_group(grad_output, {place.n, y, x}, item.c, some);
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] += weight * some[i];
    }
  }
  write_group(grad_input, place, item.c, sums);
}

template <typename T, typename G>
int launch_transpose(const ResizeAddParams& p, void* stream) {
  constexpr int N = kGroup<T>;
  const int64_t pixels = p.batch * p.height * p.width;
  return launch_items(resize_add_backward_kernel<T, G>, item_count<N>(pixels, p.channels), stream,
                      view_of<const G, N>(p.grad_output, p.channels),
                      view_of<T, N>(p.grad_input, p.channels), pixels, p.height, p.width,
                      p.out_height, p.out_width, p.grad_input.stride[1] == 1);
}

}  // namespace

int launch_resize_add_forward(const ResizeAddParams& p, void* stream) {
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int N = kGroup<T>;
    const int64_t pixels = p.batch * p.out_height * p.out_width;
    const Resized<T> resized{
        view_of<const T, N>(p.input, p.channels), p.height, p.width, p.out_height, p.out_width, 1};
    const ResizedSum<T> features{resized, view_of<const T, N>(p.other, p.channels)};
    return launch_items(resize_add_forward_kernel<T>, item_count<N>(pixels, p.channels), stream,
                        features, view_of<T, N>(p.output, p.channels), pixels, p.out_height,
                        p.out_width, p.output.stride[1] == 1);
  });
}

int launch_resize_add_backward(const ResizeAddParams& p, void* stream) {
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_transpose<T, T>(p, stream);
  });
}

int launch_resize_accumulators(const ResizeAddParams& p, void* stream) {
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_transpose<T, Accumulator<T>>(p, stream);
  });
}

}  // namespace mafnet
