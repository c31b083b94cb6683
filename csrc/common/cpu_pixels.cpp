// Pixels from tensors and into them.
#include <algorithm>

#include "common/pixels.h"
#include "common/vectors.h"

namespace mafnet {
namespace {

template <int N>
MAFNET_INLINE void transpose_tile(const float* from, int64_t from_row, float* to, int64_t to_row) {
  VectorOf<float, N> rows[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) rows[i] = load<VectorOf<float, N>>(from + i * from_row);
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) store(to + i * to_row, rows[i]);
}

// Where pixel i and channel c lie: at data[i * pixel + c * channel].
template <typename T>
struct Grid {
  T* data;
  int64_t pixel, channel;

  T* at(int i, int c) const { return data + i * pixel + c * channel; }
};

template <typename From, typename To>
MAFNET_INLINE void convert_run(const From* __restrict from, int count, To* __restrict to) {
  for (int i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

// A copy from any strides to any.
template <typename From, typename To>
void convert_pixels(const Grid<const From>& from, int count, int channels, const Grid<To>& to) {
  using A = std::conditional_t<std::is_same_v<To, double>, double, float>;
  with_level<A>([&](auto) MAFNET_INLINE_LAMBDA {
    if (from.channel == 1 && to.channel == 1) {
      with_channels(channels, [&](auto constant) MAFNET_INLINE_LAMBDA {
        for (int i = 0; i < count; ++i) convert_run(from.at(i, 0), constant, to.at(i, 0));
      });
    } else if (from.pixel == 1 && to.pixel == 1) {
      for (int c = 0; c < channels; ++c) convert_run(from.at(0, c), count, to.at(0, c));
    } else {
      for (int c = 0; c < channels; ++c) {
        for (int i = 0; i < count; ++i) *to.at(i, c) = static_cast<To>(*from.at(i, c));
      }
    }
  });
}

// A copy between planes, whose pixels lie side by side, and channels that do: of each grid one
// stride is 1, and not the same. Tiles of the same channels follow each other, so that their planes
// are read or written in long runs: each is a page of its own.
void transpose_pixels(const Grid<const float>& from, int count, int channels,
                      const Grid<float>& to) {
  with_level<float>([&](auto level) MAFNET_INLINE_LAMBDA {
    int c = 0;
    const auto run = [&](auto size) MAFNET_INLINE_LAMBDA {
      constexpr int N = decltype(size)::value;
      if constexpr (N * sizeof(float) <= decltype(level)::kBytes) {
        for (; c + N <= channels; c += N) {
          int i = 0;
          for (; i + N <= count; i += N) {
            transpose_tile<N>(from.at(i, c), from.pixel * from.channel, to.at(i, c),
                              to.pixel * to.channel);
          }
          for (; i < count; ++i) {
            for (int j = c; j < c + N; ++j) *to.at(i, j) = *from.at(i, j);
          }
        }
      }
    };
    run(std::integral_constant<int, 16>{});
    run(std::integral_constant<int, 8>{});
    run(std::integral_constant<int, 4>{});
    for (; c < channels; ++c) {
      for (int i = 0; i < count; ++i) *to.at(i, c) = *from.at(i, c);
    }
  });
}

// The same of planes in half precision, on either side, which are floats for as long as they are in
// a tile in the first cache.
template <typename From, typename To>
void transpose_halves(const Grid<const From>& from, int count, int channels, const Grid<To>& to) {
  constexpr int kPixels = 128, kChannels = 16;
  alignas(64) float numbers[kChannels * kPixels];
  const Grid<float> tile{numbers, 1, kPixels};
  const Grid<const float> filled{numbers, 1, kPixels};
  for (int first = 0; first < channels; first += kChannels) {
    for (int i = 0; i < count; i += kPixels) {
      const int n = std::min(kPixels, count - i), c = std::min(kChannels, channels - first);
      const Grid<const From> source{from.at(i, first), from.pixel, from.channel};
      const Grid<To> target{to.at(i, first), to.pixel, to.channel};
      if constexpr (std::is_same_v<To, float>) {
        convert_pixels(source, n, c, tile);
        transpose_pixels(filled, n, c, target);
      } else {
        transpose_pixels(source, n, c, tile);
        convert_pixels(filled, n, c, target);
      }
    }
  }
}

template <typename From, typename To>
void copy_pixels(const Grid<const From>& from, int count, int channels, const Grid<To>& to) {
  const bool from_planes = from.pixel == 1 && from.channel != 1 && to.channel == 1;
  const bool to_planes = to.pixel == 1 && to.channel != 1 && from.channel == 1;
  if constexpr (!std::is_same_v<From, double>) {
    if (from_planes || to_planes) {
      if constexpr (std::is_same_v<From, To>) {
        return transpose_pixels(from, count, channels, to);
      } else {
        return transpose_halves(from, count, channels, to);
      }
    }
  }
  convert_pixels(from, count, channels, to);
}

}  // namespace

template <typename A>
void gather_pixels(const Elements<const void*>& from, int count, int channels, A* to,
                   int64_t to_row) {
  with_dtype<A>(from.dtype, [&](auto type) {
    using From = typename decltype(type)::type;
    const From* data = static_cast<const From*>(from.data) + from.first;
    copy_pixels(Grid<const From>{data, from.pixel_stride, from.channel_stride}, count, channels,
                Grid<A>{to, to_row, 1});
  });
}

template <typename A>
void scatter_pixels(const A* from, int64_t from_row, int count, int channels,
                    const Elements<void*>& to) {
  with_dtype<A>(to.dtype, [&](auto type) {
    using To = typename decltype(type)::type;
    To* data = static_cast<To*>(to.data) + to.first;
    copy_pixels(Grid<const A>{from, from_row, 1}, count, channels,
                Grid<To>{data, to.pixel_stride, to.channel_stride});
  });
}

template void gather_pixels(const Elements<const void*>&, int, int, float*, int64_t);
template void gather_pixels(const Elements<const void*>&, int, int, double*, int64_t);
template void scatter_pixels(const float*, int64_t, int, int, const Elements<void*>&);
template void scatter_pixels(const double*, int64_t, int, int, const Elements<void*>&);

}  // namespace mafnet
