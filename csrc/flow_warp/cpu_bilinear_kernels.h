// The kernels behind BilinearKernels, written once for vectors of kLanes floats. Included by one file
// per vector level, which first defines
//   MAFNET_KERNEL  the attribute that lets a function use the level's instructions
//   Vec, kLanes    the vector; it has + and *
//   load, store, stream, broadcast, sum_of, load_pairs
//
// Every pixel is interpolated in one cell of 2 x 2 pixels inside the image, whatever the padding:
// taps in the padding become weights of the cell, or nothing. A row of a cell is then one pair of
// neighbours, which planes can be gathered by: half as many loads as taps.
//
// Loops are optimistic. A tap of weight zero must not contribute, or an infinite neighbour would
// spoil an exact sample, but testing for it costs more than the sum. 0 * r is NaN where r is not
// finite, so a loop adds up 0 * r of all its results; only where that is NaN are the results that
// are not finite computed again, tap by tap.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "flow_warp/cpu_bilinear.h"

namespace mafnet {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Arrays end beyond kSpan so that whole vectors fit, and so that they do not begin in one cache set.
constexpr int kSpanStride = kSpan + 16;
// How far ahead the cells of a channels_last image are fetched.
constexpr int kPixelsAhead = 8;
// Pixels transposed at a time.
constexpr int kTilePixels = 128;

struct Axis {
  float position[kSpanStride];
  int cell[kSpanStride];  // the first of the two pixels; the last is in the image too
  float weight[2][kSpanStride];
  float slope[2][kSpanStride];
};

struct Plan {
  int count;
  Axis x, y;
};

// Calls body(type) with the type of the elements, which is not double here.
template <typename Body>
MAFNET_INLINE void dispatch_type(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kFloat16) return body(Type<Half>{});
  if (dtype == Dtype::kBFloat16) return body(Type<BFloat16>{});
  body(Type<float>{});
}

// ---- plan

typedef int IntVec __attribute__((vector_size(sizeof(Vec))));

MAFNET_KERNEL MAFNET_INLINE Vec to_float(IntVec v) { return (Vec)__builtin_convertvector(v, Vec); }

// Bounds v without losing a NaN.
MAFNET_KERNEL MAFNET_INLINE Vec clamp(Vec v, float low, float high) {
  v = v < broadcast(low) ? broadcast(low) : v;
  return v > broadcast(high) ? broadcast(high) : v;
}

// What sample_axis() of common/sampler.h does, for whole vectors, with its taps folded into a cell.
// The cell is moved into the image, so the distance t to its first pixel may leave [0, 1].
template <Padding P>
MAFNET_KERNEL void plan_cells(Axis& axis, int count, int size) {
  const float last = static_cast<float>(size - 1);
  const Vec zero = broadcast(0), one = broadcast(1), two = broadcast(2);
  float sign[kLanes];
  for (int i = 0; i < count; i += kLanes) {
    Vec x = load(axis.position + i);
    const Vec asked = x;
    if (P == Padding::kReflection) {
      float folded[kLanes];
      for (int k = 0; k < kLanes; ++k) {
        sign[k] = 1;
        folded[k] = reflect(axis.position[i + k], size, sign[k]);
      }
      x = load(folded);
    } else if (P == Padding::kBorder) {
      x = clamp(x, 0, last);
    } else {
      x = clamp(x, -2, last + 2);
    }
    IntVec cell = __builtin_convertvector(x, IntVec);
    cell += to_float(cell) > x;  // true is -1: the floor, where conversion went towards zero
    const IntVec top = IntVec{} + (size - 2);
    cell = cell < 0 ? IntVec{} : cell > top ? top : cell;
    const Vec t = x - to_float(cell);
    Vec w0 = t < zero ? one + t : one - t, w1 = t <= one ? t : two - t;
    w0 = w0 < zero ? zero : w0;
    w1 = w1 < zero ? zero : w1;
    // The cell to the right of the position: t = 0 counts as right of the first pixel, 1 as right of
    // the second.
    Vec s0 = t < -one ? zero : t < zero ? one : t < one ? -one : zero;
    Vec s1 = t < zero ? zero : t < one ? one : t < two ? -one : zero;
    if (P == Padding::kBorder) {
      s0 = asked < zero ? zero : asked < broadcast(last) ? s0 : zero;
      s1 = asked < zero ? zero : asked < broadcast(last) ? s1 : zero;
    } else if (P == Padding::kReflection) {
      s0 = (t < one ? s0 : one) * load(sign);  // right of the last pixel lies the one before it
      s1 *= load(sign);
    }
    const Vec unknown = zero * t;  // NaN for a NaN, else 0
    std::memcpy(axis.cell + i, &cell, sizeof(cell));
    store(axis.weight[0] + i, w0);
    store(axis.weight[1] + i, w1);
    store(axis.slope[0] + i, s0 + unknown);
    store(axis.slope[1] + i, s1 + unknown);
  }
}

