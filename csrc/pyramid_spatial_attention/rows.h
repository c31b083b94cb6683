// Rows of pixels and products of their channels with a weight: what the CPU kernels of pyramid
// spatial attention are made of. Rows are dense in the accumulators' type A, float or double, in
// the caches; tensors have any dtype and strides.
#pragma once

#include <algorithm>

#include "common/fresh_memory.h"
#include "common/gemm.h"
#include "common/gemm_bf16.h"
#include "common/parallel.h"
#include "common/pixels.h"
#include "common/vectors.h"
#include "pyramid_spatial_attention/params.h"

namespace mafnet {

constexpr int padded_columns(int columns) { return round_up(columns, kColumnPad); }
// A multiple of the rows of every tile, of floats and of bfloat16.
constexpr int padded_rows(int rows) { return round_up(rows, 2 * kRowPad); }

template <typename A>
constexpr Dtype kDense = sizeof(A) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;

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

// The pixels (y, x) ... (y, x + count - 1) where they lie, if that is in channels of type A side by
// side, else gathered into buffer.
template <typename A>
Row<A> read_row(const Source& image, int64_t n, int64_t y, int64_t x, int count, int channels,
                A* buffer, int64_t buffer_stride) {
  const int64_t first = element_at(image, n, y, x);
  if (image.dtype == kDense<A> && image.stride[1] == 1) {
    return {static_cast<const A*>(image.data) + first, image.stride[3]};
  }
  gather_pixels({image.data, image.dtype, first, image.stride[3], image.stride[1]}, count, channels,
                buffer, buffer_stride);
  return {buffer, buffer_stride};
}

// As read_row, but always into buffer: for products, which read beyond the last row.
template <typename A>
void copy_row(const Source& image, int64_t n, int64_t y, int64_t x, int count, int channels,
              A* buffer, int64_t buffer_stride) {
  gather_pixels(
      {image.data, image.dtype, element_at(image, n, y, x), image.stride[3], image.stride[1]},
      count, channels, buffer, buffer_stride);
}

// Rows for a product: where they lie, if the rows that it reads beyond the last are pixels, too.
template <typename A>
Row<A> rows_of(const Source& image, int64_t n, int64_t y, int64_t x, int count, int width,
               int channels, A* buffer, int64_t buffer_stride) {
  if (x + padded_rows(count) <= width) {
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

// A matrix (depth x columns) that rows are multiplied by.
template <typename A>
class Product {
 public:
  Product(int depth, int columns, Dtype dtype)
      : depth_(depth),
        columns_(padded_columns(columns)),
        weight_(static_cast<size_t>(depth) * columns_),
        packed_(0),
        in_bf16_(dtype == Dtype::kBFloat16 && has_bf16_products()) {}

  int columns() const { return columns_; }

  // Elements rows x count of the matrix from a weight of some dtype.
  void load(const Elements<const void*>& from, int rows, int count, int row, int column) {
    gather_pixels(from, rows, count, weight_.data() + int64_t{row} * columns_ + column, columns_);
  }
  // Call once after the last load.
  void pack() {
    if constexpr (sizeof(A) == 4) {
      if (!in_bf16_) return;
      packed_.resize(bf16_elements(columns_, depth_), false);
      pack_bf16_columns(weight_.data(), columns_, depth_, columns_, packed_.data());
    }
  }

  // Elements of scratch that add() wants for count rows.
  size_t scratch(int count) const {
    return in_bf16_ ? bf16_elements(padded_rows(count), depth_) : 0;
  }

  // sums += rows * matrix. Rows and sums have room for padded_rows(count).
  void add(const A* rows, int64_t stride, int count, A* sums, int64_t sums_stride,
           uint16_t* scratch) const {
    if constexpr (sizeof(A) == 4) {
      if (in_bf16_) {
        pack_bf16_rows(rows, stride, count, depth_, scratch);
        multiply_bf16(scratch, packed_.data(), count, depth_, columns_, sums, sums_stride);
        return;
      }
    }
    multiply(Matrix<A>{rows, stride, 1}, weight_.data(), columns_, count, depth_, columns_, sums,
             sums_stride, true);
  }

  // sums = rows * matrix
  void set(const A* rows, int64_t stride, int count, A* sums, int64_t sums_stride,
           uint16_t* scratch) const {
    if (in_bf16_) {
      for (int i = 0; i < count; ++i) std::fill_n(sums + i * sums_stride, columns_, A{0});
      return add(rows, stride, count, sums, sums_stride, scratch);
    }
    multiply(Matrix<A>{rows, stride, 1}, weight_.data(), columns_, count, depth_, columns_, sums,
             sums_stride, false);
  }

 private:
  int depth_, columns_;
  Buffer<A> weight_;
  Buffer<uint16_t> packed_;
  bool in_bf16_;
};

// What a convolution adds to its sums, zeros without a bias.
template <typename A>
void load_bias(const void* bias, Dtype dtype, int count, A* to) {
  if (bias != nullptr) gather_pixels({bias, dtype, 0, 0, 1}, 1, count, to, 0);
}

template <typename A>
void fill_rows(const A* bias, int columns, int count, A* rows, int64_t stride) {
  for (int i = 0; i < count; ++i) std::copy_n(bias, columns, rows + i * stride);
}

// leaky_relu of a vector, for a slope that is not negative.
template <typename V, typename A>
MAFNET_INLINE V leaky_relu(const V& v, A slope) {
  const V small = slope * v;
  return (v > V{}) ? v : small;
}

// Calls body(Type<V>{}, c) for vectors V of the channels 0 ... channels - 1 of rows 0 ... count
// - 1.
template <typename A, typename Body>
void for_rows(int count, int channels, const Body& body) {
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    for (int i = 0; i < count; ++i) {
      for_channels<decltype(level), A>(
          channels, [&](auto type, int c) MAFNET_INLINE_LAMBDA { body(type, i, c); });
    }
  });
}

// rows = leaky_relu(rows)
template <typename A>
void activate(A* rows, int count, int columns, A slope) {
  if (slope == A{1}) return;
  for_rows<A>(count, columns, [&](auto type, int i, int c) MAFNET_INLINE_LAMBDA {
    using V = typename decltype(type)::type;
    A* at = rows + int64_t{i} * columns + c;
    store<V>(at, leaky_relu(load<V>(at), slope));
  });
}

// image = leaky_relu(rows), which are lost.
template <typename A>
void write_activated(A* rows, int columns, int count, int channels, A slope, const Target& image,
                     int64_t n, int64_t y, int64_t x) {
  if (image.dtype != kDense<A> || image.stride[1] != 1) {
    activate(rows, count, columns, slope);
    return write_row(rows, columns, count, channels, image, n, y, x);
  }
  A* to = static_cast<A*>(image.data) + element_at(image, n, y, x);
  const int64_t stride = image.stride[3];
  for_rows<A>(count, channels, [&](auto type, int i, int c) MAFNET_INLINE_LAMBDA {
    using V = typename decltype(type)::type;
    store<V>(to + i * stride + c, leaky_relu(load<V>(rows + int64_t{i} * columns + c), slope));
  });
}

// grad *= the slope of leaky_relu, told from its output: the slope is not negative, so that only a
// positive argument gives a positive output.
template <typename A>
void activate_backward(const Row<A>& output, int count, int channels, A slope, A* grad,
                       int64_t stride) {
  for_rows<A>(count, channels, [&](auto type, int i, int c) MAFNET_INLINE_LAMBDA {
    using V = typename decltype(type)::type;
    A* at = grad + i * stride + c;
    const V g = load<V>(at), small = slope * g;
    store<V>(at, (load<V>(output.data + i * output.stride + c) > V{}) ? g : small);
  });
}

// Gradients of weight and bias: every chunk of pixels has sums of its own, which are added in the
// order of the chunks. How the pixels are cut does not depend on the number of threads.
template <typename A>
class Partials {
 public:
  // Of `rows` x `columns` sums, of which the kernels may touch padded_rows(rows).
  Partials(int chunks, int rows, int columns, int bias, bool wanted)
      : chunks_(wanted ? chunks : 0),
        size_(static_cast<int64_t>(padded_rows(rows)) * columns + bias),
        bias_at_(size_ - bias),
        sums_(static_cast<size_t>(chunks_ * size_)) {}

  A* weight(int64_t chunk) { return sums_.data() + chunk * size_; }
  A* bias(int64_t chunk) { return weight(chunk) + bias_at_; }

  // The sums of all chunks in those of the first.
  void reduce() {
    if (chunks_ < 2) return;
    parallel_for(0, size_, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
        const A* from = weight(chunk);
        for (int64_t i = begin; i < end; ++i) sums_.data()[i] += from[i];
      }
    });
  }

 private:
  int64_t chunks_, size_, bias_at_;
  Buffer<A> sums_;
};

template <typename A>
void add_rows(const A* rows, int64_t stride, int count, int columns, A* sums) {
  for_rows<A>(count, columns, [&](auto type, int i, int c) MAFNET_INLINE_LAMBDA {
    using V = typename decltype(type)::type;
    store<V>(sums + c, load<V>(sums + c) + load<V>(rows + i * stride + c));
  });
}

constexpr int kMostChunks = 16;

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

inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Of an output that is written from end to end, see common/fresh_memory.h.
inline void prepare(const Target& image, int64_t batch, int64_t elements) {
  prepare_output(image.data, batch * elements * bytes_of(image.dtype));
}

}  // namespace mafnet
