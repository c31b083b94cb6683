// What the forward and the backward kernels of flow_warp share: which pixel a thread owns, and its
// taps.
#pragma once

#include "common/prims.cuh"
#include "flow_warp/params.h"

namespace mafnet {

constexpr int kThreads = 256;  // no shared memory, few registers: 8 warps fill an SM at any size

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// One output pixel: its image, place, and the taps of both axes.
template <Interpolation I, typename A>
struct Footprint {
  int64_t n;
  int y, x;
  A position_y, position_x;
  AxisTaps<A, kTapsPerAxis<I>> rows, columns;
};

template <typename T, typename A>
DEVICE A load_flow(const FlowWarpParams& p, int64_t offset) {
  if (p.flow_dtype == p.dtype) return to_accumulator(static_cast<const T*>(p.flow)[offset]);
  return static_cast<const float*>(p.flow)[offset];
}

template <typename T, Interpolation I>
DEVICE Footprint<I, Accumulator<T>> footprint_at(const FlowWarpParams& p, int64_t n, int y, int x) {
  using A = Accumulator<T>;
  Footprint<I, A> f;
  f.n = n;
  f.y = y;
  f.x = x;
  const int64_t flow = n * p.flow_stride[0] + y * p.flow_stride[1] + x * p.flow_stride[2];
  f.position_x = static_cast<A>(x) + load_flow<T, A>(p, flow);
  f.position_y = static_cast<A>(y) + load_flow<T, A>(p, flow + p.flow_stride[3]);
  f.rows = sample_axis<I, A>(f.position_y, p.height, p.padding);
  f.columns = sample_axis<I, A>(f.position_x, p.width, p.padding);
  return f;
}

// The footprint of pixel number `pixel`, counted over all images in raster order.
template <typename T, Interpolation I>
DEVICE Footprint<I, Accumulator<T>> make_footprint(const FlowWarpParams& p, int64_t pixel) {
  const int64_t line = pixel / p.out_width;
  const int64_t n = line / p.out_height;
  return footprint_at<T, I>(p, n, static_cast<int>(line - n * p.out_height),
                            static_cast<int>(pixel - line * p.out_width));
}

MAFNET_HOST_DEVICE int64_t pixel_count(const FlowWarpParams& p) {
  return p.batch * p.out_height * p.out_width;
}

// Elements that one lane moves at once: 16 bytes where channels are last and everything is aligned.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T>
bool is_aligned(const FlowWarpParams& p, const void* pointer, const int64_t (&stride)[4]) {
  const bool strides =
      stride[0] % kVector<T> == 0 && stride[2] % kVector<T> == 0 && stride[3] % kVector<T> == 0;
  return pointer == nullptr || (strides && p.channels % kVector<T> == 0 &&
                                reinterpret_cast<uintptr_t>(pointer) % 16 == 0);
}

// Launches kernel(params) with one thread per item.
template <typename Kernel>
int launch_items(Kernel* kernel, int64_t items, const FlowWarpParams& params, void* stream) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, params);
}

}  // namespace mafnet
