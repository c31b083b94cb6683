// How a lane of the tensor-core forward samples: neighbouring channels of a pixel, of one offset
// group, in reads of at most 16 bytes. Coordinates and weights are float.
#pragma once

#include <algorithm>
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

// kWords words of channels, in reads of at most 16 bytes.
template <int kWords>
struct Words {
  static constexpr int kOfRead = std::min(kWords, 4), kReads = kWords / kOfRead;
  Vector<uint32_t, kOfRead> read[kReads];

  static DEVICE Words load(const unsigned char* address) {
    Words words;
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      words.read[i] =
          load_vector<uint32_t, kOfRead>(reinterpret_cast<const uint32_t*>(address) + i * kOfRead);
    }
    return words;
  }
  DEVICE uint32_t at(int i) const { return read[i / kOfRead].at[i % kOfRead]; }
};

// The four corners of a sample of kWords words of channels, and their weights.
template <int kWords>
struct Corners {
  Words<kWords> value[4];
  float weight[4];
};

// Where an image begins, where a lane's channels in it, and its strides, in bytes.
struct Image {
  const unsigned char* data;
  uint32_t channels, row_stride, column_stride;

  DEVICE uint32_t at(int row, int column) const {
    return static_cast<uint32_t>(row) * row_stride + static_cast<uint32_t>(column) * column_stride +
           channels;
  }
  template <int kWords>
  DEVICE Words<kWords> load(uint32_t at) const {
    return Words<kWords>::load(data + at);
  }
};

template <int kWords>
DEVICE Corners<kWords> inner_corners(const Position& s, const Image& image) {
  const uint32_t top = image.at(s.row, s.column), bottom = top + image.row_stride;
  Corners<kWords> c;
  c.value[0] = image.load<kWords>(top);
  c.value[1] = image.load<kWords>(top + image.column_stride);
  c.value[2] = image.load<kWords>(bottom);
  c.value[3] = image.load<kWords>(bottom + image.column_stride);
  const float low = (1 - s.part_y) * s.mask, high = s.part_y * s.mask;
  c.weight[0] = low * (1 - s.part_x);
  c.weight[1] = low * s.part_x;
  c.weight[2] = high * (1 - s.part_x);
  c.weight[3] = high * s.part_x;
  return c;
}

template <int kWords>
DEVICE Corners<kWords> edge_corners(const ModulatedDeformConv2dParams& p, const Position& s,
                                    const Image& image) {
  Sample<float> sample;
  sample.rows = sample_axis<Interpolation::kBilinear, float>(s.y, p.height, Padding::kZeros);
  sample.columns = sample_axis<Interpolation::kBilinear, float>(s.x, p.width, Padding::kZeros);
  Corners<kWords> c;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = sample.rows.index[i / 2], column = sample.columns.index[i % 2];
    c.value[i] = {};
    if (row >= 0 && column >= 0) c.value[i] = image.load<kWords>(image.at(row, column));
    c.weight[i] = sample.rows.weight[i / 2] * s.mask * sample.columns.weight[i % 2];
  }
  return c;
}

// A word's channels: two halves, or one float.
template <typename T>
constexpr int kOfWord = 4 / sizeof(T);

DEVICE void unpack(uint32_t word, float (&channels)[2], __half) {
  __half2 v;
  std::memcpy(&v, &word, sizeof v);
  const float2 both = __half22float2(v);
  channels[0] = both.x;
  channels[1] = both.y;
}
DEVICE void unpack(uint32_t word, float (&channels)[2], __nv_bfloat16) {
  channels[0] = __uint_as_float(word << 16);
  channels[1] = __uint_as_float(word & 0xffff0000u);
}
DEVICE void unpack(uint32_t word, float (&channels)[1], float) {
  channels[0] = __uint_as_float(word);
}

// The samples of the corners' channels.
template <typename T, int kWords>
DEVICE void blend(const Corners<kWords>& c, float* samples) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    float sums[kOfWord<T>] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float channels[kOfWord<T>];
      unpack(c.value[k].at(i), channels, T());
#pragma unroll
      for (int j = 0; j < kOfWord<T>; ++j) sums[j] += c.weight[k] * channels[j];
    }
#pragma unroll
    for (int j = 0; j < kOfWord<T>; ++j) samples[i * kOfWord<T> + j] = sums[j];
  }
}

}  // namespace mafnet