MAFNET_KERNEL void plan_axis(Axis& axis, int count, int size, Padding padding) {
  // Whole vectors are planned and read; the lanes beyond count belong to no pixel.
  std::fill_n(axis.position + count, kLanes, 0.0f);
  switch (padding) {
    case Padding::kBorder:
      return plan_cells<Padding::kBorder>(axis, count, size);
    case Padding::kReflection:
      return plan_cells<Padding::kReflection>(axis, count, size);
    default:
      return plan_cells<Padding::kZeros>(axis, count, size);
  }
}

// Positions of count pixels of row y from x0 on, the pixel's own place plus the flow. Component 0 of
// the flow belongs to x, 1 to y.
template <typename F>
MAFNET_KERNEL void read_positions(const FlowWarpParams& p, int64_t n, int y, int x0, int count,
                                  int component, float* __restrict__ position) {
  const F* __restrict__ flow = static_cast<const F*>(p.flow) + n * p.flow_stride[0] +
                               y * p.flow_stride[1] + x0 * p.flow_stride[2] +
                               component * p.flow_stride[3];
  const int64_t stride = p.flow_stride[2];
  const float place = static_cast<float>(component == 0 ? x0 : y);
  const float step = component == 0 ? 1.0f : 0.0f;  // exact: sizes are below 2^24
  if (stride == 2) {  // a constant stride is vectorised
    for (int i = 0; i < count; ++i) {
      position[i] = place + step * static_cast<float>(i) + static_cast<float>(flow[2 * i]);
    }
  } else {
    for (int i = 0; i < count; ++i) {
      position[i] = place + step * static_cast<float>(i) + static_cast<float>(flow[stride * i]);
    }
  }
}

MAFNET_KERNEL void plan_axis_of_span(const FlowWarpParams& p, const PixelSpan& span, int component,
                                     Axis& axis) {
  dispatch_type(p.flow_dtype, [&](auto type) {
    int done = 0;
    while (done < span.count) {
      const int64_t pixel = span.first + done;
      const int y = static_cast<int>(pixel / p.out_width), x = static_cast<int>(pixel % p.out_width);
      const int count = std::min(span.count - done, p.out_width - x);
      read_positions<typename decltype(type)::type>(p, span.n, y, x, count, component,
                                                    axis.position + done);
      done += count;
    }
  });
  plan_axis(axis, span.count, component == 0 ? p.width : p.height, p.padding);
}

MAFNET_KERNEL void plan_span(const FlowWarpParams& p, const PixelSpan& span, Plan& plan) {
  plan.count = span.count;
  plan_axis_of_span(p, span, 0, plan.x);
  plan_axis_of_span(p, span, 1, plan.y);
}

// ---- forward

template <typename T>
MAFNET_KERNEL MAFNET_INLINE void put(T* output, Vec value, bool around_caches) {
  if (around_caches) {
    stream(output, value);
  } else {
    store(output, value);
  }
}

// Computes again what is not finite, without the taps of weight zero.
template <typename T>
void repair(const FlowWarpParams& p, const Plan& plan, int64_t channels, const T* image,
            T* output) {
  const int64_t *from = p.input_stride, *to = p.output_stride;
  for (int i = 0; i < plan.count; ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      T& result = output[i * to[3] + c * to[1]];
      if (std::isfinite(static_cast<float>(result))) continue;
      float value = 0;
      for (int j = 0; j < 2; ++j) {
        for (int k = 0; k < 2; ++k) {
          const float w = plan.y.weight[j][i] * plan.x.weight[k][i];
          const T* tap = image + c * from[1] + (plan.y.cell[i] + j) * from[2] +
                         (plan.x.cell[i] + k) * from[3];
          if (w != 0) value += w * static_cast<float>(*tap);
        }
      }
      result = static_cast<T>(value);
    }
  }
}

