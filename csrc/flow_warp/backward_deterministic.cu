// grad_input of flow_warp with sums in a fixed order, for torch.use_deterministic_algorithms.
//
// flow_warp_backward_taps_kernel writes down, for every tap of every output pixel, the number of
// the input pixel that it reads. The caller sorts these numbers, stably, so that the taps of one
// input pixel lie side by side, in the order of their output pixels. In
// flow_warp_backward_gather_kernel a thread owns a few channels of one input pixel, finds its taps
// by bisection and adds them up: grad_input(q) = sum of wy wx grad_output(p) over the taps of q.
//
// The weights are worked out again, which is cheaper than carrying them through the sort. Memory:
// 16 bytes a tap, whatever the channels. A flow that sends everything to one pixel makes one thread
// add everything: right, and slow.
#include <type_traits>

#include "flow_warp/footprint.cuh"

namespace mafnet {
namespace {

constexpr int kPlanarChannels = 8;  // a thread's channels where they are not side by side

template <typename T, Interpolation I>
__global__ void __launch_bounds__(kThreads) flow_warp_backward_taps_kernel(const FlowWarpParams p) {
  constexpr int K = kTapsPerAxis<I>;
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pixel >= pixel_count(p)) return;
  const Footprint<I, Accumulator<T>> f = make_footprint<T, I>(p, pixel);
  const int64_t nowhere = static_cast<int64_t>(p.height) * p.width;
#pragma unroll
  for (int j = 0; j < K; ++j) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int row = f.rows.index[j], column = f.columns.index[k];
      const bool used = row >= 0 && column >= 0 && f.rows.weight[j] * f.columns.weight[k] != 0;
      p.taps[(pixel * K + j) * K + k] =
          used ? static_cast<int64_t>(row) * p.width + column : nowhere;
    }
  }
}

// The first of count ascending numbers that is not below value.
DEVICE int64_t lower_bound(const int64_t* numbers, int64_t count, int64_t value) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (numbers[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename T, Interpolation I, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    flow_warp_backward_gather_kernel(const FlowWarpParams p) {
  using A = Accumulator<T>;
  constexpr int K = kTapsPerAxis<I>;
  constexpr int V = kPacked ? kVector<T> : kPlanarChannels;
  const int64_t pixels = static_cast<int64_t>(p.height) * p.width;
  const int64_t chunks = (p.channels + V - 1) / V;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t n = item / (pixels * chunks), rest = item - n * pixels * chunks;
  if (n >= p.batch) return;
  // Neighbouring lanes take what lies side by side in memory: channels, or pixels.
  const int64_t pixel = kPacked ? rest / chunks : rest % pixels;
  const int64_t c = V * (kPacked ? rest % chunks : rest / pixels);

  const int64_t out_pixels = static_cast<int64_t>(p.out_height) * p.out_width;
  const int64_t count = out_pixels * K * K;
  const int64_t* sorted = p.sorted_taps + n * count;
  const int64_t* order = p.tap_order + n * count;
  const T* grad_output = static_cast<const T*>(p.grad_output) + n * p.grad_output_stride[0] +
                         c * p.grad_output_stride[1];
  A sum[V] = {};
  for (int64_t i = lower_bound(sorted, count, pixel); i < count && sorted[i] == pixel; ++i) {
    const int64_t source = order[i] / (K * K);
    const int tap = static_cast<int>(order[i] - source * K * K);
    const int64_t y = source / p.out_width;
    const Footprint<I, A> f =
        footprint_at<T, I>(p, n, static_cast<int>(y), static_cast<int>(source - y * p.out_width));
    A weight = 0;
#pragma unroll
    for (int t = 0; t < K * K; ++t) {  // selects, where an index would put f into local memory
      if (t == tap) weight = f.rows.weight[t / K] * f.columns.weight[t % K];
    }
    const T* grad = grad_output + f.y * p.grad_output_stride[2] + f.x * p.grad_output_stride[3];
    if constexpr (kPacked) {
      const Vector<T, V> values = load_vector<T, V>(grad);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += weight * to_accumulator(values.at[v]);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (c + v < p.channels)
          sum[v] += weight * to_accumulator(grad[v * p.grad_output_stride[1]]);
      }
    }
  }

  const int64_t row = pixel / p.width, column = pixel - row * p.width;
  T* grad_input = static_cast<T*>(p.grad_input) + n * p.grad_input_stride[0] +
                  c * p.grad_input_stride[1] + row * p.grad_input_stride[2] +
                  column * p.grad_input_stride[3];
  if constexpr (kPacked) {
    Vector<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) result.at[v] = from_accumulator<T>(sum[v]);
    store_vector(grad_input, result);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (c + v < p.channels) grad_input[v * p.grad_input_stride[1]] = from_accumulator<T>(sum[v]);
    }
  }
}

template <typename T, Interpolation I>
int launch_gather(const FlowWarpParams& p, void* stream) {
  const int64_t pixels = p.batch * p.height * p.width;
  const auto chunks = [&](int width) { return (p.channels + width - 1) / width; };
  if constexpr (!std::is_same_v<T, double>) {
    if (p.channels_last && is_aligned<T>(p, p.grad_output, p.grad_output_stride) &&
        is_aligned<T>(p, p.grad_input, p.grad_input_stride)) {
      return launch_items(flow_warp_backward_gather_kernel<T, I, true>, pixels * chunks(kVector<T>),
                          p, stream);
    }
  }
  return launch_items(flow_warp_backward_gather_kernel<T, I, false>,
                      pixels * chunks(kPlanarChannels), p, stream);
}

}  // namespace

int launch_flow_warp_backward_taps(const FlowWarpParams& p, void* stream) {
  if (pixel_count(p) == 0) return 0;
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    return dispatch_interpolation(p.interpolation, [&](auto interpolation) {
      using T = typename decltype(type)::type;
      constexpr Interpolation I = decltype(interpolation)::value;
      return launch_items(flow_warp_backward_taps_kernel<T, I>, pixel_count(p), p, stream);
    });
  });
}

int launch_flow_warp_backward_gather(const FlowWarpParams& p, void* stream) {
  if (p.batch * p.channels == 0) return 0;
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    return dispatch_interpolation(p.interpolation, [&](auto interpolation) {
      return launch_gather<typename decltype(type)::type, decltype(interpolation)::value>(p,
                                                                                          stream);
    });
  });
}

}  // namespace mafnet
