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
  const bool as_wanted =
      plane.dtype == (std::is_same_v<A, double> ? Dtype::kFloat64 : Dtype::kFloat32);
  if (as_wanted && plane.pixel_stride == 1 && count % kChunk == 0) {
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

template <typename A>
MAFNET_INLINE void plan_positions(const ModulatedDeformConv2dParams& p, int64_t row_stride,
                                  int64_t column_stride, int count, A tap_y, A tap_x, const A* dy,
                                  const A* dx, const A* mask, Plan<A>& plan) {
  // Copies, of which the compiler knows that no store below changes them.
  const A* base_y = plan.base_y;
  const A* base_x = plan.base_x;
  const A end_y = static_cast<A>(p.height), end_x = static_cast<A>(p.width);
  const unsigned cells_y = static_cast<unsigned>(std::max(p.height - 1, 0));
  const unsigned cells_x = static_cast<unsigned>(std::max(p.width - 1, 0));
  // Whole chunks: beyond count the arrays hold leftovers, which do no harm.
#pragma omp simd
  for (int i = 0; i < round_up(count, kChunk); ++i) {
    // Two pixels outside is as far as it gets. NaN passes the first selects and not the second.
    A y = base_y[i] + tap_y + dy[i], x = base_x[i] + tap_x + dx[i];
    y = y > end_y ? end_y : y;
    x = x > end_x ? end_x : x;
    const A floor_y = std::floor(y > A(-2) ? y : A(-2));
    const A floor_x = std::floor(x > A(-2) ? x : A(-2));
    y = y < A(-2) ? A(-2) : y;
    x = x < A(-2) ? A(-2) : x;
    const A ty = y - floor_y, tx = x - floor_x;  // NaN where y or x is
    const int row = static_cast<int>(floor_y), column = static_cast<int>(floor_x);
    const A m = mask[i];
    const A w1 = ty * m, w0 = (1 - ty) * m;
    plan.weight[0][i] = w0 * (1 - tx);
    plan.weight[1][i] = w0 * tx;
    plan.weight[2][i] = w1 * (1 - tx);
    plan.weight[3][i] = w1 * tx;
    plan.y[i] = row;
    plan.x[i] = column;
    plan.part_y[i] = ty;
    plan.part_x[i] = tx;
    plan.mask[i] = m;
    plan.offset[i] = row * row_stride + column * column_stride;
  }
  // A loop of its own: with the comparisons in the one above the compiler makes scalar code of
  // both.
  for (int chunk = 0; chunk * kChunk < count; ++chunk) {
    int outside = 0;
    for (int i = chunk * kChunk; i < (chunk + 1) * kChunk; ++i) {
      outside |= static_cast<int>(static_cast<unsigned>(plan.y[i]) >= cells_y) |
                 static_cast<int>(static_cast<unsigned>(plan.x[i]) >= cells_x);
    }
    plan.inside[chunk] = outside == 0;
  }
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
void plan_tap(const ModulatedDeformConv2dParams& p, const Block& b, int64_t row_stride,
              int64_t column_stride, int plane, Plan<A>& plan) {
  const int tap = plane % p.taps();
  const A tap_y = static_cast<A>(tap / p.kernel_w * p.dilation_h);
  const A tap_x = static_cast<A>(tap % p.kernel_w * p.dilation_w);
  const Planes planes = planes_of(p, b, plane);
  const A* dy = read_plane<A>(planes.at[0], b.count, plan.planes[0]);
  const A* dx = read_plane<A>(planes.at[1], b.count, plan.planes[1]);
  const A* mask =
      p.mask == nullptr ? plan.mask : read_plane<A>(planes.at[2], b.count, plan.planes[2]);
  if (plane + 1 < p.offset_groups * p.taps()) {
    const Planes next = planes_of(p, b, plane + 1);
    for (int k = 0; k < (p.mask == nullptr ? 2 : 3); ++k) prefetch(next.at[k], b.count);
  }
  with_level<A>([&](auto) MAFNET_INLINE_LAMBDA {
    if (p.raw.used) {
      const A residue = static_cast<A>(p.raw.max_residue);
      const auto& flow = plan.flow[p.raw.flow_of(plane / p.taps(), p.offset_groups)];
      activate_offsets(b.count, residue, dy, flow[1], plan.planes[0], plan.slope[0]);
      activate_offsets(b.count, residue, dx, flow[0], plan.planes[1], plan.slope[1]);
      activate_mask(b.count, mask, plan.planes[2], plan.slope[2]);
      dy = plan.planes[0];
      dx = plan.planes[1];
      mask = plan.planes[2];
    }
    plan_positions(p, row_stride, column_stride, b.count, tap_y, tap_x, dy, dx, mask, plan);
  });
}

template <typename A>
RowRange touched_rows(const ModulatedDeformConv2dParams& p, const Block& b, int offset_group,
                      Plan<A>& plan) {
  int low = p.height, high = -1;  // of the upper rows of the cells
  plan_block(p, b, plan);
  for (int k = 0; k < p.taps(); ++k) {
    plan_tap(p, b, 0, 0, offset_group * p.taps() + k, plan);
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
template void plan_tap(const ModulatedDeformConv2dParams&, const Block&, int64_t, int64_t, int,
                       Plan<float>&);
template void plan_tap(const ModulatedDeformConv2dParams&, const Block&, int64_t, int64_t, int,
                       Plan<double>&);
template RowRange touched_rows(const ModulatedDeformConv2dParams&, const Block&, int, Plan<float>&);
template RowRange touched_rows(const ModulatedDeformConv2dParams&, const Block&, int,
                               Plan<double>&);

}  // namespace mafnet