// Fetches the right pixels of the cell a few pixels on; the left ones are those of the cell before.
template <typename T>
MAFNET_KERNEL MAFNET_INLINE void prefetch_cell(const FlowWarpParams& p, const Plan& plan, int i,
                                               const T* image) {
  const int later = std::min(i + kPixelsAhead, plan.count - 1);
  const T* upper = image + plan.y.cell[later] * p.input_stride[2] +
                   (plan.x.cell[later] + 1) * p.input_stride[3];
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < p.channels; c += kLine) {
    __builtin_prefetch(upper + c);
    __builtin_prefetch(upper + p.input_stride[2] + c);
  }
}

// Channels one by one of a pixel of which vectors have taken the first ones.
template <typename T>
MAFNET_KERNEL float blend_rest(const T* upper, const T* lower, int64_t next, const float (&w)[4],
                               int64_t c, int64_t channels, T* output) {
  float check = 0;
  for (; c < channels; ++c) {
    const float value =
        w[0] * static_cast<float>(upper[c]) + w[1] * static_cast<float>(upper[next + c]) +
        (w[2] * static_cast<float>(lower[c]) + w[3] * static_cast<float>(lower[next + c]));
    check += 0 * value;
    output[c] = static_cast<T>(value);
  }
  return check;
}

template <typename T>
MAFNET_KERNEL void forward_channels_last(const FlowWarpParams& p, const Plan& plan, const T* image,
                                         T* output, bool around_caches) {
  const int64_t next = p.input_stride[3], whole = p.channels / kLanes * kLanes;
  Vec check = broadcast(0);
  float check_rest = 0;
  for (int i = 0; i < plan.count; ++i) {
    const T* upper = image + plan.y.cell[i] * p.input_stride[2] + plan.x.cell[i] * next;
    const T* lower = upper + p.input_stride[2];
    T* target = output + i * p.output_stride[3];
    prefetch_cell(p, plan, i, image);
    const float w[4] = {plan.y.weight[0][i] * plan.x.weight[0][i],
                        plan.y.weight[0][i] * plan.x.weight[1][i],
                        plan.y.weight[1][i] * plan.x.weight[0][i],
                        plan.y.weight[1][i] * plan.x.weight[1][i]};
    const Vec w0 = broadcast(w[0]), w1 = broadcast(w[1]);
    const Vec w2 = broadcast(w[2]), w3 = broadcast(w[3]);
    for (int64_t c = 0; c < whole; c += kLanes) {
      const Vec value = w0 * load(upper + c) + w1 * load(upper + next + c) +
                        (w2 * load(lower + c) + w3 * load(lower + next + c));
      check += broadcast(0) * value;
      put(target + c, value, around_caches);
    }
    check_rest += blend_rest(upper, lower, next, w, whole, p.channels, target);
  }
  if (!(sum_of(check) + check_rest == 0)) repair(p, plan, p.channels, image, output);
}

// Stores the first lanes of a vector.
template <typename T>
MAFNET_KERNEL void store_first(T* output, Vec value, int lanes) {
  T all[kLanes];
  store(all, value);
  std::memcpy(output, all, static_cast<size_t>(lanes) * sizeof(T));
}

// Planes planes at once share the reading of the plan.
template <int kPlanes, typename T>
MAFNET_KERNEL void forward_planes(const FlowWarpParams& p, const Plan& plan, const int* offset,
                                  const T* image, T* output, bool around_caches) {
  Vec check = broadcast(0);
  for (int i = 0; i < plan.count; i += kLanes) {
    const Vec x0 = load(plan.x.weight[0] + i), x1 = load(plan.x.weight[1] + i);
    const Vec y0 = load(plan.y.weight[0] + i), y1 = load(plan.y.weight[1] + i);
    const int lanes = std::min(kLanes, plan.count - i);
    for (int u = 0; u < kPlanes; ++u) {
      const T* plane = image + u * p.input_stride[1];
      T* target = output + u * p.output_stride[1] + i;
      const T* ahead = plane + kPlanes * p.input_stride[1] + offset[i];
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + p.input_stride[2]);
      Vec a, b, c, d;
      load_pairs(plane, offset + i, a, b);
      load_pairs(plane + p.input_stride[2], offset + i, c, d);
      const Vec value = y0 * (x0 * a + x1 * b) + y1 * (x0 * c + x1 * d);
      check += broadcast(0) * value;
      if (lanes == kLanes) {
        put(target, value, around_caches);
      } else {
        store_first(target, value, lanes);
      }
    }
  }
  if (!(sum_of(check) == 0)) repair(p, plan, kPlanes, image, output);
}

