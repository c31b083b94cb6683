// What the CUDA kernels of modulated_deform_conv2d share: where one tap of one output pixel samples
// the input, and the sample of a channel there.
#pragma once

#include "common/prims.cuh"
#include "common/sampler.h"
#include "modulated_deform_conv2d/params.h"

namespace mafnet {

constexpr int kThreads = 256;  // of a block, in every kernel: 8 warps

// The element `at` of a tensor that holds T or, beside half-precision features, float. With a
// 32-bit Index the whole address but its base is 32 bits, which saves half of its arithmetic.
template <typename T, typename Index>
DEVICE Accumulator<T> load_coordinate(const void* data, bool is_feature_type, Index at) {
  const Index size = is_feature_type ? sizeof(T) : sizeof(float);
  const unsigned char* address;
  if constexpr (std::is_same_v<Index, uint32_t>) {
    address = address_of(data, at, size);
  } else {
    address = static_cast<const unsigned char*>(data) + at * size;
  }
  if (is_feature_type) return to_accumulator(*reinterpret_cast<const T*>(address));
  return static_cast<Accumulator<T>>(*reinterpret_cast<const float*>(address));
}

// The same of a gradient.
template <typename T>
DEVICE void store_coordinate(void* data, bool is_feature_type, int64_t at, Accumulator<T> value) {
  if (is_feature_type) {
    static_cast<T*>(data)[at] = from_accumulator<T>(value);
  } else {
    static_cast<float*>(data)[at] = static_cast<float>(value);
  }
}

// Where a sample lies beside its regular position, its mask, and the derivatives of dy, dx and mask
// by what is stored: 1 but for raw offsets.
template <typename A>
struct Coordinates {
  A dy, dx, mask, chain[3];
};

// Where image n begins in offset, mask and flows.
struct CoordinateOrigin {
  const void *offset, *mask, *flow[2];
};

template <typename T>
DEVICE CoordinateOrigin make_origin(const ModulatedDeformConv2dParams& p, int64_t n) {
  const auto advance = [&](const void* data, Dtype dtype, int64_t stride) -> const void* {
    const int64_t size = dtype == p.dtype ? sizeof(T) : sizeof(float);
    return static_cast<const unsigned char*>(data) + n * stride * size;
  };
  // What is not there is null, and its strides are 0.
  return {advance(p.offset, p.offset_dtype, p.offset_stride[0]),
          advance(p.mask, p.mask_dtype, p.mask_stride[0]),
          {advance(p.raw.flow[0], p.raw.flow_dtype, p.raw.flow_stride[0][0]),
           advance(p.raw.flow[1], p.raw.flow_dtype, p.raw.flow_stride[1][0])}};
}

DEVICE float sigmoid(float v) { return __fdividef(1.0f, 1.0f + __expf(-v)); }
DEVICE double sigmoid(double v) { return 1 / (1 + exp(-v)); }

// Makes coordinates of what a head put out.
template <typename T, typename Index>
DEVICE void finish_raw(const ModulatedDeformConv2dParams& p, const CoordinateOrigin& origin,
                       Index pixel, int offset_group, Coordinates<Accumulator<T>>& c) {
  using A = Accumulator<T>;
  c.mask = sigmoid(c.mask);
  c.chain[2] = c.mask * (1 - c.mask);
  const A reach = static_cast<A>(p.raw.max_residue);
  if (reach - reach == 0) {  // not infinite
    c.dy = tanh(c.dy);
    c.dx = tanh(c.dx);
    c.chain[0] = reach * (1 - c.dy * c.dy);
    c.chain[1] = reach * (1 - c.dx * c.dx);
    c.dy *= reach;
    c.dx *= reach;
  }
  const int i = p.raw.flow_of(offset_group, p.offset_groups);
  const void* flow = i == 0 ? origin.flow[0] : origin.flow[1];
  if (flow != nullptr) {
    const bool is_t = p.raw.flow_dtype == p.dtype;
    const Index at = pixel * static_cast<Index>(p.raw.flow_stride[i][1]);
    c.dy += load_coordinate<T>(flow, is_t, at + static_cast<Index>(p.raw.flow_stride[i][2]));
    c.dx += load_coordinate<T>(flow, is_t, at);
  }
}

// Of plane offset_group * taps + tap. kRaw: p.raw.used, known to the compiler.
template <typename T, bool kRaw, typename Index>
DEVICE Coordinates<Accumulator<T>> load_coordinates(const ModulatedDeformConv2dParams& p,
                                                    const CoordinateOrigin& origin, Index pixel,
                                                    int offset_group, Index plane) {
  using A = Accumulator<T>;
  const auto stride = [](int64_t value) { return static_cast<Index>(value); };
  const bool is_t = p.offset_dtype == p.dtype;
  const Index at = 2 * plane * stride(p.offset_stride[1]) + pixel * stride(p.offset_stride[2]);
  Coordinates<A> c;
  c.dy = load_coordinate<T>(origin.offset, is_t, at);
  c.dx = load_coordinate<T>(origin.offset, is_t, at + stride(p.offset_stride[1]));
  c.mask = c.chain[0] = c.chain[1] = c.chain[2] = 1;
  if (kRaw || p.mask != nullptr) {
    c.mask =
        load_coordinate<T>(origin.mask, p.mask_dtype == p.dtype,
                           plane * stride(p.mask_stride[1]) + pixel * stride(p.mask_stride[2]));
  }
  if constexpr (kRaw) finish_raw<T>(p, origin, pixel, offset_group, c);
  return c;
}

// The taps of both axes; those outside the image have index kOutside. NaN: none inside, NaN
// weights.
template <typename A>
struct Sample {
  AxisTaps<A, 2> rows, columns;
  A mask, chain[3];
};

// An output pixel; index counts those of image n in raster order.
struct OutputPixel {
  int64_t n, index;
  int row, column;
};

DEVICE OutputPixel make_pixel(const ModulatedDeformConv2dParams& p, int64_t n, int64_t index) {
  const int row = static_cast<int>(index / p.out_width);
  return {n, index, row, static_cast<int>(index - int64_t{row} * p.out_width)};
}

template <typename T, bool kRaw>
DEVICE Sample<Accumulator<T>> make_sample(const ModulatedDeformConv2dParams& p,
                                          const OutputPixel& pixel, int offset_group, int tap) {
  using A = Accumulator<T>;
  const auto c = load_coordinates<T, kRaw>(p, make_origin<T>(p, pixel.n), pixel.index, offset_group,
                                           int64_t{offset_group} * p.taps() + tap);
  // The regular position is exact in integers; like the CPU, round it once and add the offset.
  const int64_t base_y =
      int64_t{pixel.row} * p.stride_h - p.padding_h + int64_t{tap / p.kernel_w} * p.dilation_h;
  const int64_t base_x =
      int64_t{pixel.column} * p.stride_w - p.padding_w + int64_t{tap % p.kernel_w} * p.dilation_w;
  Sample<A> sample;
  sample.rows = sample_axis<Interpolation::kBilinear, A>(static_cast<A>(base_y) + c.dy, p.height,
                                                         Padding::kZeros);
  sample.columns = sample_axis<Interpolation::kBilinear, A>(static_cast<A>(base_x) + c.dx, p.width,
                                                            Padding::kZeros);
  sample.mask = c.mask;
  for (int i = 0; i < 3; ++i) sample.chain[i] = c.chain[i];
  return sample;
}

// For kernels whose sampling is a small part of the work: one of them serves both.
template <typename T>
DEVICE Sample<Accumulator<T>> make_sample(const ModulatedDeformConv2dParams& p,
                                          const OutputPixel& pixel, int offset_group, int tap) {
  return p.raw.used ? make_sample<T, true>(p, pixel, offset_group, tap)
                    : make_sample<T, false>(p, pixel, offset_group, tap);
}

// Calls body(j, k, inside, offset of the pixel from the image's first) for the four corners.
template <typename A, typename Body>
DEVICE void for_corners(const Sample<A>& sample, int64_t row_stride, int64_t column_stride,
                        const Body& body) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int row = sample.rows.index[j], column = sample.columns.index[k];
      const bool inside = row >= 0 && column >= 0;
      body(j, k, inside, row * row_stride + column * column_stride);
    }
  }
}

// The sample, times mask, of the channel whose plane begins at `plane`.
template <typename T>
DEVICE Accumulator<T> value_of(const ModulatedDeformConv2dParams& p,
                               const Sample<Accumulator<T>>& sample, const T* plane) {
  using A = Accumulator<T>;
  A sum = 0;
  for_corners(sample, p.input_stride[2], p.input_stride[3],
              [&](int j, int k, bool inside, int64_t at) {
                // Outside is exactly 0, whatever lies at the edge; a NaN weight stays.
                const A value = inside ? to_accumulator(plane[at]) : A(0);
                sum += sample.rows.weight[j] * sample.columns.weight[k] * value;
              });
  return sum * sample.mask;
}

MAFNET_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A grid of one block per item of a flattened index space.
inline dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

}  // namespace mafnet
