// How the CUDA kernels of pyramid spatial attention read and write images: groups of neighbouring
// channels of one pixel, as 16-byte vectors where channels lie side by side and all is aligned, and
// one by one at any other strides.
#pragma once

#include "common/prims.cuh"
#include "pyramid_spatial_attention/params.h"

namespace mafnet {

constexpr int kThreads = 256;  // of a block, in every kernel: 8 warps

struct Place {
  int64_t n;
  int y, x;
};

// Of pixel number `pixel`, counted over all images in raster order.
DEVICE Place place_of(int64_t pixel, int height, int width) {
  const int64_t line = pixel / width, n = line / height;
  return {n, static_cast<int>(line - n * height), static_cast<int>(pixel - line * width)};
}

// The pixel `step` after place.
DEVICE void advance(Place& place, int step, int height, int width) {
  place.x += step;
  while (place.x >= width) {
    place.x -= width;
    if (++place.y == height) {
      place.y = 0;
      ++place.n;
    }
  }
}

// An image of elements T, which is const for a source.
template <typename T>
struct View {
  T* data;
  int64_t stride[4];
  int channels;
  bool vectors;  // groups of channels are aligned and complete

  DEVICE T* at(const Place& place, int c) const {
    return data + place.n * stride[0] + place.y * stride[2] + place.x * stride[3] + c * stride[1];
  }
};

// The elements of a load or store: at most 16 bytes.
template <typename T, int N>
constexpr bool kIsOneVector = N * sizeof(T) <= 16;
template <typename T, int N>
constexpr int kVector = kIsOneVector<T, N> ? N : 16 / sizeof(T);

// What a kernel is compiled for: groups that are vectors in all its images, groups read one by one,
// or either, as each view says.
enum class Access { kVectors, kSingles, kEither };

template <Access kAccess, typename T>
DEVICE bool is_vector(const View<T>& view, int c) {
  const bool may_be = kAccess == Access::kVectors || (kAccess == Access::kEither && view.vectors);
  return may_be && c < view.channels;
}

// values = channels c ... c + N - 1; zeros past the last.
template <Access kAccess = Access::kEither, typename T, int N, typename A>
DEVICE void read_group(const View<const T>& view, const Place& place, int c, A (&values)[N]) {
  constexpr int V = kVector<T, N>;
  const T* from = view.at(place, c);
  if (is_vector<kAccess>(view, c)) {
#pragma unroll
    for (int i = 0; i < N; i += V) {
      const Vector<T, V> some = load_vector<T, V>(from + i);
#pragma unroll
      for (int v = 0; v < V; ++v) values[i + v] = to_accumulator(some.at[v]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool known = kAccess != Access::kVectors && c + i < view.channels;
      values[i] = known ? A(to_accumulator(from[i * view.stride[1]])) : A(0);
    }
  }
}

template <Access kAccess = Access::kEither, typename T, int N, typename A>
DEVICE void write_group(const View<T>& view, const Place& place, int c, const A (&values)[N]) {
  constexpr int V = kVector<T, N>;
  T* to = view.at(place, c);
  if (is_vector<kAccess>(view, c)) {
#pragma unroll
    for (int i = 0; i < N; i += V) {
      Vector<T, V> some;
#pragma unroll
      for (int v = 0; v < V; ++v) some.at[v] = from_accumulator<T>(values[i + v]);
      store_vector(to + i, some);
    }
  } else if (kAccess != Access::kVectors) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (c + i < view.channels) to[i * view.stride[1]] = from_accumulator<T>(values[i]);
    }
  }
}

// A view for groups of N channels. T is the type of the image's elements.
template <typename T, int N, typename Pointer>
View<T> view_of(const ImageOf<Pointer>& image, int channels) {
  constexpr int64_t kAligned = 16 / sizeof(T);
  View<T> view{static_cast<T*>(image.data), {}, channels, false};
  for (int d = 0; d < 4; ++d) view.stride[d] = image.stride[d];
  view.vectors = image.stride[1] == 1 && channels % N == 0 &&
                 reinterpret_cast<uintptr_t>(image.data) % 16 == 0 &&
                 image.stride[0] % kAligned == 0 && image.stride[2] % kAligned == 0 &&
                 image.stride[3] % kAligned == 0;
  return view;
}

// A view of dense workspace, channels last.
template <typename T, int N, typename Element>
View<T> view_of_rows(Element* data, int height, int width, int channels) {
  const int64_t row = int64_t{width} * channels;
  return {data, {height * row, 1, row, channels}, channels, channels % N == 0};
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Launches kernel(arguments...) with one thread per item, if there is any.
template <typename Kernel, typename... Arguments>
int launch_items(Kernel* kernel, int64_t items, void* stream, const Arguments&... arguments) {
  if (items == 0) return 0;
  const dim3 grid(static_cast<unsigned>(divide_up(items, kThreads)));
  return launch(kernel, grid, dim3(kThreads), 0, stream, arguments...);
}

// What one thread of an elementwise kernel owns: a group of channels of a pixel. Neighbouring
// threads take what lies side by side: groups where channels are last, else pixels.
struct Item {
  int64_t pixel;
  int c;
};

template <int N>
DEVICE Item item_of(int64_t index, int64_t pixels, int channels, bool channels_last) {
  const int groups = (channels + N - 1) / N;
  if (channels_last) return {index / groups, static_cast<int>(index % groups) * N};
  return {index % pixels, static_cast<int>(index / pixels) * N};
}

template <int N>
int64_t item_count(int64_t pixels, int channels) {
  return pixels * divide_up(channels, N);
}

// The channels of an elementwise thread: 16 bytes, or two times 16 of double.
template <typename T>
constexpr int kGroup = 4 * sizeof(Accumulator<T>) / sizeof(T);

// The largest of what came before and v; a NaN wins, as in PyTorch.
template <typename A>
DEVICE A larger(A best, A v) {
  return v > best || v != v ? v : best;
}

template <typename A>
DEVICE A leaky_relu(A v, A slope) {
  return v > 0 ? v : slope * v;
}

}  // namespace mafnet