// Where the cells begin in a plane; whole vectors.
MAFNET_KERNEL void find_offsets(const FlowWarpParams& p, const Plan& plan,
                                int* __restrict__ offset) {
  const int row = static_cast<int>(p.input_stride[2]);
  const int whole = (plan.count + kLanes - 1) / kLanes * kLanes;
  for (int i = 0; i < whole; ++i) offset[i] = plan.y.cell[i] * row + plan.x.cell[i];
}

template <typename T>
MAFNET_KERNEL void write_mask(const FlowWarpParams& p, const PixelSpan& span, const Plan& plan) {
  T* mask = static_cast<T*>(p.mask) +
            span.n * p.out_height * static_cast<int64_t>(p.out_width) + span.first;
  const float last_x = static_cast<float>(p.width - 1), last_y = static_cast<float>(p.height - 1);
  for (int i = 0; i < span.count; ++i) {
    const float x = plan.x.position[i], y = plan.y.position[i];
    mask[i] = static_cast<T>(x >= 0 && x <= last_x && y >= 0 && y <= last_y ? 1.0f : 0.0f);
  }
}

template <typename T>
MAFNET_KERNEL void forward_span(const FlowWarpParams& p, const PixelSpan& span,
                                bool around_caches) {
  Plan plan;
  plan_span(p, span, plan);
  if (p.mask != nullptr) write_mask<T>(p, span, plan);
  const T* image = static_cast<const T*>(p.input) + span.n * p.input_stride[0];
  T* output = static_cast<T*>(p.output) + span.n * p.output_stride[0] +
              span.first * p.output_stride[3];
  if (p.channels_last) return forward_channels_last(p, plan, image, output, around_caches);
  int offset[kSpanStride];
  find_offsets(p, plan, offset);
  int64_t c = 0;
  for (; c + 4 <= p.channels; c += 4) {
    forward_planes<4>(p, plan, offset, image + c * p.input_stride[1],
                      output + c * p.output_stride[1], around_caches);
  }
  for (; c < p.channels; ++c) {
    forward_planes<1>(p, plan, offset, image + c * p.input_stride[1],
                      output + c * p.output_stride[1], around_caches);
  }
}

void forward(const FlowWarpParams& p, const PixelSpan& span, bool around_caches) {
  dispatch_type(p.dtype, [&](auto type) {
    forward_span<typename decltype(type)::type>(p, span, around_caches);
  });
}

// ---- grad_flow: the derivative of the blend, times grad_output, summed over the channels

// One pixel again without the taps that have no part in it; its sums were not finite.
template <typename T>
void repair_grad_flow(const FlowWarpParams& p, const Plan& plan, int i, const T* image,
                      const T* grad, float& grad_x, float& grad_y) {
  grad_x = grad_y = 0;
  for (int j = 0; j < 2; ++j) {
    for (int k = 0; k < 2; ++k) {
      const float wx = plan.x.weight[k][i], wy = plan.y.weight[j][i];
      const float sx = plan.x.slope[k][i], sy = plan.y.slope[j][i];
      if ((wx == 0 && sx == 0) || (wy == 0 && sy == 0)) continue;
      const T* tap = image + (plan.y.cell[i] + j) * p.input_stride[2] +
                     (plan.x.cell[i] + k) * p.input_stride[3];
      float dot = 0;
      for (int64_t c = 0; c < p.channels; ++c) {
        dot += static_cast<float>(grad[i * p.grad_output_stride[3] + c * p.grad_output_stride[1]]) *
               static_cast<float>(tap[c * p.input_stride[1]]);
      }
      grad_x += wy * sx * dot;
      grad_y += sy * wx * dot;
    }
  }
}

