// flow_warp forward: output(n, c, p) = sum_j sum_k wy[j] wx[k] input(n, c, iy[j], ix[k]), the taps
// taken at p + flow(n, p).
//
// channels_last: one thread owns V = 16 bytes of channels of one pixel; neighbouring lanes take
// neighbouring channels, so a tap is read in whole sectors. planar: one thread owns one pixel and
// walks the channels; neighbouring lanes take neighbouring x. It takes any strides: double, and
// channels that do not fill vectors of 16 bytes, go there too. Either way a thread works its own
// taps out, which is cheaper than sharing them. Per output element: one write, and one read from
// DRAM where the flow is smooth (the taps of neighbours overlap in L1 and L2); the flow is read
// once per thread.
#include <type_traits>

#include "flow_warp/footprint.cuh"

namespace mafnet {
namespace {

template <Interpolation I, typename A>
DEVICE bool inside(const FlowWarpParams& p, const Footprint<I, A>& f) {
  return f.position_x >= 0 && f.position_x <= p.width - 1 && f.position_y >= 0 &&
         f.position_y <= p.height - 1;
}

template <typename T, Interpolation I>
DEVICE void write_mask(const FlowWarpParams& p, const Footprint<I, Accumulator<T>>& f,
                       int64_t pixel) {
  using A = Accumulator<T>;
  if (p.mask != nullptr) {
    static_cast<T*>(p.mask)[pixel] = from_accumulator<T>(inside(p, f) ? A(1) : A(0));
  }
}

template <typename T, Interpolation I>
__global__ void __launch_bounds__(kThreads)
    flow_warp_forward_planar_kernel(const FlowWarpParams p) {
  using A = Accumulator<T>;
  constexpr int K = kTapsPerAxis<I>;
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pixel >= pixel_count(p)) return;
  const Footprint<I, A> f = make_footprint<T, I>(p, pixel);
  write_mask<T, I>(p, f, pixel);

  const T* image = static_cast<const T*>(p.input) + f.n * p.input_stride[0];
  T* output = static_cast<T*>(p.output) + f.n * p.output_stride[0] + f.y * p.output_stride[2] +
              f.x * p.output_stride[3];
  for (int64_t c = 0; c < p.channels; ++c) {
    const T* plane = image + c * p.input_stride[1];
    A sum = 0;
#pragma unroll
    for (int j = 0; j < K; ++j) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int row = f.rows.index[j], column = f.columns.index[k];
        const A w = f.rows.weight[j] * f.columns.weight[k];
        A value = 0;
        if (row >= 0 && column >= 0 && w != 0) {
          value = to_accumulator(plane[row * p.input_stride[2] + column * p.input_stride[3]]);
        }
        sum += w * value;
      }
    }
    output[c * p.output_stride[1]] = from_accumulator<T>(sum);
  }
}

template <typename T, Interpolation I>
__global__ void __launch_bounds__(kThreads)
    flow_warp_forward_channels_last_kernel(const FlowWarpParams p) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  constexpr int K = kTapsPerAxis<I>;
  const int64_t chunks = p.channels / V;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t pixel = item / chunks;
  if (pixel >= pixel_count(p)) return;
  const int64_t chunk = item - pixel * chunks;
  const Footprint<I, A> f = make_footprint<T, I>(p, pixel);
  if (chunk == 0) write_mask<T, I>(p, f, pixel);

  const T* image = static_cast<const T*>(p.input) + f.n * p.input_stride[0] + chunk * V;
  A sum[V] = {};
#pragma unroll
  for (int j = 0; j < K; ++j) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int row = f.rows.index[j], column = f.columns.index[k];
      const A w = f.rows.weight[j] * f.columns.weight[k];
      Vector<T, V> values = {};
      if (row >= 0 && column >= 0 && w != 0) {
        values = *reinterpret_cast<const Vector<T, V>*>(image + row * p.input_stride[2] +
                                                        column * p.input_stride[3]);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += w * to_accumulator(values.at[v]);
    }
  }
  T* output = static_cast<T*>(p.output) + f.n * p.output_stride[0] + f.y * p.output_stride[2] +
              f.x * p.output_stride[3] + chunk * V;
  Vector<T, V> result;
#pragma unroll
  for (int v = 0; v < V; ++v) result.at[v] = from_accumulator<T>(sum[v]);
  *reinterpret_cast<Vector<T, V>*>(output) = result;
}

template <typename T, Interpolation I>
int launch_typed(const FlowWarpParams& p, void* stream) {
  const int64_t pixels = pixel_count(p);
  if constexpr (!std::is_same_v<T, double>) {
    if (p.channels_last && is_aligned<T>(p, p.input, p.input_stride) &&
        is_aligned<T>(p, p.output, p.output_stride)) {
      return launch_items(flow_warp_forward_channels_last_kernel<T, I>,
                          pixels * (p.channels / kVector<T>), p, stream);
    }
  }
  return launch_items(flow_warp_forward_planar_kernel<T, I>, pixels, p, stream);
}

}  // namespace

int launch_flow_warp_forward(const FlowWarpParams& p, void* stream) {
  if (pixel_count(p) == 0) return 0;
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    return dispatch_interpolation(p.interpolation, [&](auto interpolation) {
      return launch_typed<typename decltype(type)::type, decltype(interpolation)::value>(p, stream);
    });
  });
}

}  // namespace mafnet
