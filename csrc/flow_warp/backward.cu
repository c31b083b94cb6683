// flow_warp backward: grad_input(iy[j], ix[k]) += wy[j] wx[k] grad_output, and grad_flow = the
// slopes of the weights times the dot products over channels of grad_output with the taps.
//
// channels_last: a group of kGroup lanes owns one output pixel; the lanes share its channels, 16
// bytes at a time, and sum their dot products by shuffles. Anything else (planes, double, channels
// that do not fill 16 bytes): one lane owns a pixel and walks its channels, whatever the strides.
// grad_input is scattered by atomics into float (double) accumulators, so its sums come in no fixed
// order. Per pixel and channel: grad_output and the taps are read once, and each tap takes one
// atomic add.
#include <type_traits>

#include "flow_warp/footprint.cuh"

namespace mafnet {
namespace {

constexpr int kGroup = 8;  // lanes per pixel: 64 channels of 16-bit features at 16 bytes a lane

template <int V>
DEVICE void atomic_add_vector(float* address, const float (&values)[V]) {
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      atomic_add4(address + v, values[v], values[v + 1], values[v + 2], values[v + 3]);
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) atomicAdd(address + v, values[v]);
  }
}
template <int V>
DEVICE void atomic_add_vector(double* address, const double (&values)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) atomicAdd(address + v, values[v]);
}

template <typename T>
DEVICE void store_flow(const FlowWarpParams& p, int64_t offset, Accumulator<T> value) {
  if (p.flow_dtype == p.dtype) {
    static_cast<T*>(p.grad_flow)[offset] = from_accumulator<T>(value);
  } else {
    static_cast<float*>(p.grad_flow)[offset] = static_cast<float>(value);
  }
}

// Sums v over the G lanes of a group; every lane of the warp takes part.
template <int G, typename A>
DEVICE A sum_over_group(A v) {
#pragma unroll
  for (int step = G / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

template <typename T, Interpolation I, int V, int G>
__global__ void __launch_bounds__(kThreads) flow_warp_backward_kernel(const FlowWarpParams p) {
  using A = Accumulator<T>;
  constexpr int K = kTapsPerAxis<I>;
  const int64_t pixels = pixel_count(p);
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int lane = static_cast<int>(item % G);
  const int64_t pixel = item / G;
  const bool active = pixel < pixels;  // idle lanes stay for the shuffles
  const Footprint<I, A> f = make_footprint<T, I>(p, active ? pixel : pixels - 1);

  const T* image = static_cast<const T*>(p.input) + f.n * p.input_stride[0];
  const T* grad_output = static_cast<const T*>(p.grad_output) + f.n * p.grad_output_stride[0] +
                         f.y * p.grad_output_stride[2] + f.x * p.grad_output_stride[3];
  A* grad_input = static_cast<A*>(p.grad_input) + f.n * p.grad_input_stride[0];
  A grad_x = 0, grad_y = 0;
  for (int64_t c = lane * V; active && c < p.channels; c += G * V) {
    const Vector<T, V> packed = load_vector<T, V>(grad_output + c * p.grad_output_stride[1]);
    A grad[V];
#pragma unroll
    for (int v = 0; v < V; ++v) grad[v] = to_accumulator(packed.at[v]);
#pragma unroll
    for (int j = 0; j < K; ++j) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int row = f.rows.index[j], column = f.columns.index[k];
        const bool used = row >= 0 && column >= 0;
        const A w = f.rows.weight[j] * f.columns.weight[k];
        if (p.grad_flow != nullptr && I != Interpolation::kNearest) {
          A dot = 0;
          if (used) {
            const Vector<T, V> values =
                load_vector<T, V>(image + c * p.input_stride[1] + row * p.input_stride[2] +
                                  column * p.input_stride[3]);
#pragma unroll
            for (int v = 0; v < V; ++v) dot += grad[v] * to_accumulator(values.at[v]);
          }
          grad_x += f.rows.weight[j] * f.columns.slope[k] * dot;
          grad_y += f.rows.slope[j] * f.columns.weight[k] * dot;
        }
        if (p.grad_input != nullptr && used && w != 0) {
          A part[V];
#pragma unroll
          for (int v = 0; v < V; ++v) part[v] = w * grad[v];
          atomic_add_vector<V>(grad_input + c * p.grad_input_stride[1] +
                                   row * p.grad_input_stride[2] + column * p.grad_input_stride[3],
                               part);
        }
      }
    }
  }
  if (p.grad_flow == nullptr) return;
  grad_x = sum_over_group<G>(grad_x);
  grad_y = sum_over_group<G>(grad_y);
  if (active && lane == 0) {
    store_flow<T>(p, 2 * pixel, grad_x);
    store_flow<T>(p, 2 * pixel + 1, grad_y);
  }
}

template <typename T, Interpolation I>
int launch_typed(const FlowWarpParams& p, void* stream) {
  const int64_t pixels = pixel_count(p);
  if constexpr (!std::is_same_v<T, double>) {
    if (p.channels_last && is_aligned<T>(p, p.input, p.input_stride) &&
        is_aligned<T>(p, p.grad_output, p.grad_output_stride) &&
        is_aligned<T>(p, p.grad_input, p.grad_input_stride)) {
      return launch_items(flow_warp_backward_kernel<T, I, kVector<T>, kGroup>, pixels * kGroup, p,
                          stream);
    }
  }
  return launch_items(flow_warp_backward_kernel<T, I, 1, 1>, pixels, p, stream);
}

}  // namespace

int launch_flow_warp_backward(const FlowWarpParams& p, void* stream) {
  if (pixel_count(p) == 0) return 0;
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    return dispatch_interpolation(p.interpolation, [&](auto interpolation) {
      return launch_typed<typename decltype(type)::type, decltype(interpolation)::value>(p, stream);
    });
  });
}

}  // namespace mafnet
