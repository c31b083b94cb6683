// Rows of pixels, what the CPU kernels of pyramid spatial attention are made of. Rows are dense in
// the accumulators' type A, float or double, in the caches; tensors have any dtype and strides.
#pragma once

#include <algorithm>

#include "common/fresh_memory.h"
#include "common/gemm.h"
#include "common/parallel.h"
#include "common/pixels.h"
#include "common/stored.h"
#include "common/vectors.h"
#include "pyramid_spatial_attention/params.h"

namespace mafnet {

constexpr int padded_columns(int columns) { return round_up(columns, kColumnPad); }
// A multiple of the rows of every tile, of floats and of bfloat16.
constexpr int padded_rows(int rows) { return round_up(rows, 2 * kRowPad); }

using torch::headeronly::BFloat16;

// Of T, one of double, float and BFloat16.
template <typename T>
constexpr Dtype kDense = sizeof(T) == 8   ? Dtype::kFloat64
                         : sizeof(T) == 4 ? Dtype::kFloat32
                                          : Dtype::kBFloat16;

// Pixel i of a row has its channels at data + i * stride.
template <typename A>
struct Row {
  const A* data;
  int64_t stride;
};

template <typename Pointer>
int64_t element_at(const ImageOf<Pointer>& image, int64_t n, int64_t y, int64_t x) {
  return n * image.stride[0] + y * image.stride[2] + x * image.stride[3];
}

// Whether the channels of an image lie side by side as elements of type T.
template <typename T, typename Pointer>
bool lies_as(const ImageOf<Pointer>& image) {
  return image.dtype == kDense<T> && image.stride[1] == 1;
}

// The first channel of a pixel of an image that lies as T.
template <typename T>
const T* pixel_at(const Source& image, int64_t n, int64_t y, int64_t x) {
  return static_cast<const T*>(image.data) + element_at(image, n, y, x);
}
template <typename T>
T* pixel_at(const Target& image, int64_t n, int64_t y, int64_t x) {
  return static_cast<T*>(image.data) + element_at(image, n, y, x);
}

// The pixels (y, x) ... (y, x + count - 1) where they lie, if that is in channels of type A side by
// side, else gathered into buffer.
template <typename A>
Row<A> read_row(const Source& image, int64_t n, int64_t y, int64_t x, int count, int channels,
                A* buffer, int64_t buffer_stride) {
  if (lies_as<A>(image)) return {pixel_at<A>(image, n, y, x), image.stride[3]};
  const int64_t first = element_at(image, n, y, x);
  gather_pixels({image.data, image.dtype, first, image.stride[3], image.stride[1]}, count, channels,
                buffer, buffer_stride);
  return {buffer, buffer_stride};
}

// The same where T is A; pixels of another type T are read where they lie.
template <typename T, typename A>
Row<T> row_as(const Source& image, int64_t n, int64_t y, int64_t x, int count, int channels,
              A* buffer, int64_t buffer_stride) {
  if constexpr (std::is_same_v<T, A>) {
    return read_row(image, n, y, x, count, channels, buffer, buffer_stride);
  } else {
    return {pixel_at<T>(image, n, y, x), image.stride[3]};
  }
}

// As read_row, but always into buffer: for products, which read beyond the last row.
template <typename A>
void copy_row(const Source& image, int64_t n, int64_t y, int64_t x, int count, int channels,
              A* buffer, int64_t buffer_stride) {
  gather_pixels(
      {image.data, image.dtype, element_at(image, n, y, x), image.stride[3], image.stride[1]},
      count, channels, buffer, buffer_stride);
}

// Rows for a product that reads `columns` elements of each: where they lie, if these are its
// channels and the rows that it reads beyond the last are pixels, too.
template <typename A>
Row<A> rows_of(const Source& image, int64_t n, int64_t y, int64_t x, int count, int width,
               int channels, int columns, A* buffer, int64_t buffer_stride) {
  if (columns == channels && x + padded_rows(count) <= width) {
    return read_row(image, n, y, x, count, channels, buffer, buffer_stride);
  }
  copy_row(image, n, y, x, count, channels, buffer, buffer_stride);
  return {buffer, buffer_stride};
}

template <typename A>
void write_row(const A* rows, int64_t rows_stride, int count, int channels, const Target& image,
               int64_t n, int64_t y, int64_t x) {
  scatter_pixels(
      rows, rows_stride, count, channels,
      {image.data, image.dtype, element_at(image, n, y, x), image.stride[3], image.stride[1]});
}

inline Source as_source(const Target& image) {
  Source source{image.data, image.dtype, {}};
  std::copy_n(image.stride, 4, source.stride);
  return source;
}

// What a convolution adds to its sums, zeros without a bias.
template <typename A>
void load_bias(const void* bias, Dtype dtype, int count, A* to) {
  if (bias != nullptr) gather_pixels({bias, dtype, 0, 0, 1}, 1, count, to, 0);
}

// leaky_relu of a vector, for a slope that is not negative.
template <typename V, typename A>
MAFNET_INLINE V leaky_relu(const V& v, A slope) {
  const V small = slope * v;
  return (v > V{}) ? v : small;
}

// Calls body(Type<V>{}, c) for vectors V of the channels 0 ... channels - 1 of rows 0 ... count
// - 1. What body captures by value stays in registers: stores of vectors might change anything in
// memory.
template <typename A, typename Body>
void for_rows(int count, int channels, const Body& body) {
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    const Body own = body;
    const int rows = count, columns = channels;
    for (int i = 0; i < rows; ++i) {
      for_channels<decltype(level), A>(
          columns, [&](auto type, int c) MAFNET_INLINE_LAMBDA { own(type, i, c); });
    }
  });
}

