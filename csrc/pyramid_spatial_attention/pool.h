// Max and average pooling 3 x 3, stride 2, padding 1, of rows of pixels, and the transpose.
#pragma once

#include "pyramid_spatial_attention/products.h"

namespace mafnet {

// The taps of one output pixel that lie inside the image, in the order of rows and columns.
template <typename Pointer>
struct PoolTaps {
  Pointer at[9];
  int count = 0;
};

// Three rows of input around output row y, from input column `first` on; null outside the image.
template <typename Pointer>
struct PoolRows {
  Pointer at[3];
  int64_t stride;
  int first;
};

template <typename Pointer>
MAFNET_INLINE PoolTaps<Pointer> taps_of(const PoolRows<Pointer>& rows, int x, int width) {
  PoolTaps<Pointer> taps;
  for (int dy = 0; dy < 3; ++dy) {
    if (rows.at[dy] == nullptr) continue;
    for (int column = std::max(2 * x - 1, 0); column <= std::min(2 * x + 1, width - 1); ++column) {
      taps.at[taps.count++] = rows.at[dy] + (column - rows.first) * rows.stride;
    }
  }
  return taps;
}

// max[c], mean[c] of the taps. A NaN wins the maximum, as in PyTorch; it is kept apart, because GCC
// takes vectors to pieces for the disjunction of two comparisons. The mean counts the padding.
template <typename L, typename A, typename Count>
MAFNET_INLINE void pool_pixel(const PoolTaps<const A*>& taps, Count count, int channels, A* max,
                              A* mean) {
  for_channels<L, A>(channels, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
    using V = typename decltype(type)::type;
    V best = load<V>(taps.at[0] + c), sum = best, nan = V{};
    for (int t = 1; t < count; ++t) {
      const V v = load<V>(taps.at[t] + c);
      best = (v > best) ? v : best;  // a NaN that comes first stays
      nan = (v != v) ? v : nan;
      sum += v;
    }
    store<V>(max + c, (nan != nan) ? nan : best);
    store<V>(mean + c, sum / A{9});
  });
}

// features[i] = maxima, then means, of output pixels x ... x + count - 1.
template <typename A>
void pool_row(const PoolRows<const A*>& rows, int x, int count, int width, int channels,
              A* features, int64_t stride) {
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    using L = decltype(level);
    for (int i = 0; i < count; ++i) {
      const auto taps = taps_of(rows, x + i, width);
      A* max = features + i * stride;
      if (taps.count == 9) {
        pool_pixel<L>(taps, std::integral_constant<int, 9>{}, channels, max, max + channels);
      } else {
        pool_pixel<L>(taps, taps.count, channels, max, max + channels);
      }
    }
  });
}

// Adds to the taps' gradients: all of grad_max to the first of the largest (to the last NaN), a
// ninth of grad_mean to each.
template <typename L, typename A>
MAFNET_INLINE void unpool_pixel(const PoolTaps<const A*>& taps, const PoolTaps<A*>& grads,
                                int channels, const A* grad_max, const A* grad_mean) {
  for_channels<L, A>(channels, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
    using V = typename decltype(type)::type;
    V best = load<V>(taps.at[0] + c), winner = V{};
    const V none = V{} - A{1};
    V nan = (best != best) ? winner : none;  // the last NaN
    for (int t = 1; t < taps.count; ++t) {
      const V v = load<V>(taps.at[t] + c), index = V{} + static_cast<A>(t);
      winner = (v > best) ? index : winner;
      best = (v > best) ? v : best;
      nan = (v != v) ? index : nan;
    }
    winner = (nan > none) ? nan : winner;
    const V max = load<V>(grad_max + c), mean = load<V>(grad_mean + c) / A{9};
    const V zero = V{};
    for (int t = 0; t < taps.count; ++t) {
      const V index = V{} + static_cast<A>(t);
      const V part = mean + ((winner == index) ? max : zero);
      store<V>(grads.at[t] + c, load<V>(grads.at[t] + c) + part);
    }
  });
}

// grad_rows += the transpose of pool_row applied to grad_features, for whole rows.
template <typename A>
void unpool_row(const PoolRows<const A*>& rows, const PoolRows<A*>& grad_rows, int count, int width,
                int channels, const A* grad_features, int64_t stride) {
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    for (int i = 0; i < count; ++i) {
      const A* grad = grad_features + i * stride;
      unpool_pixel<decltype(level)>(taps_of(rows, i, width), taps_of(grad_rows, i, width), channels,
                                    grad, grad + channels);
    }
  });
}

// Reads the rows of input that pooling wants.
template <typename A>
class PoolReader {
 public:
  PoolReader(const PyramidConvParams& p, int columns)
      : p_(p), columns_(2 * columns + 1), buffer_(size_t{3} * columns_ * p.channels, false) {}

  // For output pixels x ... x + count - 1 of output row y, count at most `columns`.
  PoolRows<const A*> read(int64_t n, int y, int x, int count) {
    PoolRows<const A*> rows{{nullptr, nullptr, nullptr}, 0, std::max(2 * x - 1, 0)};
    const int end = std::min(2 * (x + count), p_.width);
    for (int dy = 0; dy < 3; ++dy) {
      const int row = 2 * y - 1 + dy;
      if (row < 0 || row >= p_.height) continue;
      const Row<A> read =
          read_row(p_.input, n, row, rows.first, end - rows.first, p_.channels,
                   buffer_.data() + int64_t{dy} * columns_ * p_.channels, p_.channels);
      rows.at[dy] = read.data;
      rows.stride = read.stride;
    }
    return rows;
  }

 private:
  const PyramidConvParams& p_;
  int64_t columns_;
  Buffer<A> buffer_;
};

}  // namespace mafnet