template <typename T>
MAFNET_KERNEL void grad_flow_channels_last(const FlowWarpParams& p, const Plan& plan,
                                           const T* image, const T* grad,
                                           float* __restrict__ grad_x, float* __restrict__ grad_y) {
  const int64_t next = p.input_stride[3], whole = p.channels / kLanes * kLanes;
  for (int i = 0; i < plan.count; ++i) {
    const T* upper = image + plan.y.cell[i] * p.input_stride[2] + plan.x.cell[i] * next;
    const T* lower = upper + p.input_stride[2];
    const T* g = grad + i * p.grad_output_stride[3];
    prefetch_cell(p, plan, i, image);
    Vec dot0 = broadcast(0), dot1 = dot0, dot2 = dot0, dot3 = dot0;
    for (int64_t c = 0; c < whole; c += kLanes) {
      const Vec gc = load(g + c);
      dot0 += gc * load(upper + c);
      dot1 += gc * load(upper + next + c);
      dot2 += gc * load(lower + c);
      dot3 += gc * load(lower + next + c);
    }
    float dot[4] = {sum_of(dot0), sum_of(dot1), sum_of(dot2), sum_of(dot3)};
    for (int64_t c = whole; c < p.channels; ++c) {
      const float gc = static_cast<float>(g[c]);
      dot[0] += gc * static_cast<float>(upper[c]);
      dot[1] += gc * static_cast<float>(upper[next + c]);
      dot[2] += gc * static_cast<float>(lower[c]);
      dot[3] += gc * static_cast<float>(lower[next + c]);
    }
    const Axis &x = plan.x, &y = plan.y;
    grad_x[i] = y.weight[0][i] * (x.slope[0][i] * dot[0] + x.slope[1][i] * dot[1]) +
                y.weight[1][i] * (x.slope[0][i] * dot[2] + x.slope[1][i] * dot[3]);
    grad_y[i] = y.slope[0][i] * (x.weight[0][i] * dot[0] + x.weight[1][i] * dot[1]) +
                y.slope[1][i] * (x.weight[0][i] * dot[2] + x.weight[1][i] * dot[3]);
  }
}

template <typename T>
MAFNET_KERNEL Vec load_first(const T* p, int lanes) {
  T all[kLanes] = {};
  std::memcpy(static_cast<void*>(all), p, static_cast<size_t>(lanes) * sizeof(T));
  return load(all);
}

// Adds what kPlanes channels contribute.
template <int kPlanes, typename T>
MAFNET_KERNEL void add_grad_flow_planes(const FlowWarpParams& p, const Plan& plan,
                                        const int* offset, const T* image, const T* grad,
                                        float* __restrict__ grad_x, float* __restrict__ grad_y) {
  for (int i = 0; i < plan.count; i += kLanes) {
    const Vec x0 = load(plan.x.weight[0] + i), x1 = load(plan.x.weight[1] + i);
    const Vec y0 = load(plan.y.weight[0] + i), y1 = load(plan.y.weight[1] + i);
    const Vec slope_x0 = load(plan.x.slope[0] + i), slope_x1 = load(plan.x.slope[1] + i);
    const Vec slope_y0 = load(plan.y.slope[0] + i), slope_y1 = load(plan.y.slope[1] + i);
    const int lanes = std::min(kLanes, plan.count - i);
    Vec by_x = load(grad_x + i), by_y = load(grad_y + i);
    for (int u = 0; u < kPlanes; ++u) {
      const T* plane = image + u * p.input_stride[1];
      const T* g = grad + u * p.grad_output_stride[1] + i;
      const T* ahead = plane + kPlanes * p.input_stride[1] + offset[i];
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + p.input_stride[2]);
      Vec a, b, c, d;
      load_pairs(plane, offset + i, a, b);
      load_pairs(plane + p.input_stride[2], offset + i, c, d);
      const Vec gu = lanes == kLanes ? load(g) : load_first(g, lanes);
      by_x += gu * (y0 * (slope_x0 * a + slope_x1 * b) + y1 * (slope_x0 * c + slope_x1 * d));
      by_y += gu * (slope_y0 * (x0 * a + x1 * b) + slope_y1 * (x0 * c + x1 * d));
    }
    store(grad_x + i, by_x);
    store(grad_y + i, by_y);
  }
}

