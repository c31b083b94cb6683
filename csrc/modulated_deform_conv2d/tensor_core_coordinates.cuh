// How a lane of the tensor-core forward reads the offsets and masks of its two pixels: pointers
// walk from tap to tap, and their types are chosen once for all reads of a tap, which is shorter
// than an address and a choice for each.
#pragma once

#include "modulated_deform_conv2d/sample.cuh"

namespace mafnet {

// Where dy and the mask of a lane's first pixel lie, of the next tap.
struct TapPointers {
  const unsigned char *offset, *mask;
};

// The planes of one tensor, in bytes.
struct Planes {
  const unsigned char* first;  // of the lane's first pixel
  uint32_t stride, to_second_pixel;

  DEVICE Planes(const void* data, uint32_t size, const int64_t (&strides)[3],
                const int (&pixel)[2]) {
    const uint32_t pixel_stride = static_cast<uint32_t>(strides[2]) * size;
    first =
        static_cast<const unsigned char*>(data) + static_cast<uint32_t>(pixel[0]) * pixel_stride;
    stride = static_cast<uint32_t>(strides[1]) * size;
    to_second_pixel = held(static_cast<uint32_t>(pixel[1] - pixel[0]) * pixel_stride);
  }
  DEVICE const unsigned char* plane(int index) const {
    return first + static_cast<uint32_t>(index) * stride;
  }
};

// Offsets and masks of T, or of float beside half-precision features.
template <typename T>
class CoordinatePlanes {
 public:
  DEVICE CoordinatePlanes(const ModulatedDeformConv2dParams& p, const CoordinateOrigin& origin,
                          const int (&pixel)[2])
      : offset_is_t_(p.offset_dtype == p.dtype),
        mask_is_t_(p.mask_dtype == p.dtype),
        offsets_(origin.offset, offset_is_t_ ? sizeof(T) : sizeof(float), p.offset_stride, pixel),
        masks_(origin.mask, mask_is_t_ ? sizeof(T) : sizeof(float), p.mask_stride, pixel) {}

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
      tap[i].offset += 2 * int64_t{offsets_.stride};
      tap[i].mask += masks_.stride;
    }
  }

 private:
  template <typename Offset, typename Mask, int kRuns>
  DEVICE void load(const TapPointers (&tap)[kRuns], Coordinates<float> (&c)[kRuns][2]) const {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const unsigned char *dy = held(tap[i].offset), *mask = held(tap[i].mask);
      const unsigned char* dx = dy + offsets_.stride;
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