// image = leaky_relu(rows + bias); rows are lost.
template <typename A>
void write_activated(A* rows, int64_t stride, int count, int channels, const A* bias, A slope,
                     const Target& image, int64_t n, int64_t y, int64_t x) {
  const auto write = [&](auto* to, int64_t to_stride) {
    for_rows<A>(count, channels, [=](auto type, int i, int c) MAFNET_INLINE_LAMBDA {
      using V = typename decltype(type)::type;
      const V sum = load<V>(rows + i * stride + c) + load<V>(bias + c);
      store_stored<V>(to + i * to_stride + c, leaky_relu(sum, slope));
    });
  };
  if (lies_as<A>(image)) return write(pixel_at<A>(image, n, y, x), image.stride[3]);
  if constexpr (sizeof(A) == 4) {
    if (lies_as<BFloat16>(image)) return write(pixel_at<BFloat16>(image, n, y, x), image.stride[3]);
  }
  write(rows, stride);
  write_row(rows, stride, count, channels, image, n, y, x);
}

// grads = grad_output times the slope of leaky_relu, told from its output: the slope is not
// negative, so that only a positive argument gives a positive output. buffer has room for the
// pixels.
template <typename A>
void read_gradients(const Source& grad_output, const Source& output, int64_t n, int64_t y,
                    int64_t x, int count, int channels, A slope, A* grads, int64_t stride,
                    A* buffer) {
  if (slope == A{1}) return copy_row(grad_output, n, y, x, count, channels, grads, stride);
  const auto read = [&](auto* from, int64_t from_stride, auto* out, int64_t out_stride) {
    for_rows<A>(count, channels, [=](auto type, int i, int c) MAFNET_INLINE_LAMBDA {
      using V = typename decltype(type)::type;
      const V g = load_stored<V>(from + i * from_stride + c), small = slope * g;
      const V result = load_stored<V>(out + i * out_stride + c);
      store<V>(grads + i * stride + c, (result > V{}) ? g : small);
    });
  };
  if constexpr (sizeof(A) == 4) {
    if (lies_as<BFloat16>(grad_output) && lies_as<BFloat16>(output)) {
      return read(pixel_at<BFloat16>(grad_output, n, y, x), grad_output.stride[3],
                  pixel_at<BFloat16>(output, n, y, x), output.stride[3]);
    }
  }
  const Row<A> grad = read_row(grad_output, n, y, x, count, channels, grads, stride);
  const Row<A> result = read_row(output, n, y, x, count, channels, buffer, stride);
  read(grad.data, grad.stride, result.data, result.stride);
}

template <typename A>
void add_rows(const A* rows, int64_t stride, int count, int columns, A* sums) {
  for_rows<A>(count, columns, [=](auto type, int i, int c) MAFNET_INLINE_LAMBDA {
    using V = typename decltype(type)::type;
    store<V>(sums + c, load<V>(sums + c) + load<V>(rows + i * stride + c));
  });
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bodies of launchers: body(A{}) with the accumulators' type of dtype.
template <typename Body>
int with_accumulator(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kFloat64) {
    body(double{});
  } else {
    body(float{});
  }
  return 0;
}

// Of an output that is written from end to end, see common/fresh_memory.h. Whether whole lines of
// it are better stored around the caches: then pixels (or rows of planes) begin at lines.
inline bool prepare(const Target& image, int64_t batch, int64_t elements) {
  const int64_t bytes = element_bytes(image.dtype);
  int64_t begins = reinterpret_cast<int64_t>(image.data);
  for (const int64_t stride : image.stride) begins |= stride == 1 ? 0 : stride * bytes;
  prepare_output(image.data, batch * elements * bytes);
  return batch * elements * bytes >= kLargeOutput && begins % 64 == 0;
}

}  // namespace mafnet
