// What a convolution of pyramid spatial attention multiplies features by, and what becomes of the
// sums.
#pragma once

#include "pyramid_spatial_attention/features.cuh"

namespace mafnet {

// Outputs of a block; channels of a thread's group. Views are made for groups of kOwn.
constexpr int kTile = 64, kOwn = 4;

// Without tensor cores: 16 x 16 threads with 4 x 4 sums each, channels of a step.
constexpr int kDepth = 16;
static_assert((kTile / kOwn) * (kTile / kOwn) == kThreads);
static_assert(kTile * kDepth == kThreads * kOwn);
constexpr int kPadding = 4;  // of rows whose writers stride over them

// The right operand, and the size of the result.
template <typename T>
struct Product {
  const T* weight;
  int64_t output_stride, tap_stride, part_stride, channel_stride;
  int outputs, channels, taps;
  int64_t pixels;  // of all images
  int height, width;
};

template <typename T, int N, typename A>
DEVICE void add_bias(const T* bias, int outputs, int o, A (&sums)[N]) {
  if (bias == nullptr) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (o + i < outputs) sums[i] += to_accumulator(bias[o + i]);
  }
}

// The first row goes, the others move up: a loop over rows held in registers need not be unrolled.
template <int M, int N, typename A>
DEVICE void shift(A (&rows)[M][N]) {
#pragma unroll
  for (int row = 0; row + 1 < M; ++row) {
#pragma unroll
    for (int i = 0; i < N; ++i) rows[row][i] = rows[row + 1][i];
  }
}

// Bias and activation. T is the type of the bias, D that of the result.
template <typename T, typename D>
struct Activate {
  View<D> output;
  const T* bias;  // may be null
  double slope;

  bool vectors() const { return output.vectors; }
  bool channels_last() const { return output.stride[1] == 1; }

  template <Access kAccess, int N, typename A>
  DEVICE void store(const Place& place, int o, A (&sums)[N]) const {
    add_bias(bias, output.channels, o, sums);
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = leaky_relu(sums[i], static_cast<A>(slope));
    write_group<kAccess>(output, place, o, sums);
  }
};

}  // namespace mafnet
