// The positions of a block's samples.
#include <cmath>

#include "common/pixels.h"
#include "modulated_deform_conv2d/activations.h"
#include "modulated_deform_conv2d/plan.h"

namespace mafnet {
namespace {

// A plane as A: where it lies, or copied to room, which holds whole chunks.
template <typename A>
const A* read_plane(const Elements<const void*>& plane, int count, A* room) {
  if (is_of<A>(plane.dtype) && plane.pixel_stride == 1 && count % kChunk == 0) {
    return static_cast<const A*>(plane.data) + plane.first;
  }
  if (plane.pixel_stride == 1) {  // as one pixel whose channels lie side by side
    gather_pixels(Elements<const void*>{plane.data, plane.dtype, plane.first, 0, 1}, 1, count, room,
                  int64_t{count});
  } else {
    gather_pixels(plane, count, 1, room, int64_t{1});
  }
  return room;
}

// Planes lie far apart, so that the hardware does not foresee the next one.
void prefetch(const Elements<const void*>& plane, int count) {
  if (plane.pixel_stride != 1) return;
  const int64_t size = element_bytes(plane.dtype);
  const char* from = static_cast<const char*>(plane.data) + plane.first * size;
  for (int64_t at = 0; at < count * size; at += 64) __builtin_prefetch(from + at);
}

// dy, dx and mask of one plane over a block; the data of a mask that is not there is null.
struct Planes {
  Elements<const void*> at[3];
};

Planes planes_of(const ModulatedDeformConv2dParams& p, const Block& b, int plane) {
  const int64_t offset = b.n * p.offset_stride[0] + b.first * p.offset_stride[2];
  const int64_t dy = offset + 2 * plane * p.offset_stride[1], dx = dy + p.offset_stride[1];
  const int64_t mask =
      b.n * p.mask_stride[0] + b.first * p.mask_stride[2] + plane * p.mask_stride[1];
  return {{{p.offset, p.offset_dtype, dy, p.offset_stride[2], 1},
           {p.offset, p.offset_dtype, dx, p.offset_stride[2], 1},
           {p.mask, p.mask_dtype, mask, p.mask_stride[2], 1}}};
}

// Offset planes from raw ones: 0 is dy, 1 is dx. raw may be the plane itself.
template <typename A>
MAFNET_INLINE void activate_offsets(int count, A max_residue, const A* raw, const A* flow, A* value,
                                    A* slope) {
  if (std::isinf(max_residue)) {
    for (int i = 0; i < round_up(count, kChunk); ++i) {
      value[i] = raw[i] + flow[i];
      slope[i] = 1;
    }
    return;
  }
#pragma omp simd
  for (int i = 0; i < round_up(count, kChunk); ++i) {
    const auto tanh = tanh_of(raw[i]);
    value[i] = max_residue * tanh.value + flow[i];
    slope[i] = max_residue * tanh.slope;
  }
}

template <typename A>
MAFNET_INLINE void activate_mask(int count, const A* raw, A* value, A* slope) {
#pragma omp simd
  for (int i = 0; i < round_up(count, kChunk); ++i) {
    const auto sigmoid = sigmoid_of(raw[i]);
    value[i] = sigmoid.value;
    slope[i] = sigmoid.slope;
  }
}

// The flows of a block, channel by channel.
template <typename A>
void read_flows(const RawOffsets& raw, const Block& b, Plan<A>& plan) {
  for (int which = 0; which < 2; ++which) {
    for (int axis = 0; axis < 2; ++axis) {
      A* to = plan.flow[which][axis];
      if (raw.flow[which] == nullptr) {
        std::fill_n(to, kMaxBlock, A(0));
        continue;
      }
      const int64_t (&stride)[3] = raw.flow_stride[which];
      const int64_t first = b.n * stride[0] + b.first * stride[1] + axis * stride[2];
      gather_pixels({raw.flow[which], raw.flow_dtype, first, stride[1], 1}, b.count, 1, to,
                    int64_t{1});
    }
  }
}

// The cell of a coordinate along one axis, and the part of it; limits are as far outside as it
// gets. NaN goes below, and its part is NaN.
template <typename A>
struct Cell {
  int index;
  A part;
};

template <typename A>
MAFNET_INLINE Cell<A> cell_of(A at, A low, A high) {
  at = at > high ? high : at;  // NaN passes these selects, but not that under floor
  const A floor = std::floor(at > low ? at : low);
  at = at < low ? low : at;
  return {static_cast<int>(floor), at - floor};
}

// dy, dx and mask of a tap over a block, and where it lies in the kernel.
template <typename A, typename T = A>
struct Inputs {
  A tap_y, tap_x;
  const T *dy, *dx, *mask;
};

template <typename A>
MAFNET_INLINE void plan_positions(const ModulatedDeformConv2dParams& p, int count,
                                  const Inputs<A>& in, Plan<A>& plan) {
  // Copies, of which the compiler knows that no store below changes them.
  const A *base_y = plan.base_y, *base_x = plan.base_x;
  const A *dy = in.dy, *dx = in.dx, *mask = in.mask;
  const A tap_y = in.tap_y, tap_x = in.tap_x;
  const A end_y = static_cast<A>(p.height), end_x = static_cast<A>(p.width);
  // Whole chunks: beyond count the arrays hold leftovers, which do no harm.
#pragma omp simd
  for (int i = 0; i < round_up(count, kChunk); ++i) {
    const Cell<A> y = cell_of(base_y[i] + tap_y + dy[i], A(-2), end_y);
    const Cell<A> x = cell_of(base_x[i] + tap_x + dx[i], A(-2), end_x);
    const A m = mask[i];
    const A w1 = y.part * m, w0 = (1 - y.part) * m;
    plan.weight[0][i] = w0 * (1 - x.part);
    plan.weight[1][i] = w0 * x.part;
    plan.weight[2][i] = w1 * (1 - x.part);
    plan.weight[3][i] = w1 * x.part;
    plan.y[i] = y.index;
    plan.x[i] = x.index;
    plan.part_y[i] = y.part;
    plan.part_x[i] = x.part;
    plan.mask[i] = m;
  }
}

// T: what dy, dx and mask are in.
template <typename A, typename T>
MAFNET_INLINE void plan_corners(const ModulatedDeformConv2dParams& p, const Place& place, int count,
                                const Inputs<A, T>& in, const Plan<A>& plan, Samples<A>& samples) {
  const A *base_y = plan.base_y, *base_x = plan.base_x;
  const T *dy = in.dy, *dx = in.dx, *mask = in.mask;
  const A tap_y = in.tap_y, tap_x = in.tap_x;
  const int top = place.rows.low - 2, bottom = place.rows.high, left = -2, right = p.width;
  const A top_y = static_cast<A>(top), bottom_y = static_cast<A>(bottom);
  const A left_x = static_cast<A>(left), right_x = static_cast<A>(right);
  samples.first = place.first;
#pragma omp simd
  for (int i = 0; i < round_up(count, kChunk); ++i) {
    const Cell<A> y = cell_of(base_y[i] + tap_y + static_cast<A>(dy[i]), top_y, bottom_y);
    const Cell<A> x = cell_of(base_x[i] + tap_x + static_cast<A>(dx[i]), left_x, right_x);
    // Limits beyond 2^24 may have been rounded.
    const int row = y.index < bottom ? y.index : bottom;
    const int column = x.index < right ? x.index : right;
    const A m = static_cast<A>(mask[i]);
    const A w1 = y.part * m, w0 = (1 - y.part) * m;
    samples.weight[0][i] = w0 * (1 - x.part);
    samples.weight[1][i] = w0 * x.part;
    samples.weight[2][i] = w1 * (1 - x.part);
    samples.weight[3][i] = w1 * x.part;
    samples.row[i] = row > top ? row : top;
    samples.column[i] = column;
  }
}

template <typename A, typename T>
Inputs<A, T> inputs_of(const ModulatedDeformConv2dParams& p, int plane, const T* dy, const T* dx,
                       const T* mask) {
  const int tap = plane % p.taps();
  return {static_cast<A>(tap / p.kernel_w * p.dilation_h),
          static_cast<A>(tap % p.kernel_w * p.dilation_w), dy, dx, mask};
}

// Reads dy, dx and mask of a tap, and calls body(inputs), compiled for the vectors of this CPU.
template <typename A, typename Body>
void with_inputs(const ModulatedDeformConv2dParams& p, const Block& b, int plane, Plan<A>& plan,
                 const Body& body) {
  const Planes planes = planes_of(p, b, plane);
  const A* mask = plan.mask;
  if (p.mask != nullptr) mask = read_plane<A>(planes.at[2], b.count, plan.planes[2]);
  Inputs<A> in = inputs_of<A>(p, plane, read_plane<A>(planes.at[0], b.count, plan.planes[0]),
                              read_plane<A>(planes.at[1], b.count, plan.planes[1]), mask);
  with_level<A>([&](auto) MAFNET_INLINE_LAMBDA {
    if (p.raw.used) {
      const A residue = static_cast<A>(p.raw.max_residue);
      const auto& flow = plan.flow[p.raw.flow_of(plane / p.taps(), p.offset_groups)];
      activate_offsets(b.count, residue, in.dy, flow[1], plan.planes[0], plan.slope[0]);
      activate_offsets(b.count, residue, in.dx, flow[0], plan.planes[1], plan.slope[1]);
      activate_mask(b.count, in.mask, plan.planes[2], plan.slope[2]);
      in = {in.tap_y, in.tap_x, plan.planes[0], plan.planes[1], plan.planes[2]};
    }
    body(in);
  });
}

// Plans taps of which dy, dx and mask lie as they are wanted, in T.
template <typename A, typename T>
void plan_dense(const ModulatedDeformConv2dParams& p, const Block& b, const Place& place, int plane,
                int taps, const Plan<A>& plan, Samples<A>* samples) {
  with_level<A>([&](auto) MAFNET_INLINE_LAMBDA {
    for (int k = 0; k < taps; ++k) {
      const Planes planes = planes_of(p, b, plane + k);
      const auto at = [&](int i) {
        return static_cast<const T*>(planes.at[i].data) + planes.at[i].first;
      };
      plan_corners(p, place, b.count, inputs_of<A>(p, plane + k, at(0), at(1), at(2)), plan,
                   samples[k]);
    }
  });
}

}  // namespace

template <typename A>
void plan_block(const ModulatedDeformConv2dParams& p, const Block& b, Plan<A>& plan) {
  if (p.raw.used) read_flows(p.raw, b, plan);
  int64_t row = b.first / p.out_width;
  int column = static_cast<int>(b.first % p.out_width);
  for (int i = 0; i < b.count;) {
    const int end = std::min(b.count, i + p.out_width - column);
    const A y = static_cast<A>(row * p.stride_h - p.padding_h);
    for (; i < end; ++i, ++column) {
      plan.mask[i] = 1;  // what plan_tap finds where there is no mask
      plan.base_y[i] = y;
      plan.base_x[i] = static_cast<A>(int64_t{column} * p.stride_w - p.padding_w);
    }
    column = 0;
    ++row;
  }
}

template <typename A>
void plan_tap(const ModulatedDeformConv2dParams& p, const Block& b, int plane, Plan<A>& plan) {
  with_inputs(p, b, plane, plan, [&](const Inputs<A>& in) MAFNET_INLINE_LAMBDA {
    plan_positions(p, b.count, in, plan);
  });
}

template <typename A>
void find_corners(const Plan<A>& plan, int count, int width, const Place& place, int64_t* at) {
  const int top = place.rows.low - kBorder, bottom = place.rows.high;
  with_level<A>([&](auto) MAFNET_INLINE_LAMBDA {
#pragma omp simd
    for (int i = 0; i < round_up(count, kChunk); ++i) {
      const int y = plan.y[i] < bottom ? plan.y[i] : bottom;
      const int x = plan.x[i] < width ? plan.x[i] : width;
      at[i] = place.first + (y > top ? y : top) * place.row_stride + x * place.column_stride;
    }
  });
}

template <typename A>
void plan_samples(const ModulatedDeformConv2dParams& p, const Block& b, const Place& place,
                  int plane, int taps, Plan<A>& plan, Samples<A>* samples) {
  constexpr Dtype kDtype = std::is_same_v<A, double> ? Dtype::kFloat64 : Dtype::kFloat32;
  if (!p.raw.used && p.mask != nullptr && b.count % kChunk == 0 && p.offset_stride[2] == 1 &&
      p.mask_stride[2] == 1 && p.offset_dtype == p.mask_dtype) {
    if (p.offset_dtype == kDtype) return plan_dense<A, A>(p, b, place, plane, taps, plan, samples);
    if constexpr (!std::is_same_v<A, double>) {
      if (p.offset_dtype == Dtype::kBFloat16)
        return plan_dense<A, torch::headeronly::BFloat16>(p, b, place, plane, taps, plan, samples);
    }
  }
  for (int k = 0; k < taps; ++k) {
    with_inputs(p, b, plane + k, plan, [&](const Inputs<A>& in) MAFNET_INLINE_LAMBDA {
      plan_corners(p, place, b.count, in, plan, samples[k]);
    });
  }
}

PlaneLines plane_lines(const ModulatedDeformConv2dParams& p, const Block& b, int plane) {
  if (p.mask == nullptr || p.offset_stride[2] != 1 || p.mask_stride[2] != 1) return {};
  const Planes planes = planes_of(p, b, plane);
  const auto begin = [](const Elements<const void*>& of) {
    return static_cast<const char*>(of.data) + of.first * element_bytes(of.dtype);
  };
  const int bytes = static_cast<int>(element_bytes(p.offset_dtype));
  return {begin(planes.at[0]), begin(planes.at[2]), p.offset_stride[1] * bytes,
          p.mask_stride[1] * element_bytes(p.mask_dtype), bytes};
}

template <typename A>
RowRange touched_rows(const ModulatedDeformConv2dParams& p, const Block& b, int offset_group,
                      Plan<A>& plan) {
  int low = p.height, high = -1;  // of the upper rows of the cells
  plan_block(p, b, plan);
  for (int k = 0; k < p.taps(); ++k) {
    if (k + 1 < p.taps()) {
      const Planes next = planes_of(p, b, offset_group * p.taps() + k + 1);
      for (int i = 0; i < (p.mask == nullptr ? 2 : 3); ++i) prefetch(next.at[i], b.count);
    }
    plan_tap(p, b, offset_group * p.taps() + k, plan);
    for (int i = 0; i < b.count; ++i) {
      const bool used =
          plan.y[i] >= -1 && plan.y[i] < p.height && plan.x[i] >= -1 && plan.x[i] < p.width;
      low = std::min(low, used ? plan.y[i] : p.height);
      high = std::max(high, used ? plan.y[i] : -1);
    }
  }
  low = std::max(low, 0);
  return {low, std::clamp(high + 2, low, std::max(low, p.height))};
}

template void plan_block(const ModulatedDeformConv2dParams&, const Block&, Plan<float>&);
template void plan_block(const ModulatedDeformConv2dParams&, const Block&, Plan<double>&);
template void plan_tap(const ModulatedDeformConv2dParams&, const Block&, int, Plan<float>&);
template void plan_tap(const ModulatedDeformConv2dParams&, const Block&, int, Plan<double>&);
template void find_corners(const Plan<float>&, int, int, const Place&, int64_t*);
template void find_corners(const Plan<double>&, int, int, const Place&, int64_t*);
template void plan_samples(const ModulatedDeformConv2dParams&, const Block&, const Place&, int, int,
                           Plan<float>&, Samples<float>*);
template void plan_samples(const ModulatedDeformConv2dParams&, const Block&, const Place&, int, int,
                           Plan<double>&, Samples<double>*);
template RowRange touched_rows(const ModulatedDeformConv2dParams&, const Block&, int, Plan<float>&);
template RowRange touched_rows(const ModulatedDeformConv2dParams&, const Block&, int,
                               Plan<double>&);

}  // namespace mafnet
