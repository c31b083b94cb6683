// Powers of the scores, on vectors of any width.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "common/vectors.h"

namespace mafnet {

// power(x * kPowerFactor) is exp(x).
template <typename A>
constexpr A kPowerFactor = std::is_same_v<A, double> ? A(1) : A(1.4426950408889634);

// 2^x in float for x <= 127, within 1.1 ulp: 2^n by the exponent, 2^f for |f| <= 1/2 by a
// polynomial. 0 below -126.5, NaN for NaN.
template <typename V>
MAFNET_INLINE V power(const V& x) {
  constexpr int kLanes = sizeof(V) / sizeof(float);
  using Int = typename Lanes<int32_t, kLanes>::Vector;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: its last digit is the unit
  const V clamped = larger_of(x, V(V{} - 127.0f));
  const V rounded = clamped + kRound;
  const V f = clamped - (rounded - kRound);
  // Of the relative error on [-1/2, 1/2] the largest is 2e-9; the first coefficient is exact.
  V y = f * 1.5403530393381609e-4f + 1.3333558146428443e-3f;
  y = y * f + 9.6181291076284772e-3f;
  y = y * f + 5.5504108664821580e-2f;
  y = y * f + 2.4022650695910072e-1f;
  y = y * f + 6.9314718055994531e-1f;
  y = y * f + 1.0f;
  Int bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  bits = (bits << 23) + 0x3f800000;  // the digits above the exponent's are lost; -127 gives 0
  V scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return y * scale;
}

// exp(x): double serves accuracy and not speed.
MAFNET_INLINE double power(double x) { return std::exp(x); }

// Widest vector of level L; double goes one by one.
template <typename L, typename A>
using WideOf = std::conditional_t<std::is_same_v<A, double>, A,
                                  VectorOf<A, static_cast<int>(L::kBytes / sizeof(A))>>;

}  // namespace mafnet
