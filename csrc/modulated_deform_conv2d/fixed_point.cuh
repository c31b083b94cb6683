// Deterministic sums for grad_input: a contribution v becomes the integer v * 2^shift, and integer
// additions commute. One shift serves the whole call: with |v| < 2^e for every contribution, and at
// most taps * pixels of them per element, shift = kSumBits - e - log2(taps * pixels) keeps every
// sum within 63 bits. Each contribution is off by at most half of 2^-shift, so an element with m
// contributions by m * 2^-(shift + 1): for 9 taps of 180 x 320 pixels 2^-42 of the bound 2^e,
// beside the 2^-24 of each contribution that float arithmetic rounds anyway. For double a second
// integer holds the next kLimbBits bits.
//
// The bound: |v| <= max|grad_output| * max over (c, k) of sum over o |weight(o, c, k)| * max|mask|,
// in powers of two, of the values that are finite. A contribution that is not finite is added to
// grad_input itself instead: sums of infinities and NaN do not depend on their order either.
#pragma once

#include "common/prims.cuh"
#include "modulated_deform_conv2d/params.h"

namespace mafnet {

constexpr int kSumBits = 62;
// |v| < 2^e is only as sharp as its rounding: a column's sum may exceed the bound by a few
// roundings.
constexpr int kRoundingBits = 1;
constexpr int kLimbBits = 30;
// What exponents[] holds is this much larger, so that 0, with which it begins, is below all.
constexpr int kExponentBias = 1 << 14;

enum Exponent { kOfGradOutput = 0, kOfWeight = 1, kOfMask = 2 };

template <typename A>
struct FixedPoint {
  A scale;  // 2^shift
  int64_t limb_stride;
};

// ceil(log2(count)).
MAFNET_HOST_DEVICE int bits_of(int64_t count) {
  int bits = 0;
  while ((int64_t{1} << bits) < count) ++bits;
  return bits;
}

// Powers of two that the type has as normal numbers bound the shift; below the smallest product of
// finite numbers nothing is lost that could be seen.
template <typename A>
constexpr int kLargestShift = sizeof(A) == 4 ? 127 : 1023;

template <typename A>
DEVICE int fixed_shift(const ModulatedDeformConv2dParams& p) {
  int exponent = 1;  // of a mask of ones, or of a sigmoid
  if (p.mask != nullptr && !p.raw.used) exponent = p.exponents[kOfMask] - kExponentBias;
  exponent += p.exponents[kOfGradOutput] + p.exponents[kOfWeight] - 2 * kExponentBias;
  // A finite v is below 2^128 (2^1024), whatever the bound.
  exponent = min(exponent, kLargestShift<A> + 1);
  const int shift = kSumBits - kRoundingBits - exponent - bits_of(p.pixels() * p.taps());
  return min(shift, kLargestShift<A>);
}

// Elements of grad_input, which is dense.
MAFNET_HOST_DEVICE int64_t input_elements(const ModulatedDeformConv2dParams& p) {
  return p.batch * p.channels * p.height * p.width;
}

template <typename A>
DEVICE FixedPoint<A> make_fixed_point(const ModulatedDeformConv2dParams& p) {
  return {static_cast<A>(ldexp(1.0, fixed_shift<A>(p))), input_elements(p)};
}

DEVICE void add_integer(int64_t* address, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(address),
            static_cast<unsigned long long>(value));  // two's complement: wraps to the right sum
}

template <typename A>
DEVICE void add_fixed(const ModulatedDeformConv2dParams& p, const FixedPoint<A>& fixed,
                      int64_t element, A value) {
  if (!(value - value == 0)) {  // infinite or NaN
    atomicAdd(static_cast<A*>(p.grad_input) + element, value);
    return;
  }
  const A scaled = value * fixed.scale;  // exact: a power of two
  if constexpr (sizeof(A) == 4) {
    add_integer(p.fixed_sums + element, __float2ll_rn(scaled));
  } else {
    const int64_t whole = __double2ll_rn(scaled);
    const A rest = scaled - static_cast<A>(whole);  // exact, at most a half
    add_integer(p.fixed_sums + element, whole);
    add_integer(p.fixed_sums + fixed.limb_stride + element,
                __double2ll_rn(rest * static_cast<A>(int64_t{1} << kLimbBits)));
  }
}

}  // namespace mafnet
