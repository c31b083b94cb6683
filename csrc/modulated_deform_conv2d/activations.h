// tanh and sigmoid, with their derivatives, of raw offsets on the CPU. In float: code that
// vectorises and is right to a few units in the last place; in double the library's functions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace mafnet {

template <typename A>
struct Activation {
  A value, slope;
};

// e^y = scale * (1 + part) for y <= 0, |part| < 0.42. Below e^-87, near the smallest normal number,
// it is 0.
struct Exponential {
  float scale, part;
};

MAFNET_INLINE Exponential exponential(float y) {
  constexpr float kLowest = -87, kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  // Added to a small number, it rounds to an integer, which is then in the lowest bits.
  constexpr float kRound = 12582912;
  const float clamped = y < kLowest ? kLowest : y;  // NaN stays
  const float shifted = clamped * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;  // within ln(2) / 2
  // e^r - 1 without its first two terms: r^8 / 8! is below a quarter of a unit of the result.
  float tail = 1.0f / 5040;
  tail = tail * r + 1.0f / 720;
  tail = tail * r + 1.0f / 120;
  tail = tail * r + 1.0f / 24;
  tail = tail * r + 1.0f / 6;
  tail = tail * r + 0.5f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3F800000u;  // 2^n
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return {y < kLowest ? 0.0f : scale, r + r * r * tail};
}

// Through m = e^(-2|x|) - 1, whose digits survive near 0: tanh|x| = -m / (2 + m) and
// tanh' = 4 (1 + m) / (2 + m)^2.
MAFNET_INLINE Activation<float> tanh_of(float x) {
  const Exponential e = exponential(-2 * std::fabs(x));
  const float m = e.scale * e.part + (e.scale - 1), inverse = 1 / (2 + m);
  const float exp = e.scale * e.part + e.scale;
  return {std::copysign(m * inverse, x), 4 * exp * inverse * inverse};
}

MAFNET_INLINE Activation<float> sigmoid_of(float x) {
  const Exponential e = exponential(-std::fabs(x));
  const float exp = e.scale * e.part + e.scale, inverse = 1 / (1 + exp);
  return {(x < 0 ? exp : 1.0f) * inverse, exp * inverse * inverse};
}

inline Activation<double> tanh_of(double x) {
  const double value = std::tanh(x), cosh = std::cosh(x);
  return {value, 1 / (cosh * cosh)};
}

inline Activation<double> sigmoid_of(double x) {
  const double exp = std::exp(-std::fabs(x)), inverse = 1 / (1 + exp);
  return {(x < 0 ? exp : 1.0) * inverse, exp * inverse * inverse};
}

}  // namespace mafnet