template <typename T>
MAFNET_KERNEL void grad_flow_span(const FlowWarpParams& p, const PixelSpan& span) {
  Plan plan;
  plan_span(p, span, plan);
  const T* image = static_cast<const T*>(p.input) + span.n * p.input_stride[0];
  const T* grad = static_cast<const T*>(p.grad_output) + span.n * p.grad_output_stride[0] +
                  span.first * p.grad_output_stride[3];
  float grad_x[kSpanStride], grad_y[kSpanStride];
  if (p.channels_last) {
    grad_flow_channels_last(p, plan, image, grad, grad_x, grad_y);
  } else {
    int offset[kSpanStride];
    find_offsets(p, plan, offset);
    std::fill_n(grad_x, plan.count + kLanes, 0.0f);
    std::fill_n(grad_y, plan.count + kLanes, 0.0f);
    int64_t c = 0;
    for (; c + 4 <= p.channels; c += 4) {
      add_grad_flow_planes<4>(p, plan, offset, image + c * p.input_stride[1],
                              grad + c * p.grad_output_stride[1], grad_x, grad_y);
    }
    for (; c < p.channels; ++c) {
      add_grad_flow_planes<1>(p, plan, offset, image + c * p.input_stride[1],
                              grad + c * p.grad_output_stride[1], grad_x, grad_y);
    }
  }
  const int64_t pixel = span.n * p.out_height * static_cast<int64_t>(p.out_width) + span.first;
  dispatch_type(p.flow_dtype, [&](auto type) {
    using F = typename decltype(type)::type;
    F* target = static_cast<F*>(p.grad_flow) + 2 * pixel;
    for (int i = 0; i < plan.count; ++i) {
      if (!std::isfinite(grad_x[i]) || !std::isfinite(grad_y[i])) {
        repair_grad_flow(p, plan, i, image, grad, grad_x[i], grad_y[i]);
      }
      target[2 * i] = static_cast<F>(grad_x[i]);
      target[2 * i + 1] = static_cast<F>(grad_y[i]);
    }
  });
}

void grad_flow(const FlowWarpParams& p, const PixelSpan& span) {
  dispatch_type(p.dtype, [&](auto type) { grad_flow_span<typename decltype(type)::type>(p, span); });
}

// ---- grad_input

MAFNET_KERNEL RowRange row_range(const FlowWarpParams& p, int64_t n, int y) {
  Axis axis;
  RowRange range{p.height, -1};
  for (int x = 0; x < p.out_width; x += kSpan) {
    const PixelSpan span{n, static_cast<int64_t>(y) * p.out_width + x,
                         std::min(kSpan, p.out_width - x)};
    plan_axis_of_span(p, span, 1, axis);
    for (int i = 0; i < span.count; ++i) {
      range.first = std::min(range.first, axis.cell[i]);
      range.last = std::max(range.last, axis.cell[i] + 1);
    }
  }
  return range;
}

// Where a band is summed: sum[row][column][channel], `channels` floats per pixel.
struct Sums {
  float* sum;
  int first_row, last_row;
  int64_t width, channels;
};

// Adds pixels begin .. begin + count of the plan; pixel i has its channels at grad + i * stride.
template <typename T>
MAFNET_KERNEL void scatter(const Plan& plan, int begin, int count, const T* grad, int64_t stride,
                           const Sums& band) {
  const int64_t whole = band.channels / kLanes * kLanes;
  for (int i = 0; i < count; ++i) {
    const T* g = grad + i * stride;
    for (int j = 0; j < 2; ++j) {
      const int row = plan.y.cell[begin + i] + j;
      if (row < band.first_row || row > band.last_row) continue;
      for (int k = 0; k < 2; ++k) {
        const float w = plan.y.weight[j][begin + i] * plan.x.weight[k][begin + i];
        if (!(std::fabs(w) > 0)) continue;  // zero, or NaN
        float* sum = band.sum + ((row - band.first_row) * band.width + plan.x.cell[begin + i] + k) *
                                    band.channels;
        const Vec weight = broadcast(w);
        for (int64_t c = 0; c < whole; c += kLanes) {
          store(sum + c, load(sum + c) + weight * load(g + c));
        }
        for (int64_t c = whole; c < band.channels; ++c) sum[c] += w * static_cast<float>(g[c]);
      }
    }
  }
}

