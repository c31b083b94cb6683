// pool_concat: a thread owns a group of channels of one pixel. Forward reads the 3 x 3 pixels
// around its output, of which neighbours' come from L1; per output pixel four input pixels are read
// from DRAM and two written.
//
// Backward gathers: an input pixel lies in one window or two along either axis. Each is pooled
// again to see whether this pixel won its maximum: the first of the largest, or the last NaN.
// Nothing is kept from forward, no sum depends on the order of threads.
#include "pyramid_spatial_attention/features.cuh"
#include "pyramid_spatial_attention/passes.h"

namespace mafnet {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pool_concat_forward_kernel(const Pooled<T> features, const View<T> maxima, const View<T> means,
                               int64_t pixels, int height, int width, bool channels_last) {
  using A = Accumulator<T>;
  constexpr int N = kGroup<T>;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= pixels * ((maxima.channels + N - 1) / N)) return;
  const Item item = item_of<N>(index, pixels, maxima.channels, channels_last);
  const Place place = place_of(item.pixel, height, width);
  A values[2][N];
  features.load(place, 0, item.c, values);
  write_group(maxima, place, item.c, values[0]);
  write_group(means, place, item.c, values[1]);
}

// The place of the winner among the taps of window (y, x), per channel: its row and column in the
// window, 3 * row + column.
template <typename T, int N>
DEVICE void find_winners(const Pooled<T>& features, const Place& window, int c, int (&winner)[N]) {
  using A = Accumulator<T>;
  A best[N];
#pragma unroll
  for (int i = 0; i < N; ++i) winner[i] = -1;
#pragma unroll 1
  for (int row = 0; row < 3; ++row) {
#pragma unroll
    for (int column = 0; column < 3; ++column) {
      const Place from{window.n, 2 * window.y + row - 1, 2 * window.x + column - 1};
      if (!is_inside(from, features.height, features.width)) continue;
      A some[N];
      read_group(features.image, from, c, some);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool wins = winner[i] < 0 || some[i] > best[i] || some[i] != some[i];
        winner[i] = wins ? 3 * row + column : winner[i];
        best[i] = wins ? some[i] : best[i];
      }
    }
  }
}

// G is the type of the gradients: T, or accumulators in workspace.
template <typename T, typename G>
__global__ void __launch_bounds__(kThreads)
    pool_concat_backward_kernel(const Pooled<T> features, const View<const G> maxima,
                                const View<const G> means, const View<T> grad_input, int64_t pixels,
                                int out_height, int out_width, bool channels_last) {
  using A = Accumulator<T>;
  constexpr int N = kGroup<T>;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= pixels * ((grad_input.channels + N - 1) / N)) return;
  const Item item = item_of<N>(index, pixels, grad_input.channels, channels_last);
  const Place place = place_of(item.pixel, features.height, features.width);
  A sums[N] = {};
  for (int y = place.y / 2; y <= min((place.y + 1) / 2, out_height - 1); ++y) {
    for (int x = place.x / 2; x <= min((place.x + 1) / 2, out_width - 1); ++x) {
      const Place window{place.n, y, x};
      const int tap = 3 * (place.y - 2 * y + 1) + place.x - 2 * x + 1;
      int winner[N];
      find_winners(features, window, item.c, winner);
      A of_maximum[N], of_mean[N];
      read_group(maxima, window, item.c, of_maximum);
      read_group(means, window, item.c, of_mean);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sums[i] += of_mean[i] / 9 + (winner[i] == tap ? of_maximum[i] : A(0));
      }
    }
  }
  write_group(grad_input, place, item.c, sums);
}

template <typename T>
Pooled<T> pooled_of(const PyramidConvParams& p) {
  return {view_of<const T, kGroup<T>>(p.input, p.channels), p.height, p.width};
}

// One half of an image with twice the channels of the input.
template <typename T, int N, typename Pointer>
View<T> half_of(ImageOf<Pointer> image, int channels, int half) {
  auto* data = static_cast<T*>(image.data) + half * channels * image.stride[1];
  image.data = data;
  return view_of<T, N>(image, channels);
}

template <typename T, typename G>
int launch_unpool(const PyramidConvParams& p, const Source& gradients, void* stream) {
  constexpr int N = kGroup<T>;
  const int64_t pixels = p.batch * p.height * p.width;
  return launch_items(pool_concat_backward_kernel<T, G>, item_count<N>(pixels, p.channels), stream,
                      pooled_of<T>(p), half_of<const G, N>(gradients, p.channels, 0),
                      half_of<const G, N>(gradients, p.channels, 1),
                      view_of<T, N>(p.grad_input, p.channels), pixels, p.out_height, p.out_width,
                      p.grad_input.stride[1] == 1);
}

}  // namespace

int launch_pool_concat_forward(const PyramidConvParams& p, void* stream) {
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int N = kGroup<T>;
    const int64_t pixels = p.batch * p.out_height * p.out_width;
    return launch_items(pool_concat_forward_kernel<T>, item_count<N>(pixels, p.channels), stream,
                        pooled_of<T>(p), half_of<T, N>(p.output, p.channels, 0),
                        half_of<T, N>(p.output, p.channels, 1), pixels, p.out_height, p.out_width,
                        p.output.stride[1] == 1);
  });
}

int launch_pool_concat_backward(const PyramidConvParams& p, void* stream) {
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_unpool<T, T>(p, p.grad_output, stream);
  });
}

int launch_unpool_accumulators(const PyramidConvParams& p, const Source& gradients, void* stream) {
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_unpool<T, Accumulator<T>>(p, gradients, stream);
  });
}

}  // namespace mafnet
