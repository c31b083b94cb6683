// The products of the tensor-core forward, for each kind of numbers: 16 pixels x 32 channels times
// 32 channels x 8 output channels, in one warp.
//
// Lane 4 r + t holds channels 8 t .. 8 t + 7 of pixels r and r + 8, and of the weights those same
// channels of column r. mma numbers the columns of A and the rows of B as the lanes hold them; that
// both agree is all that counts, so that nothing is exchanged: halves are two steps of 16, where
// the lane holds 4 neighbours of 8, floats four steps of 8, where it holds 2.
#pragma once

#include <cstring>

#include "common/prims.cuh"

namespace mafnet {

constexpr int kLaneChannels = 8;

template <typename Pair>
DEVICE uint32_t bits_of_pair(Pair pair) {
  uint32_t bits;
  std::memcpy(&bits, &pair, sizeof bits);
  return bits;
}
DEVICE uint32_t pack(float low, float high, __half) {
  return bits_of_pair(__floats2half2_rn(low, high));
}
DEVICE uint32_t pack(float low, float high, __nv_bfloat16) {
  return bits_of_pair(__floats2bfloat162_rn(low, high));
}

// A kind of products has
//   Feature: the type of input, weight and output
//   kVectors: of 16 bytes, of packed weights, that a lane reads per step and column tile
//   kStages: of the ring of weights: two are used and left, the others are under way
//   pack_weights: of a lane's channels of one output channel
//   a constructor that takes the samples, and add, which multiplies them with packed weights.

// Samples are rounded once to T, sums are float.
template <typename T>
class HalfProducts {
 public:
  using Feature = T;
  static constexpr int kVectors = 1, kStages = 4;

  DEVICE explicit HalfProducts(const float (&samples)[2][kLaneChannels]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        a_[i / 2][2 * (i % 2) + q] = pack(samples[q][2 * i], samples[q][2 * i + 1], T());
      }
    }
  }
  DEVICE void add(float (&sums)[4], const uint4 (&weights)[kVectors]) const {
    mma_m16n8k16(sums, a_[0], {weights[0].x, weights[0].y}, T());
    mma_m16n8k16(sums, a_[1], {weights[0].z, weights[0].w}, T());
  }
  static DEVICE void pack_weights(const float (&w)[kLaneChannels], uint4 (&vectors)[kVectors]) {
    vectors[0] = make_uint4(pack(w[0], w[1], T()), pack(w[2], w[3], T()), pack(w[4], w[5], T()),
                            pack(w[6], w[7], T()));
  }

 private:
  uint32_t a_[2][4];
};

DEVICE void pack_floats(const float (&w)[kLaneChannels], uint4* vectors) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    vectors[i] = make_uint4(__float_as_uint(w[4 * i]), __float_as_uint(w[4 * i + 1]),
                            __float_as_uint(w[4 * i + 2]), __float_as_uint(w[4 * i + 3]));
  }
}

// What both kinds of float products do with a lane's floats.
struct FloatFragments {
  uint32_t a[4][4];

  DEVICE void set(int channel, int q, float sample) {
    a[channel / 2][2 * (channel % 2) + q] = __float_as_uint(sample);
  }
  DEVICE void multiply(float (&sums)[4], const uint4* weights) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mma_m16n8k8_tf32(sums, a[2 * i], {weights[i].x, weights[i].y});
      mma_m16n8k8_tf32(sums, a[2 * i + 1], {weights[i].z, weights[i].w});
    }
  }
};

// TF32: samples and weights are rounded to 11 bits.
class Tf32Products {
 public:
  using Feature = float;
  static constexpr int kVectors = 2, kStages = 4;

  DEVICE explicit Tf32Products(const float (&samples)[2][kLaneChannels]) {
#pragma unroll
    for (int i = 0; i < 2 * kLaneChannels; ++i)
      a_.set(i / 2, i % 2, to_tf32(samples[i % 2][i / 2]));
  }
  DEVICE void add(float (&sums)[4], const uint4 (&weights)[kVectors]) const {
    a_.multiply(sums, weights);
  }
  static DEVICE void pack_weights(const float (&w)[kLaneChannels], uint4 (&vectors)[kVectors]) {
    float rounded[kLaneChannels];
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) rounded[i] = to_tf32(w[i]);
    pack_floats(rounded, vectors);
  }

 private:
  FloatFragments a_;
};

// float by three products of TF32: a b = a_high b_high + a_high b_low + a_low b_high, without the
// product of the low parts, which is at most 2^-21 of it and of either sign, as weights are rounded
// to nearest. Samples are cut, which costs two instructions each: the 13 bits that are left lose at
// most 2 more in a_low. A step's products are summed from zero and then added to the sums in float,
// rounded to nearest: the tensor core cuts where it adds, and so cuts sums of 32 channels, not of
// all. An infinite sample or weight gives NaN.
class SplitTf32Products {
 public:
  using Feature = float;
  static constexpr int kVectors = 4, kStages = 3;  // 48 KiB, the most without asking

  DEVICE explicit SplitTf32Products(const float (&samples)[2][kLaneChannels]) {
#pragma unroll
    for (int i = 0; i < 2 * kLaneChannels; ++i) {
      const float sample = samples[i % 2][i / 2];
      const float high = __uint_as_float(__float_as_uint(sample) & kTf32Mask);
      high_.set(i / 2, i % 2, high);
      low_.set(i / 2, i % 2, sample - high);
    }
  }
  DEVICE void add(float (&sums)[4], const uint4 (&weights)[kVectors]) const {
    float step[4] = {};
    low_.multiply(step, weights);
    high_.multiply(step, weights + 2);
    high_.multiply(step, weights);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += step[i];
  }
  static DEVICE void pack_weights(const float (&w)[kLaneChannels], uint4 (&vectors)[kVectors]) {
    float high[kLaneChannels], low[kLaneChannels];
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      high[i] = to_tf32(w[i]);
      low[i] = to_tf32(w[i] - high[i]);
    }
    pack_floats(high, vectors);
    pack_floats(low, vectors + 2);
  }

 private:
  static constexpr uint32_t kTf32Mask = 0xffffe000u;
  FloatFragments high_, low_;
};

}  // namespace mafnet
