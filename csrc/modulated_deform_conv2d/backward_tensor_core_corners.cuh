// What a lane of the tensor-core backward does with its two pixels: it reads the corners of their
// samples, adds to those of grad_input, and stores the gradients of offsets and masks.
#pragma once

#include "modulated_deform_conv2d/fixed_point.cuh"
#include "modulated_deform_conv2d/tensor_core_products.cuh"
#include "modulated_deform_conv2d/tensor_core_samples.cuh"

namespace mafnet {

constexpr int kPixelStep = 8;  // from the first of a lane's two pixels to the second

// Which corners of a sample anywhere are in the image: bit k for (row + k / 2, column + k % 2).
// From far away the sample comes to beside the image.
DEVICE int find_corners(const ModulatedDeformConv2dParams& p, Position& s) {
  s.row = find_cell(s.y, p.height, s.part_y);
  s.column = find_cell(s.x, p.width, s.part_x);
  const int rows = (is_inside(s.row, p.height) ? 3 : 0) | (is_inside(s.row + 1, p.height) ? 12 : 0);
  const int columns =
      (is_inside(s.column, p.width) ? 5 : 0) | (is_inside(s.column + 1, p.width) ? 10 : 0);
  return rows & columns;
}

// Channels of the corners of a lane's two samples.
using CornerWords = Words<4>[2][4];

// Elements from row to row and from pixel to pixel of an image, of input or of grad_input.
struct PixelStrides {
  uint32_t row, column;

  DEVICE uint32_t first(const Position& s) const {
    return static_cast<uint32_t>(s.row) * row + static_cast<uint32_t>(s.column) * column;
  }
  DEVICE uint32_t corner(uint32_t first, int k) const {
    return first + k / 2 * row + k % 2 * column;
  }
};

// kAll: they all lie in the image. Else the first pixel is read in place of those outside, whose
// products are dropped. first: where the samples' first corners are. One addition and one product
// per corner: sums that the compiler must not take out of the loop, from a pointer that is held.
template <bool kAll, typename T>
DEVICE void load_corners(const T* image, const PixelStrides& strides, uint32_t channel,
                         const uint32_t (&first)[2], const int (&inside)[2], CornerWords& corners) {
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const uint32_t from = held(first[q] + channel);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool read = kAll || (inside[q] >> k & 1) != 0;
      const T* source = image + (read ? strides.corner(from, k) : channel);
      corners[q][k] = Words<4>::load(reinterpret_cast<const unsigned char*>(source));
    }
  }
}

template <typename T>
DEVICE void add_dot(float& sum, const float (&a)[kLaneChannels], const Words<4>& b) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float channels[2];
    unpack(b.at(i), channels, T());
    sum += a[2 * i] * channels[0];
    sum += a[2 * i + 1] * channels[1];
  }
}

// Adds grad_column to those corners in grad_input that `inside` has bits of, or to all. first:
// where the channels of the first corner are.
template <bool kAll>
DEVICE void scatter(float* image, const PixelStrides& strides, const Position& s, uint32_t first,
                    int inside, const float (&grad_column)[kLaneChannels]) {
  float weights[4];
  weigh_corners(s.part_y, s.part_x, s.mask, weights);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (!kAll && (inside >> k & 1) == 0) continue;
    float parts[kLaneChannels];
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) parts[i] = grad_column[i] * weights[k];
    float* target = image + strides.corner(first, k);
    atomic_add4(target, parts[0], parts[1], parts[2], parts[3]);
    atomic_add4(target + 4, parts[4], parts[5], parts[6], parts[7]);
  }
}

// The same to integers; image: its first element.
DEVICE void scatter_fixed(const ModulatedDeformConv2dParams& p, int64_t image,
                          const PixelStrides& strides, const Position& s, uint32_t first,
                          int inside, const float (&grad_column)[kLaneChannels],
                          const FixedPoint<float>& fixed) {
  float weights[4];
  weigh_corners(s.part_y, s.part_x, s.mask, weights);
#pragma unroll 1  // the code is long
  for (int k = 0; k < 4; ++k) {
    if ((inside >> k & 1) == 0) continue;
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      add_fixed(p, fixed, image + strides.corner(first, k) + i, grad_column[i] * weights[k]);
    }
  }
}

// An image of a gradient of offsets or masks.
struct GradImage {
  enum Kind { kUnwanted, kOfFeatureType, kOfFloat } kind;
  void* data;
};

template <typename T>
DEVICE GradImage make_grad_image(void* data, bool is_feature_type, int64_t first) {
  if (data == nullptr) return {GradImage::kUnwanted, nullptr};
  const int64_t size = is_feature_type ? sizeof(T) : sizeof(float);
  return {is_feature_type ? GradImage::kOfFeatureType : GradImage::kOfFloat,
          static_cast<unsigned char*>(data) + first * size};
}

template <typename U>
DEVICE U* place_of(void* data, uint32_t element) {
  return reinterpret_cast<U*>(const_cast<unsigned char*>(address_of(data, element, sizeof(U))));
}

// The values of a lane's two pixels in neighbouring planes; `at` is the element of the first.
template <typename T, int kPlanes>
DEVICE void store_pixels(const GradImage& image, uint32_t at, uint32_t plane_stride,
                         const float (&values)[kPlanes][2], const bool (&stored)[2]) {
  if (image.kind == GradImage::kOfFeatureType) {
#pragma unroll
    for (int i = 0; i < kPlanes; ++i) {
      uint16_t* target = place_of<uint16_t>(image.data, at + i * plane_stride);
      const uint32_t both = pack(values[i][0], values[i][1], T());
      if (stored[0]) target[0] = static_cast<uint16_t>(both);
      if (stored[1]) target[kPixelStep] = static_cast<uint16_t>(both >> 16);
    }
  } else if (image.kind == GradImage::kOfFloat) {
#pragma unroll
    for (int i = 0; i < kPlanes; ++i) {
      float* target = place_of<float>(image.data, at + i * plane_stride);
      if (stored[0]) target[0] = values[i][0];
      if (stored[1]) target[kPixelStep] = values[i][1];
    }
  }
}

}  // namespace mafnet
