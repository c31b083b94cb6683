// How a lane of the tensor-core forward samples: neighbouring channels of a pixel, of one offset
// group, in reads of at most 16 bytes. Coordinates and weights are float.
#pragma once

#include <cstring>

#include "modulated_deform_conv2d/sample.cuh"

namespace mafnet {

// What a sample is made of before its corners are read.
struct Position {
  float y, x, part_y, part_x, mask;
  int row, column;
};

DEVICE Position make_position(float base_y, float base_x, const Coordinates<float>& c) {
  Position s;
  s.y = base_y + c.dy;
  s.x = base_x + c.dx;
  s.row = split_floor(s.y, s.part_y);
  s.column = split_floor(s.x, s.part_x);
  s.mask = c.mask;
  return s;
}

// All four corners in the image. Not so for NaN and for far coordinates.
DEVICE bool is_inner(const ModulatedDeformConv2dParams& p, const Position& s) {
  return static_cast<unsigned>(s.row) < static_cast<unsigned>(p.height - 1) &&
         static_cast<unsigned>(s.column) < static_cast<unsigned>(p.width - 1);
}

// The four corners of a sample of kWords words of channels, and their weights.
template <int kWords>
struct Corners {
  Vector<uint32_t, kWords> value[4];
  float weight[4];
};

template <int kWords, typename T>
DEVICE Vector<uint32_t, kWords> load_words(const T* address) {
  return load_vector<uint32_t, kWords>(reinterpret_cast<const uint32_t*>(address));
}

template <int kWords, typename T>
DEVICE Corners<kWords> inner_corners(const Position& s, const T* image, int row_stride,
                                     int column_stride) {
  const T* top = image + (s.row * row_stride + s.column * column_stride);
  const T* bottom = top + row_stride;
  Corners<kWords> c;
  c.value[0] = load_words<kWords>(top);
  c.value[1] = load_words<kWords>(top + column_stride);
  c.value[2] = load_words<kWords>(bottom);
  c.value[3] = load_words<kWords>(bottom + column_stride);
  const float low = (1 - s.part_y) * s.mask, high = s.part_y * s.mask;
  c.weight[0] = low * (1 - s.part_x);
  c.weight[1] = low * s.part_x;
  c.weight[2] = high * (1 - s.part_x);
  c.weight[3] = high * s.part_x;
  return c;
}

template <int kWords, typename T>
DEVICE Corners<kWords> edge_corners(const ModulatedDeformConv2dParams& p, const Position& s,
                                    const T* image, int row_stride, int column_stride) {
  Sample<float> sample;
  sample.rows = sample_axis<Interpolation::kBilinear, float>(s.y, p.height, Padding::kZeros);
  sample.columns = sample_axis<Interpolation::kBilinear, float>(s.x, p.width, Padding::kZeros);
  Corners<kWords> c;
  for_corners(sample, row_stride, column_stride, [&](int j, int k, bool inside, int64_t at) {
    c.value[2 * j + k] = inside ? load_words<kWords>(image + at) : Vector<uint32_t, kWords>{};
    c.weight[2 * j + k] = sample.rows.weight[j] * s.mask * sample.columns.weight[k];
  });
  return c;
}

DEVICE float2 unpack(uint32_t pair, __half) {
  __half2 v;
  std::memcpy(&v, &pair, sizeof v);
  return __half22float2(v);
}
DEVICE float2 unpack(uint32_t pair, __nv_bfloat16) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
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

// The sample as pairs.
template <typename T, int kWords>
DEVICE void blend(const Corners<kWords>& c, uint32_t* sample) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    float low = 0, high = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 v = unpack(c.value[k].at[i], T());
      low += c.weight[k] * v.x;
      high += c.weight[k] * v.y;
    }
    sample[i] = pack(low, high, T());
  }
}

}  // namespace mafnet
