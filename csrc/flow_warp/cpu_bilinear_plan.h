// The plan of a span for the bilinear kernels: cells, weights and slopes. See
// cpu_bilinear_kernels.h.
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

// Arrays end beyond kSpan so that whole vectors fit, and so that they do not begin in one cache
// set.
constexpr int kSpanStride = kSpan + 16;
// Planes gathered in one pass over a plan.
constexpr int64_t kPlanes = 4;
// How far ahead the cells of a channels_last image are fetched.
constexpr int kPixelsAhead = 32;
// How far ahead planes are fetched that are transposed: tiles of the image, which lie in rows of a
// few, and those of grad_output.
constexpr int kReachAhead = 8;
constexpr int kTilesAhead = 4;

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

MAFNET_KERNEL MAFNET_INLINE Vec to_float(IntVec v) { return (Vec) __builtin_convertvector(v, Vec); }

// Bounds v without losing a NaN.
MAFNET_KERNEL MAFNET_INLINE Vec clamp(Vec v, float low, float high) {
  v = v < broadcast(low) ? broadcast(low) : v;
  return v > broadcast(high) ? broadcast(high) : v;
}

// What sample_axis() of common/sampler.h does, for whole vectors, with its taps folded into a cell.
// The cell is moved into the image, so the distance t to its first pixel may leave [0, 1]. slopes:
// those too, which the gradient of the flow alone reads.
template <Padding P>
MAFNET_KERNEL void plan_cells(Axis& axis, int count, int size, bool slopes) {
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
    std::memcpy(axis.cell + i, &cell, sizeof(cell));
    store(axis.weight[0] + i, w0);
    store(axis.weight[1] + i, w1);
    if (!slopes) continue;
    // The cell to the right of the position: t = 0 counts as right of the first pixel, 1 as right
    // of the second.
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
    store(axis.slope[0] + i, s0 + unknown);
    store(axis.slope[1] + i, s1 + unknown);
  }
}

MAFNET_KERNEL void plan_axis(Axis& axis, int count, int size, Padding padding, bool slopes) {
  // Whole vectors are planned and read; the lanes beyond count belong to no pixel.
  std::fill_n(axis.position + count, kLanes, 0.0f);
  switch (padding) {
    case Padding::kBorder:
      return plan_cells<Padding::kBorder>(axis, count, size, slopes);
    case Padding::kReflection:
      return plan_cells<Padding::kReflection>(axis, count, size, slopes);
    default:
      return plan_cells<Padding::kZeros>(axis, count, size, slopes);
  }
}

// Positions of count pixels of row y from x0 on, the pixel's own place plus the flow. Component 0
// of the flow belongs to x, 1 to y.
template <typename F>
MAFNET_KERNEL void read_positions(const FlowWarpParams& p, int64_t n, int y, int x0, int count,
                                  int component, float* __restrict__ position) {
  const F* __restrict__ flow = static_cast<const F*>(p.flow) + n * p.flow_stride[0] +
                               y * p.flow_stride[1] + x0 * p.flow_stride[2] +
                               component * p.flow_stride[3];
  const int64_t stride = p.flow_stride[2];
  const float place = static_cast<float>(component == 0 ? x0 : y);
  const float step = component == 0 ? 1.0f : 0.0f;  // exact: sizes are below 2^24
  if (stride == 2) {                                // a constant stride is vectorised
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
                                     bool slopes, Axis& axis) {
  dispatch_type(p.flow_dtype, [&](auto type) {
    int done = 0;
    while (done < span.count) {
      const int64_t pixel = span.first + done;
      const int y = static_cast<int>(pixel / p.out_width),
                x = static_cast<int>(pixel % p.out_width);
      const int count = std::min(span.count - done, p.out_width - x);
      read_positions<typename decltype(type)::type>(p, span.n, y, x, count, component,
                                                    axis.position + done);
      done += count;
    }
  });
  plan_axis(axis, span.count, component == 0 ? p.width : p.height, p.padding, slopes);
}

MAFNET_KERNEL void plan_span(const FlowWarpParams& p, const PixelSpan& span, bool slopes,
                             Plan& plan) {
  plan.count = span.count;
  plan_axis_of_span(p, span, 0, slopes, plan.x);
  plan_axis_of_span(p, span, 1, slopes, plan.y);
}

// A block of the output with its plan: row r begins at element r * stride of the plan, a whole
// number of vectors, whose pixels beyond the width of the block repeat the last one.
struct BlockPlan {
  int stride;
  Plan plan;
};

MAFNET_KERNEL void plan_block(const FlowWarpParams& p, const PixelBlock& block, bool slopes,
                              BlockPlan& b) {
  b.stride = (block.columns + kTilePixels - 1) / kTilePixels * kTilePixels;
  b.plan.count = block.rows * b.stride;
  for (int component = 0; component < 2; ++component) {
    Axis& axis = component == 0 ? b.plan.x : b.plan.y;
    for (int r = 0; r < block.rows; ++r) {
      float* row = axis.position + r * b.stride;
      dispatch_type(p.flow_dtype, [&](auto type) {
        read_positions<typename decltype(type)::type>(p, block.n, block.y + r, block.x,
                                                      block.columns, component, row);
      });
      std::fill(row + block.columns, row + b.stride, row[block.columns - 1]);
    }
    plan_axis(axis, b.plan.count, component == 0 ? p.width : p.height, p.padding, slopes);
  }
}

}  // namespace
}  // namespace mafnet
