// THE sampler: where a coordinate falls on one axis, which pixels it reads and with what weights.
//
// Sampling is separable: value(y, x) = sum_j sum_k wy[j] wx[k] image[iy[j]][ix[k]], and its
// derivative by x replaces wx by slope_x. Used by CPU code and by kernels; no torch, no CUDA
// headers.
//
// Pixel centres are at integers. Reflection is about the centres of the first and the last pixel.
// NaN gives no taps and NaN weights, so that the sum is NaN and nothing is read.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define MAFNET_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MAFNET_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace mafnet {

enum class Interpolation : int { kBilinear = 0, kNearest = 1, kBicubic = 2 };
enum class Padding : int { kZeros = 0, kBorder = 1, kReflection = 2 };

template <Interpolation I>
constexpr int kTapsPerAxis = I == Interpolation::kNearest    ? 1
                             : I == Interpolation::kBilinear ? 2
                                                             : 4;

constexpr int kOutside = -1;   // index of a tap that reads as zero
constexpr int kFarMargin = 3;  // this far outside the image every tap of every stencil is padding
constexpr float kCubicA = -0.75f;  // Keys' parameter, as F.grid_sample

template <typename A, int K>
struct AxisTaps {
  int index[K];  // in range, or kOutside
  A weight[K];
  A slope[K];  // d weight / d coordinate; at a knot that of the cell to the right
};

// Bounds v without losing a NaN.
template <typename A>
MAFNET_HOST_DEVICE A clamp_keeping_nan(A v, A low, A high) {
  return v < low ? low : (v > high ? high : v);
}

// Folds x into [0, size - 1]; sign becomes the derivative of the fold. Infinity gives NaN.
template <typename A>
MAFNET_HOST_DEVICE A reflect(A x, int size, A& sign) {
  const A last = static_cast<A>(size - 1);
  if (x >= 0 && x <= last) return x;
  if (size == 1) {
    sign = 0;
    return x - x;
  }
  // Exact while |x| < 2^24; beyond, rounding picks some place in the image. fmod would be exact and
  // slow.
  const A period = 2 * last, distance = std::fabs(x);
  A folded = distance - std::floor(distance / period) * period;
  folded = folded < 0 ? folded + period : folded;
  sign = x < 0 ? A(-1) : A(1);
  if (folded > last) {
    folded = period - folded;
    sign = -sign;
  }
  return clamp_keeping_nan(folded, A(0), last);
}

MAFNET_HOST_DEVICE int pad_index(int index, int size, Padding padding) {
  if (index >= 0 && index < size) return index;
  if (padding == Padding::kZeros) return kOutside;
  if (padding == Padding::kBorder) return index < 0 ? 0 : size - 1;
  if (size == 1) return 0;
  const int period = 2 * (size - 1);
  const int folded = (index < 0 ? -index : index) % period;
  return folded < size ? folded : period - folded;
}

// Keys' cubic at distance d <= 1 and 1 <= d <= 2, and its derivatives.
template <typename A>
MAFNET_HOST_DEVICE A cubic_near(A d) {
  return ((A(kCubicA) + 2) * d - (A(kCubicA) + 3)) * d * d + 1;
}
template <typename A>
MAFNET_HOST_DEVICE A cubic_far(A d) {
  return ((A(kCubicA) * d - 5 * A(kCubicA)) * d + 8 * A(kCubicA)) * d - 4 * A(kCubicA);
}
template <typename A>
MAFNET_HOST_DEVICE A cubic_near_slope(A d) {
  return (3 * (A(kCubicA) + 2) * d - 2 * (A(kCubicA) + 3)) * d;
}
template <typename A>
MAFNET_HOST_DEVICE A cubic_far_slope(A d) {
  return (3 * A(kCubicA) * d - 10 * A(kCubicA)) * d + 8 * A(kCubicA);
}

// The taps of coordinate x on an axis of size pixels.
template <Interpolation I, typename A>
MAFNET_HOST_DEVICE AxisTaps<A, kTapsPerAxis<I>> sample_axis(A x, int size, Padding padding) {
  AxisTaps<A, kTapsPerAxis<I>> taps;
  A sign = 1;
  if (padding == Padding::kReflection) {
    x = reflect(x, size, sign);
  } else if (padding == Padding::kBorder && I != Interpolation::kBicubic) {
    sign = x >= 0 && x <= static_cast<A>(size - 1) ? A(1) : A(0);
    x = clamp_keeping_nan(x, A(0), static_cast<A>(size - 1));
  } else {
    x = clamp_keeping_nan(x, A(-kFarMargin), static_cast<A>(size - 1 + kFarMargin));
  }
  const bool known = x == x;
  const A base = I == Interpolation::kNearest ? std::rint(x) : std::floor(x);
  const int first = known ? static_cast<int>(base) - (I == Interpolation::kBicubic ? 1 : 0) : 0;
  for (int k = 0; k < kTapsPerAxis<I>; ++k) {
    taps.index[k] = known ? pad_index(first + k, size, padding) : kOutside;
  }
  const A t = x - base;  // NaN where x is
  if constexpr (I == Interpolation::kNearest) {
    taps.weight[0] = known ? A(1) : x;
    taps.slope[0] = 0;
  } else if constexpr (I == Interpolation::kBilinear) {
    sign = known ? sign : x;
    taps.weight[0] = 1 - t;
    taps.weight[1] = t;
    taps.slope[0] = -sign;
    taps.slope[1] = sign;
  } else {
    taps.weight[0] = cubic_far(t + 1);
    taps.weight[1] = cubic_near(t);
    taps.weight[2] = cubic_near(1 - t);
    taps.weight[3] = cubic_far(2 - t);
    taps.slope[0] = sign * cubic_far_slope(t + 1);
    taps.slope[1] = sign * cubic_near_slope(t);
    taps.slope[2] = -sign * cubic_near_slope(1 - t);
    taps.slope[3] = -sign * cubic_far_slope(2 - t);
  }
  return taps;
}

// Calls body(integral constant) with the compile-time value of interpolation.
template <Interpolation I>
struct InterpolationConstant {
  static constexpr Interpolation value = I;
};
template <typename Body>
auto dispatch_interpolation(Interpolation interpolation, const Body& body) {
  switch (interpolation) {
    case Interpolation::kNearest:
      return body(InterpolationConstant<Interpolation::kNearest>{});
    case Interpolation::kBicubic:
      return body(InterpolationConstant<Interpolation::kBicubic>{});
    default:
      return body(InterpolationConstant<Interpolation::kBilinear>{});
  }
}

}  // namespace mafnet
