// What the convolutions of pyramid spatial attention multiply by their weights. Each kind gives,
// for an output pixel, a tap and a group of channels, the group of each of its kParts parts. Values
// that are made of others (pooled, resized, times a slope) are never stored.
#pragma once

#include <cmath>

#include "pyramid_spatial_attention/image.cuh"

namespace mafnet {

template <int N, typename A>
DEVICE void clear(A (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = 0;
}

// The neighbour that tap 0 ... 8 stands for, or of one tap the pixel itself.
DEVICE Place neighbour(const Place& place, int tap, int taps) {
  const int centre = taps / 9;
  return {place.n, place.y + tap / 3 - centre, place.x + tap % 3 - centre};
}

DEVICE bool is_inside(const Place& place, int height, int width) {
  return static_cast<unsigned>(place.y) < static_cast<unsigned>(height) &&
         static_cast<unsigned>(place.x) < static_cast<unsigned>(width);
}

// The pixels of an image, zeros outside of it.
template <typename T>
struct Pixels {
  static constexpr int kParts = 1;
  View<const T> image;
  int height, width, taps;

  bool vectors() const { return image.vectors; }
  bool channels_last() const { return image.stride[1] == 1; }

  template <Access kAccess = Access::kEither, int N, typename A>
  DEVICE void load(const Place& place, int tap, int c, A (&values)[1][N]) const {
    const Place from = neighbour(place, tap, taps);
    if (is_inside(from, height, width)) {
      read_group<kAccess>(image, from, c, values[0]);
    } else {
      clear(values[0]);
    }
  }
};

// The gradients of what an activation got, told from its output: the slope is not negative, so that
// only a positive argument gives a positive output.
template <typename T>
struct Slopes {
  static constexpr int kParts = 1;
  View<const T> gradient, output;
  int height, width, taps;
  double slope;

  bool vectors() const { return gradient.vectors && output.vectors; }
  bool channels_last() const { return gradient.stride[1] == 1; }

  template <Access kAccess = Access::kEither, int N, typename A>
  DEVICE void load(const Place& place, int tap, int c, A (&values)[1][N]) const {
    const Place from = neighbour(place, tap, taps);
    if (!is_inside(from, height, width)) return clear(values[0]);
    A signs[N];
    read_group<kAccess>(gradient, from, c, values[0]);
    read_group<kAccess>(output, from, c, signs);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[0][i] *= signs[i] > 0 ? A(1) : static_cast<A>(slope);
    }
  }
};

// Maximum and mean of 3 x 3 pixels at stride 2, padding 1; the mean counts the padding.
template <typename T>
struct Pooled {
  static constexpr int kParts = 2;
  View<const T> image;
  int height, width;

  bool vectors() const { return image.vectors; }
  bool channels_last() const { return image.stride[1] == 1; }

  template <Access kAccess = Access::kEither, int N, typename A>
  DEVICE void load(const Place& place, int, int c, A (&values)[2][N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[0][i] = static_cast<A>(-INFINITY);
      values[1][i] = 0;
    }
#pragma unroll 1
    for (int row = 2 * place.y - 1; row <= 2 * place.y + 1; ++row) {
#pragma unroll
      for (int column = -1; column <= 1; ++column) {
        const Place from{place.n, row, 2 * place.x + column};
        if (!is_inside(from, height, width)) continue;
        A some[N];
        read_group<kAccess>(image, from, c, some);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          values[0][i] = larger(values[0][i], some[i]);
          values[1][i] += some[i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) values[1][i] /= 9;
  }
};

// The same under the taps of a 3 x 3 kernel, zeros outside of the pooled map.
template <typename T>
struct PooledMap {
  static constexpr int kParts = 2;
  Pooled<T> pooled;
  int height, width;  // of the pooled map

  bool vectors() const { return pooled.vectors(); }
  bool channels_last() const { return pooled.channels_last(); }

  template <Access kAccess = Access::kEither, int N, typename A>
  DEVICE void load(const Place& place, int tap, int c, A (&values)[2][N]) const {
    const Place at = neighbour(place, tap, 9);
    pooled.template load<kAccess>(at, 0, c, values);  // of what lies in the image
    if (!is_inside(at, height, width)) {
      clear(values[0]);
      clear(values[1]);
    }
  }
};

// Features that cost too much to be made again at each of the nine taps.
template <typename Features>
constexpr bool kMadeOnce = false;
template <typename T>
constexpr bool kMadeOnce<PooledMap<T>> = true;

// Along one axis of a bilinear resize, half-pixel centres: an output is made of `low` and the next.
template <typename A>
struct Blend {
  int low;
  A weight[2];
};

template <typename A>
DEVICE Blend<A> blend_of(int i, int inputs, A scale) {
  const A position = max((static_cast<A>(i) + A(0.5)) * scale - A(0.5), A(0));
  const int low = min(static_cast<int>(position), inputs - 1);
  const A fraction = low + 1 < inputs ? min(position - static_cast<A>(low), A(1)) : A(0);
  return {low, {1 - fraction, fraction}};
}

// The group of a resized image at output pixel (y, x), by the blends of both axes. A pixel without
// weight does not count, not even an infinite one.
template <Access kAccess, typename T, int N, typename A>
DEVICE void resize_group(const View<const T>& image, int64_t n, const Blend<A>& rows,
                         const Blend<A>& columns, int c, A (&values)[N]) {
  clear(values);
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const A weight = rows.weight[corner / 2] * columns.weight[corner % 2];
    if (weight == 0) continue;
    A some[N];
    read_group<kAccess>(image, {n, rows.low + corner / 2, columns.low + corner % 2}, c, some);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += weight * some[i];
  }
}

// The pixels of a resized image, zeros outside of it.
template <typename T>
struct Resized {
  static constexpr int kParts = 1;
  View<const T> image;
  int height, width, out_height, out_width, taps;

  bool vectors() const { return image.vectors; }
  bool channels_last() const { return image.stride[1] == 1; }

  template <Access kAccess = Access::kEither, int N, typename A>
  DEVICE void load(const Place& place, int tap, int c, A (&values)[1][N]) const {
    const Place at = neighbour(place, tap, taps);
    if (!is_inside(at, out_height, out_width)) return clear(values[0]);
    const auto rows = blend_of(at.y, height, static_cast<A>(height) / static_cast<A>(out_height));
    const auto columns = blend_of(at.x, width, static_cast<A>(width) / static_cast<A>(out_width));
    resize_group<kAccess>(image, place.n, rows, columns, c, values[0]);
  }
};

// The pixels of a resized image and of another of that size, added.
template <typename T>
struct ResizedSum {
  static constexpr int kParts = 1;
  Resized<T> resized;
  View<const T> other;

  bool vectors() const { return resized.vectors() && other.vectors; }
  bool channels_last() const { return other.stride[1] == 1; }

  template <Access kAccess = Access::kEither, int N, typename A>
  DEVICE void load(const Place& place, int tap, int c, A (&values)[1][N]) const {
    A added[N];
    resized.template load<kAccess>(place, tap, c, values);
    read_group<kAccess>(other, place, c, added);
#pragma unroll
    for (int i = 0; i < N; ++i) values[0][i] += added[i];
  }
};

}  // namespace mafnet
