// Max and average pooling 3 x 3, stride 2, padding 1, of rows of pixels, and the transpose.
#pragma once

#include <limits>

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
template <typename L, typename A, typename T, typename To>
MAFNET_INLINE void pool_pixel(const PoolTaps<const T*>& taps, int channels, To* max, To* mean) {
  for_channels<L, A>(channels, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
    using V = typename decltype(type)::type;
    V best = load_stored<V>(taps.at[0] + c), sum = best, nan = V{};
    for (int t = 1; t < taps.count; ++t) {
      const V v = load_stored<V>(taps.at[t] + c);
      best = larger_of(best, v);  // a NaN that comes first stays
      nan = (v != v) ? v : nan;
      sum += v;
    }
    store_stored<V>(max + c, (nan != nan) ? nan : best);
    store_stored<V>(mean + c, sum / A{9});
  });
}

// The same for kVectors vectors V of channels and `count` pixels that follow each other, of kRows
// rows of `columns` pixels, the first of which is the left tap of the first. A column is summed up
// once and serves two pixels. False, and the results are void, where a number is not finite.
template <typename V, int kVectors, int kRows, typename A, typename T, typename To, typename Put>
MAFNET_INLINE bool pool_columns(const T* const* rows, int64_t row_stride, bool has_left,
                                int columns, int count, To* max, To* mean, int64_t stride,
                                const Put& put) {
  constexpr int kLanes = sizeof(V) / sizeof(A);
  struct Column {
    V best[kVectors], sum[kVectors];
  };
  const T* at[kRows];
  std::copy_n(rows, kRows, at);
  const auto read = [&](int column) MAFNET_INLINE_LAMBDA {
    Column all;
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      const int64_t from = column * row_stride + k * kLanes;
      all.best[k] = all.sum[k] = load_stored<V>(at[0] + from);
#pragma GCC unroll 2
      for (int row = 1; row < kRows; ++row) {
        const V v = load_stored<V>(at[row] + from);
        all.best[k] = larger_of(all.best[k], v);
        all.sum[k] += v;
      }
    }
    return all;
  };
  const auto join = [](Column& to, const Column& other) MAFNET_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      to.best[k] = larger_of(to.best[k], other.best[k]);
      to.sum[k] += other.sum[k];
    }
  };
  V trace{};  // NaN as soon as a sum is not finite
  const auto write = [&](const Column& all, int i) MAFNET_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      put(max + i * stride + k * kLanes, all.best[k]);
      put(mean + i * stride + k * kLanes, V(all.sum[k] / A{9}));
      trace += all.sum[k] * A{0};
    }
  };
  int column = 0;
  Column left;
  if (has_left) {
    left = read(column++);
  } else {
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      left.best[k] = -std::numeric_limits<A>::infinity() - V{};
      left.sum[k] = V{};
    }
  }
  int i = 0;
  for (; column + 2 <= columns; column += 2, ++i) {
    const Column right = read(column + 1);
    join(left, read(column));
    join(left, right);
    write(left, i);
    left = right;
  }
  if (i < count) {  // the last column of an odd width
    join(left, read(column));
    write(left, i);
  }
  A lanes[kLanes];
  store(lanes, trace);
  bool finite = true;
  for (const A lane : lanes) finite &= lane == lane;
  return finite;
}

template <typename L, int kRows, typename A, typename T, typename To, typename Put>
MAFNET_INLINE bool pool_channels(const T* const* rows, int64_t row_stride, bool has_left,
                                 int columns, int count, int channels, To* features, int64_t stride,
                                 const Put& put) {
  constexpr int kLanes = L::kBytes / sizeof(A), kVectors = L::kTileVectors;
  bool finite = true;
  int c = 0;
  const auto run = [&](auto type, auto vectors, int at) MAFNET_INLINE_LAMBDA {
    const T* moved[kRows];
    for (int row = 0; row < kRows; ++row) moved[row] = rows[row] + at;
    finite &= pool_columns<typename decltype(type)::type, decltype(vectors)::value, kRows, A>(
        moved, row_stride, has_left, columns, count, features + at, features + channels + at,
        stride, put);
  };
  for (; c + kVectors * kLanes <= channels; c += kVectors * kLanes) {
    run(Type<VectorOf<A, kLanes>>{}, std::integral_constant<int, kVectors>{}, c);
  }
  for_channels<L, A>(channels - c, [&](auto type, int more) MAFNET_INLINE_LAMBDA {
    run(type, std::integral_constant<int, 1>{}, c + more);
  });
  return finite;
}

// features[i] = maxima, then means, of output pixels x ... x + count - 1, by put(to, vector).
template <typename A, typename T, typename To, typename Put>
void pool_row(const PoolRows<const T*>& rows, int x, int count, int width, int channels,
              To* features, int64_t stride, const Put& put) {
  const T* inside[3];
  int number = 0;
  for (const T* row : rows.at) {
    if (row != nullptr) inside[number++] = row;
  }
  const int columns = std::min(2 * (x + count), width) - rows.first;
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    using L = decltype(level);
    const auto fast = [&](auto constant) MAFNET_INLINE_LAMBDA {
      return pool_channels<L, decltype(constant)::value, A>(inside, rows.stride, x > 0, columns,
                                                            count, channels, features, stride, put);
    };
    const bool done = number == 3   ? fast(std::integral_constant<int, 3>{})
                      : number == 2 ? fast(std::integral_constant<int, 2>{})
                                    : fast(std::integral_constant<int, 1>{});
    for (int i = 0; i < count && !done; ++i) {
      To* max = features + i * stride;
      pool_pixel<L, A>(taps_of(rows, x + i, width), channels, max, max + channels);
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

  // For output pixels x ... x + count - 1 of output row y, count at most `columns`. T is A, or
  // BFloat16 where the input lies so.
  template <typename T>
  PoolRows<const T*> read(int64_t n, int y, int x, int count) {
    PoolRows<const T*> rows{{nullptr, nullptr, nullptr}, 0, std::max(2 * x - 1, 0)};
    const int end = std::min(2 * (x + count), p_.width);
    for (int dy = 0; dy < 3; ++dy) {
      const int row = 2 * y - 1 + dy;
      if (row < 0 || row >= p_.height) continue;
      if constexpr (!std::is_same_v<T, A>) {
        rows.at[dy] = pixel_at<T>(p_.input, n, row, rows.first);
        rows.stride = p_.input.stride[3];
      } else {
        const Row<A> read =
            read_row(p_.input, n, row, rows.first, end - rows.first, p_.channels,
                     buffer_.data() + int64_t{dy} * columns_ * p_.channels, p_.channels);
        rows.at[dy] = read.data;
        rows.stride = read.stride;
      }
    }
    return rows;
  }

 private:
  const PyramidConvParams& p_;
  int64_t columns_;
  Buffer<A> buffer_;
};

}  // namespace mafnet
