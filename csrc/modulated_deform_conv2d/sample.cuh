// What the CUDA kernels of modulated_deform_conv2d share: where one tap of one output pixel samples
// the input, and the sample of a channel there.
#pragma once

#include "common/prims.cuh"
#include "common/sampler.h"
#include "modulated_deform_conv2d/params.h"

namespace mafnet {

constexpr int kThreads = 256;  // of a block, in every kernel: 8 warps

// An element of a tensor that holds T or, beside half-precision features, float.
template <typename T>
DEVICE Accumulator<T> load_coordinate(const void* data, bool is_feature_type, int64_t at) {
  if (is_feature_type) return to_accumulator(static_cast<const T*>(data)[at]);
  return static_cast<Accumulator<T>>(static_cast<const float*>(data)[at]);
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

// The taps of both axes; those outside the image have index kOutside. NaN: none inside, NaN
// weights.
template <typename A>
struct Sample {
  AxisTaps<A, 2> rows, columns;
  A mask;
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

template <typename T>
DEVICE Sample<Accumulator<T>> make_sample(const ModulatedDeformConv2dParams& p,
                                          const OutputPixel& pixel, int offset_group, int tap) {
  using A = Accumulator<T>;
  const int64_t plane = int64_t{offset_group} * p.taps() + tap;
  const int64_t dy = pixel.n * p.offset_stride[0] + 2 * plane * p.offset_stride[1] +
                     pixel.index * p.offset_stride[2];
  const bool offset_is_t = p.offset_dtype == p.dtype;
  // The regular position is exact in integers; like the CPU, round it once and add the offset.
  const int64_t base_y =
      int64_t{pixel.row} * p.stride_h - p.padding_h + int64_t{tap / p.kernel_w} * p.dilation_h;
  const int64_t base_x =
      int64_t{pixel.column} * p.stride_w - p.padding_w + int64_t{tap % p.kernel_w} * p.dilation_w;
  const A y = static_cast<A>(base_y) + load_coordinate<T>(p.offset, offset_is_t, dy);
  const A x =
      static_cast<A>(base_x) + load_coordinate<T>(p.offset, offset_is_t, dy + p.offset_stride[1]);
  Sample<A> sample;
  sample.rows = sample_axis<Interpolation::kBilinear, A>(y, p.height, Padding::kZeros);
  sample.columns = sample_axis<Interpolation::kBilinear, A>(x, p.width, Padding::kZeros);
  sample.mask = 1;
  if (p.mask != nullptr) {
    sample.mask = load_coordinate<T>(
        p.mask, p.mask_dtype == p.dtype,
        pixel.n * p.mask_stride[0] + plane * p.mask_stride[1] + pixel.index * p.mask_stride[2]);
  }
  return sample;
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
