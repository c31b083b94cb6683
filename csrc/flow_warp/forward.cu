// flow_warp forward: output(n, c, p) = sum_j sum_k wy[j] wx[k] input(n, c, iy[j], ix[k]), the taps
// taken at p + flow(n, p).
//
// channels_last: a warp owns 32 pixels. Each lane works out the taps of one; then the warp walks
// over pairs of a pixel and 16 bytes of its channels, neighbouring lanes taking what lies side by
// side, and gets the taps by shuffles from the lane that has them. So a tap is read in whole
// sectors, and its position is computed once and not once per 16 bytes, which would cost more than
// the reads. planar: one thread owns one pixel and walks its channels, four at a time so that their
// loads are in flight together; neighbouring lanes take neighbouring x. It takes any strides:
// double, and channels that do not fill vectors of 16 bytes, go there too. Per output element: one
// write, and one read from DRAM where the flow is smooth (the taps of neighbours overlap in L1 and
// L2); the flow is read once per pixel.
#include <type_traits>

#include "flow_warp/footprint.cuh"

namespace mafnet {
namespace {

// Channels whose loads are in flight together; one where a stencil of 16 taps fills the registers.
template <Interpolation I>
constexpr int kPlanarChannels = I == Interpolation::kBicubic ? 1 : 4;

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
  constexpr int U = kPlanarChannels<I>;
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pixel >= pixel_count(p)) return;
  const Footprint<I, A> f = make_footprint<T, I>(p, pixel);
  write_mask<T, I>(p, f, pixel);

  const T* image = static_cast<const T*>(p.input) + f.n * p.input_stride[0];
  T* output = static_cast<T*>(p.output) + f.n * p.output_stride[0] + f.y * p.output_stride[2] +
              f.x * p.output_stride[3];
  for (int64_t first = 0; first < p.channels; first += U) {
    A sum[U] = {};
#pragma unroll
    for (int j = 0; j < K; ++j) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int row = f.rows.index[j], column = f.columns.index[k];
        const A w = f.rows.weight[j] * f.columns.weight[k];
        const bool used = row >= 0 && column >= 0 && w != 0;
        const T* tap = image + row * p.input_stride[2] + column * p.input_stride[3];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int64_t c = first + u;
          const A value =
              used && c < p.channels ? to_accumulator(tap[c * p.input_stride[1]]) : A(0);
          sum[u] += w * value;
        }
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t c = first + u;
      if (c < p.channels) output[c * p.output_stride[1]] = from_accumulator<T>(sum[u]);
    }
  }
}

template <typename T, Interpolation I>
__global__ void __launch_bounds__(kThreads)
    flow_warp_forward_channels_last_kernel(const FlowWarpParams p) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  constexpr int K = kTapsPerAxis<I>;
  const int64_t pixels = pixel_count(p);
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t first = pixel - lane;
  const Footprint<I, A> mine = make_footprint<T, I>(p, pixel < pixels ? pixel : pixels - 1);
  if (pixel < pixels) write_mask<T, I>(p, mine, pixel);

  const int64_t my_image = mine.n * p.input_stride[0];
  const int chunks = static_cast<int>(p.channels / V);
  int owner = lane / chunks, chunk = lane % chunks;  // whose pixel, and which of its channels
  const int owner_step = kWarp / chunks, chunk_step = kWarp % chunks;
  for (int i = 0; i < chunks; ++i) {  // all lanes alike: the shuffles need them
    int row[K], column[K];
    A wy[K], wx[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      row[k] = __shfl_sync(kAllLanes, mine.rows.index[k], owner);
      column[k] = __shfl_sync(kAllLanes, mine.columns.index[k], owner);
      wy[k] = __shfl_sync(kAllLanes, mine.rows.weight[k], owner);
      wx[k] = __shfl_sync(kAllLanes, mine.columns.weight[k], owner);
    }
    const int64_t image = __shfl_sync(kAllLanes, my_image, owner);
    if (first + owner < pixels) {
      const T* base = static_cast<const T*>(p.input) + image + chunk * V;
      A sum[V] = {};
#pragma unroll
      for (int j = 0; j < K; ++j) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const A w = wy[j] * wx[k];
          Vector<T, V> values = {};
          if (row[j] >= 0 && column[k] >= 0 && w != 0) {
            values = load_vector<T, V>(base + row[j] * p.input_stride[2] +
                                       column[k] * p.input_stride[3]);
          }
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += w * to_accumulator(values.at[v]);
        }
      }
      Vector<T, V> result;
#pragma unroll
      for (int v = 0; v < V; ++v) result.at[v] = from_accumulator<T>(sum[v]);
      store_vector(static_cast<T*>(p.output) + (first + owner) * p.channels + chunk * V, result);
    }
    owner += owner_step;
    chunk += chunk_step;
    if (chunk >= chunks) {
      chunk -= chunks;
      ++owner;
    }
  }
}

template <typename T, Interpolation I>
int launch_typed(const FlowWarpParams& p, void* stream) {
  const int64_t pixels = pixel_count(p);
  if constexpr (!std::is_same_v<T, double>) {
    if (p.channels_last && is_aligned<T>(p, p.input, p.input_stride) &&
        is_aligned<T>(p, p.output, p.output_stride)) {
      return launch_items(flow_warp_forward_channels_last_kernel<T, I>, pixels, p, stream);
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
