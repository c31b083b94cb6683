// The inner loops of the backward pass of modulated_deform_conv2d: one tap of a block.
#pragma once

#include <cstdint>

#include "common/vectors.h"
#include "modulated_deform_conv2d/plan.h"

namespace mafnet {

// One tap of a block, in windows with borders of the input and of its gradient.
template <typename A>
struct Tap {
  int count, channels;
  int64_t row_stride, column_stride;  // of both windows
  const A* source;                    // null: nothing is sampled
  const int64_t* source_at;           // of the corners (y, x)
  A* grad_source;                     // null: not wanted
  const int64_t* grad_source_at;
  const A* grad;  // grad_sample
  int64_t grad_row;
  A* columns;  // the samples
  int64_t row;
  A (*dots)[4];  // of the corners with grad_sample
  // Planes for the caches to be told of, a line now and then: those that the next tap reads, and
  // those of its own gradients.
  PlaneLines next, grads;
};

// Takes the samples and their corners' dots with grad_sample, and adds grad_sample to the corners
// of the gradient: either or both.
template <bool kSample, bool kScatter, typename L, typename A, typename Channels>
MAFNET_INLINE void run_tap(const Tap<A> t, const Plan<A>& plan, Channels channels) {
  const int64_t right = t.column_stride, down = t.row_stride;
  for (int i = 0; i < t.count; ++i) {
    if (i % kChunk == 0) {
      t.next.prefetch(i);
      t.grads.prefetch(i);
    }
    const A w0 = plan.weight[0][i], w1 = plan.weight[1][i];
    const A w2 = plan.weight[2][i], w3 = plan.weight[3][i];
    const A *top = nullptr, *grad = t.grad + i * t.grad_row;
    A *column = nullptr, *to = nullptr;
    if constexpr (kSample) {
      top = t.source + t.source_at[i];
      column = t.columns + i * t.row;
    }
    if constexpr (kScatter) to = t.grad_source + t.grad_source_at[i];
    VectorOf<A, 4> sums{};
    for_channels<L, A>(channels, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
      using V = typename decltype(type)::type;
      const V g = load<V>(grad + c);
      if constexpr (kSample) {
        const V v0 = load<V>(top + c), v1 = load<V>(top + right + c);
        const V v2 = load<V>(top + down + c), v3 = load<V>(top + down + right + c);
        store<V>(column + c, w0 * v0 + w1 * v1 + w2 * v2 + w3 * v3);
        sums += sums_of<A, V>(g * v0, g * v1, g * v2, g * v3);
      }
      if constexpr (kScatter) {
        const auto add = [&](A* corner, A weight) MAFNET_INLINE_LAMBDA {
          store<V>(corner, load<V>(corner) + weight * g);
        };
        add(to + c, w0);
        add(to + right + c, w1);
        add(to + down + c, w2);
        add(to + down + right + c, w3);
      }
    });
    if constexpr (kSample) store(t.dots[i], sums);
  }
}

template <typename A>
void run_tap(const Tap<A>& t, const Plan<A>& plan) {
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    with_channels(t.channels, [&](auto channels) MAFNET_INLINE_LAMBDA {
      using L = decltype(level);
      if (t.grad_source == nullptr) return run_tap<true, false, L>(t, plan, channels);
      if (t.source == nullptr) return run_tap<false, true, L>(t, plan, channels);
      run_tap<true, true, L>(t, plan, channels);
    });
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
                                A* const (&grad)[3]) {
  for (int i = 0; i < count; ++i) {
    const A d0 = dots[i][0], d1 = dots[i][1], d2 = dots[i][2], d3 = dots[i][3];
    const A ty = plan.part_y[i], tx = plan.part_x[i], m = plan.mask[i];
    grad[0][i] = m * ((1 - tx) * (d2 - d0) + tx * (d3 - d1));
    grad[1][i] = m * ((1 - ty) * (d1 - d0) + ty * (d3 - d2));
    grad[2][i] = (1 - ty) * ((1 - tx) * d0 + tx * d1) + ty * ((1 - tx) * d2 + tx * d3);
  }
}

}  // namespace mafnet
