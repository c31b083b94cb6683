// How a lane of the tensor-core kernels reads the offsets and masks of its two pixels: pointers
// walk from tap to tap, and their types are chosen once for all reads of a tap, which is shorter
// than an address and a choice for each.
#pragma once

#include "modulated_deform_conv2d/sample.cuh"

namespace mafnet {

// Bytes from plane to plane and from pixel to pixel.
struct PlaneStrides {
  uint32_t plane, pixel;

  MAFNET_HOST_DEVICE PlaneStrides(const int64_t (&strides)[3], uint32_t size)
      : plane(size * static_cast<uint32_t>(strides[1])),
        pixel(size * static_cast<uint32_t>(strides[2])) {}
};

// What the loops over taps want of the params, in the form in which they want it.
struct Steps {
  int last_row, last_column;  // of the image
  // From tap to tap, in whole numbers below kMostPositions, whose sums are exact.
  float to_column, to_row, back_to_column, back_to_row;
  PlaneStrides offset, mask;
  int pixels;  // of the output

  explicit Steps(const ModulatedDeformConv2dParams& p)
      : last_row(p.height - 1),
        last_column(p.width - 1),
        to_column(static_cast<float>(p.dilation_w)),
        to_row(static_cast<float>(p.dilation_h)),
        back_to_column(static_cast<float>(-p.kernel_w * p.dilation_w)),
        back_to_row(static_cast<float>(-p.kernel_h * p.dilation_h)),
        offset(p.offset_stride, p.offset_dtype == Dtype::kFloat32 ? 4 : 2),
        mask(p.mask_stride, p.mask_dtype == Dtype::kFloat32 ? 4 : 2),
        pixels(static_cast<int>(p.pixels())) {}
};

// Where dy and the mask of a lane's first pixel lie, of the next tap.
struct TapPointers {
  const unsigned char *offset, *mask;
};

// The planes of one tensor.
struct Planes {
  const unsigned char* image;  // its first plane's first pixel
  PlaneStrides strides;
  uint32_t first_pixel, to_second_pixel;  // the lane's, the latter in bytes

  DEVICE Planes(const void* data, const PlaneStrides& strides, const int (&pixel)[2])
      : image(static_cast<const unsigned char*>(data)),
        strides(strides),
        first_pixel(static_cast<uint32_t>(pixel[0])) {
    to_second_pixel = held(static_cast<uint32_t>(pixel[1] - pixel[0]) * strides.pixel);
  }
  // Of the lane's first pixel: worked out again from what a loop has anyway, instead of kept.
  DEVICE const unsigned char* plane(int index) const {
    return image + (first_pixel * strides.pixel + static_cast<uint32_t>(index) * strides.plane);
  }
};

// Offsets and masks of T, or of float beside half-precision features.
template <typename T>
class CoordinatePlanes {
 public:
  DEVICE CoordinatePlanes(const ModulatedDeformConv2dParams& p, const CoordinateOrigin& origin,
                          const PlaneStrides& offset, const PlaneStrides& mask,
                          const int (&pixel)[2])
      : offset_is_t_(p.offset_dtype == p.dtype),
        mask_is_t_(p.mask_dtype == p.dtype),
        offsets_(origin.offset, offset, pixel),
        masks_(origin.mask, mask, pixel) {}

  // The forward's: of offsets, and in float, where sizes are known, of masks too, strides that are
  // worked out here and stay in registers take fewer instructions than those of steps.
  DEVICE CoordinatePlanes(const ModulatedDeformConv2dParams& p, const CoordinateOrigin& origin,
                          const Steps& steps, const int (&pixel)[2])
      : offset_is_t_(p.offset_dtype == p.dtype),
        mask_is_t_(p.mask_dtype == p.dtype),
        offsets_(origin.offset,
                 PlaneStrides(p.offset_stride, offset_is_t_ ? sizeof(T) : sizeof(float)), pixel),
        masks_(origin.mask, mask_strides(p, steps), pixel) {}

  DEVICE TapPointers first_tap(int plane) const {
    return {offsets_.plane(2 * plane), masks_.plane(plane)};
  }

  // Of one tap of each run; the pointers go to the next one.
  template <int kRuns>
  DEVICE void load_tap(TapPointers (&tap)[kRuns], Coordinates<float> (&c)[kRuns][2]) const {
    if constexpr (std::is_same_v<T, float>) {
      load<T, T>(tap, c);
    } else if (offset_is_t_ && mask_is_t_) {
      load<T, T>(tap, c);
    } else if (offset_is_t_) {
      load<T, float>(tap, c);
    } else if (mask_is_t_) {
      load<float, T>(tap, c);
    } else {
      load<float, float>(tap, c);
    }
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      tap[i].offset += 2 * int64_t{offsets_.strides.plane};
      tap[i].mask += masks_.strides.plane;
    }
  }

 private:
  static DEVICE PlaneStrides mask_strides(const ModulatedDeformConv2dParams& p,
                                          const Steps& steps) {
    if constexpr (std::is_same_v<T, float>) {
      return PlaneStrides(p.mask_stride, sizeof(T));
    } else {
      return steps.mask;
    }
  }
  template <typename Offset, typename Mask, int kRuns>
  DEVICE void load(const TapPointers (&tap)[kRuns], Coordinates<float> (&c)[kRuns][2]) const {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const unsigned char *dy = held(tap[i].offset), *mask = held(tap[i].mask);
      const unsigned char* dx = dy + offsets_.strides.plane;
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        c[i][q].dy = value<Offset>(dy);
        c[i][q].dx = value<Offset>(dx);
        c[i][q].mask = value<Mask>(mask);
        dy += offsets_.to_second_pixel;
        dx += offsets_.to_second_pixel;
        mask += masks_.to_second_pixel;
      }
    }
  }
  template <typename U>
  static DEVICE float value(const unsigned char* place) {
    return to_accumulator(*reinterpret_cast<const U*>(place));
  }

  bool offset_is_t_, mask_is_t_;
  Planes offsets_, masks_;
};

}  // namespace mafnet
