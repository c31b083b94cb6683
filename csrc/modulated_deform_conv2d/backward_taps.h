// The inner loops of the backward pass of modulated_deform_conv2d: one tap of a block.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

#include "common/vectors.h"
#include "modulated_deform_conv2d/plan.h"

namespace mafnet {

// The samples of one tap, and their corners' dots with grad_sample.
template <typename L, typename A>
MAFNET_INLINE void gather_tap_at_level(const ModulatedDeformConv2dParams& p, const Block b,
                                       const Source<A> source, const Plan<A>& plan, int channels_,
                                       const A* zeros, const A* grad, int64_t grad_row, A* columns,
                                       int64_t row, A (*dots)[4]) {
  with_channels(channels_, [&](auto channels) MAFNET_INLINE_LAMBDA {
    for_samples(p, b, source, plan, zeros, [&](int i, const Corners<A>& at) MAFNET_INLINE_LAMBDA {
      const A w0 = plan.weight[0][i], w1 = plan.weight[1][i];
      const A w2 = plan.weight[2][i], w3 = plan.weight[3][i];
      VectorOf<A, 4> sums{};
      for_channels<L, A>(channels, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
        using V = typename decltype(type)::type;
        const V v0 = load<V>(at.at[0] + c), v1 = load<V>(at.at[1] + c);
        const V v2 = load<V>(at.at[2] + c), v3 = load<V>(at.at[3] + c);
        const V g = load<V>(grad + i * grad_row + c);
        store<V>(columns + i * row + c, w0 * v0 + w1 * v1 + w2 * v2 + w3 * v3);
        sums += sums_of<A, V>(g * v0, g * v1, g * v2, g * v3);
      });
      store(dots[i], sums);
    });
  });
}

template <typename A>
void gather_tap(const ModulatedDeformConv2dParams& p, const Block& b, const Source<A>& source,
                const Plan<A>& plan, int channels, const A* zeros, const A* grad, int64_t grad_row,
                A* columns, int64_t row, A (*dots)[4]) {
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    gather_tap_at_level<decltype(level)>(p, b, source, plan, channels, zeros, grad, grad_row,
                                         columns, row, dots);
  });
}

// grad_sample of one tap into the corners of grad_input that lie in the band. NaN weights send
// nothing.
template <typename L, typename A>
MAFNET_INLINE void scatter_tap_at_level(const ModulatedDeformConv2dParams& p, const RowRange rows,
                                        const Block b, A* grad_input, A* nowhere,
                                        int64_t row_stride, int64_t column_stride,
                                        const Plan<A>& plan, int channels_, const A* grad,
                                        int64_t grad_row) {
  const int begin_row = rows.low, end_row = rows.high;
  const bool whole = begin_row == 0 && end_row == p.height;
  with_channels(channels_, [&](auto channels) MAFNET_INLINE_LAMBDA {
    const auto add = [&](int i, A* const(&to)[4]) MAFNET_INLINE_LAMBDA {
      for_channels<L, A>(channels, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
        using V = typename decltype(type)::type;
        const V g = load<V>(grad + i * grad_row + c);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          store<V>(to[k] + c, load<V>(to[k] + c) + plan.weight[k][i] * g);
        }
      });
    };
    for (int begin = 0; begin < b.count; begin += kChunk) {
      const int end = std::min(b.count, begin + kChunk);
      bool inside = plan.inside[begin / kChunk];
      if (!whole) {
        int low = INT_MAX, high = INT_MIN;
        for (int i = begin; i < end; ++i) {
          low = std::min(low, plan.y[i]);
          high = std::max(high, plan.y[i]);
        }
        inside = inside && low >= begin_row && high + 1 < end_row;
      }
      if (inside) {
        for (int i = begin; i < end; ++i) {
          A* top = grad_input + plan.offset[i];
          A* bottom = top + row_stride;
          A* const to[4] = {top, top + column_stride, bottom, bottom + column_stride};
          add(i, to);
        }
        continue;
      }
      for (int i = begin; i < end; ++i) {
        A* to[4];
        for (int k = 0; k < 4; ++k) {
          const int y = plan.y[i] + k / 2;
          const bool used = corner_is_inside(p.height, p.width, plan.y[i], plan.x[i], k) &&
                            y >= begin_row && y < end_row;
          to[k] = used ? grad_input + plan.offset[i] + k / 2 * row_stride + k % 2 * column_stride
                       : nowhere;
        }
        if (plan.part_y[i] == plan.part_y[i] && plan.part_x[i] == plan.part_x[i]) add(i, to);
      }
    }
  });
}

template <typename A>
void scatter_tap(const ModulatedDeformConv2dParams& p, const RowRange rows, const Block& b,
                 A* grad_input, A* nowhere, int64_t row_stride, int64_t column_stride,
                 const Plan<A>& plan, int channels, const A* grad, int64_t grad_row) {
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    scatter_tap_at_level<decltype(level)>(p, rows, b, grad_input, nowhere, row_stride,
                                          column_stride, plan, channels, grad, grad_row);
  });
}

// Adds a twin's dots to those of the first.
template <typename A>
void add_dots(int count, const A (*from)[4], A (*to)[4]) {
  for (int i = 0; i < count; ++i) {
    for (int k = 0; k < 4; ++k) to[i][k] += from[i][k];
  }
}

// grad[0..2] = of dy, dx and mask, from the dots of the corners. Those outside have dot 0, so that
// the slopes of all cells are alike; at an integer that is the slope of the cell [n, n + 1).
template <typename A>
MAFNET_INLINE void combine_dots(int count, const Plan<A>& plan, const A (*dots)[4],
                                A (*grad)[kMaxBlock]) {
  for (int i = 0; i < count; ++i) {
    const A d0 = dots[i][0], d1 = dots[i][1], d2 = dots[i][2], d3 = dots[i][3];
    const A ty = plan.part_y[i], tx = plan.part_x[i], m = plan.mask[i];
    grad[0][i] = m * ((1 - tx) * (d2 - d0) + tx * (d3 - d1));
    grad[1][i] = m * ((1 - ty) * (d1 - d0) + ty * (d3 - d2));
    grad[2][i] = (1 - ty) * ((1 - tx) * d0 + tx * d1) + ty * ((1 - tx) * d2 + tx * d3);
  }
}

}  // namespace mafnet