// tile[i][c] = plane c of grad at pixel i; the channels that are missing are zeros.
template <typename T>
MAFNET_KERNEL void transpose_tile(const T* grad, int64_t plane, int64_t channels, int count,
                                  float* __restrict__ tile) {
  if (channels < kTileChannels) std::fill_n(tile, count * kTileChannels, 0.0f);
  for (int64_t c = 0; c < channels; ++c) {
    const T* source = grad + c * plane;
    for (int i = 0; i < count; i += 16) {
      __builtin_prefetch(source + i + kTilePixels);  // the next tile: so many streams, each so short
      const int end = std::min(i + 16, count);
      for (int k = i; k < end; ++k) tile[k * kTileChannels + c] = static_cast<float>(source[k]);
    }
  }
}

template <typename T>
MAFNET_KERNEL void scatter_rows(const FlowWarpParams& p, const RowRange* ranges, const Band& band,
                                const Sums& sums) {
  Plan plan;
  float tile[kTilePixels * kTileChannels];
  const T* grad = static_cast<const T*>(p.grad_output) + band.n * p.grad_output_stride[0] +
                  band.first_channel * p.grad_output_stride[1];
  for (int y = 0; y < p.out_height; ++y) {
    if (ranges[y].last < band.first_row || ranges[y].first > band.last_row) continue;
    for (int x = 0; x < p.out_width; x += kSpan) {
      const PixelSpan span{band.n, static_cast<int64_t>(y) * p.out_width + x,
                           std::min(kSpan, p.out_width - x)};
      plan_span(p, span, plan);
      const T* g = grad + y * p.grad_output_stride[2] + x * p.grad_output_stride[3];
      if (p.channels_last) {
        scatter(plan, 0, span.count, g, p.grad_output_stride[3], sums);
        continue;
      }
      for (int i = 0; i < span.count; i += kTilePixels) {
        const int count = std::min(kTilePixels, span.count - i);
        transpose_tile(g + i, p.grad_output_stride[1], band.channels, count, tile);
        scatter(plan, i, count, tile, kTileChannels, sums);
      }
    }
  }
}

template <typename T>
MAFNET_KERNEL void grad_input_band(const FlowWarpParams& p, const RowRange* ranges,
                                   const Band& band, float* buffer) {
  T* target = static_cast<T*>(p.grad_input) + band.n * p.grad_input_stride[0] +
              band.first_channel * p.grad_input_stride[1] +
              band.first_row * p.grad_input_stride[2];
  const bool in_place = p.channels_last && std::is_same_v<T, float>;
  const int64_t per_pixel = p.channels_last ? band.channels : kTileChannels;
  const int64_t pixels = static_cast<int64_t>(band.last_row - band.first_row + 1) * p.width;
  const Sums sums{in_place ? reinterpret_cast<float*>(target) : buffer, band.first_row,
                  band.last_row, p.width, per_pixel};
  std::fill_n(sums.sum, pixels * per_pixel, 0.0f);
  scatter_rows<T>(p, ranges, band, sums);
  if (in_place) return;
  if (p.channels_last) {
    const int64_t elements = pixels * per_pixel, whole = elements / kLanes * kLanes;
    for (int64_t e = 0; e < whole; e += kLanes) store(target + e, load(buffer + e));
    for (int64_t e = whole; e < elements; ++e) target[e] = static_cast<T>(buffer[e]);
    return;
  }
  for (int64_t c = 0; c < band.channels; ++c) {
    T* __restrict__ plane = target + c * p.grad_input_stride[1];
    for (int64_t i = 0; i < pixels; ++i) {
      plane[i] = static_cast<T>(buffer[i * kTileChannels + c]);
    }
  }
}

void grad_input(const FlowWarpParams& p, const RowRange* ranges, const Band& band, float* buffer) {
  dispatch_type(p.dtype, [&](auto type) {
    grad_input_band<typename decltype(type)::type>(p, ranges, band, buffer);
  });
}

constexpr BilinearKernels kKernels{&forward, &grad_flow, &row_range, &grad_input};

}  // namespace
}  // namespace mafnet
