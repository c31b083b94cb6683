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
DEVICE bool is_inner(const Position& s, int last_row, int last_column) {
  return static_cast<unsigned>(s.row) < static_cast<unsigned>(last_row) &&
         static_cast<unsigned>(s.column) < static_cast<unsigned>(last_column);
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

// Where a lane's channels of an image begin, and its strides, in bytes.
struct Image {
  const unsigned char* data;
  uint32_t row_stride, column_stride;

  DEVICE uint32_t at(int row, int column) const {
    return static_cast<uint32_t>(row) * row_stride + static_cast<uint32_t>(column) * column_stride;
  }
};

DEVICE void weigh_corners(float part_y, float part_x, float mask, float (&weight)[4]) {
  const float low = (1 - part_y) * mask, high = part_y * mask;
  weight[0] = low * (1 - part_x);
  weight[1] = low * part_x;
  weight[2] = high * (1 - part_x);
  weight[3] = high * part_x;
}

template <int kWords>
DEVICE Corners<kWords> inner_corners(const Position& s, const Image& image) {
  // Three sums of 64 bits, from corner to corner: shorter than four from the image's begin.
  const unsigned char* corner = image.data + image.at(s.row, s.column);
  const unsigned char* right = corner + image.column_stride;
  Corners<kWords> c;
  c.value[0] = Words<kWords>::load(corner);
  c.value[1] = Words<kWords>::load(right);
  c.value[2] = Words<kWords>::load(corner + image.row_stride);
  c.value[3] = Words<kWords>::load(right + image.row_stride);
  weigh_corners(s.part_y, s.part_x, s.mask, c.weight);
  return c;
}

// The first pixel of the cell of v on an axis, and v's place in it. From two beside the image on it
// does not matter where: infinity becomes a number, NaN stays one in part.
DEVICE int find_cell(float v, int size, float& part) {
  const int first = split_floor(fminf(fmaxf(v, -2.0f), static_cast<float>(size)), part);
  part = v == v ? part : v;
  return first;
}

DEVICE bool is_inside(int index, int size) {
  return static_cast<unsigned>(index) < static_cast<unsigned>(size);
}

// Of a sample anywhere: corners outside the image are zeros and are not read.
template <int kWords>
DEVICE Corners<kWords> edge_corners(const ModulatedDeformConv2dParams& p, const Position& s,
                                    const Image& image) {
  float part_y, part_x;
  const int first_row = find_cell(s.y, p.height, part_y);
  const int first_column = find_cell(s.x, p.width, part_x);
  Corners<kWords> c;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first_row + i / 2, column = first_column + i % 2;
    const bool inside = is_inside(row, p.height) && is_inside(column, p.width);
    c.value[i] = {};
    if (inside) c.value[i] = Words<kWords>::load(image.data + image.at(row, column));
  }
  weigh_corners(part_y, part_x, s.mask, c.weight);
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
