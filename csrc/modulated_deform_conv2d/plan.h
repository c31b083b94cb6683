// Where a block of output pixels samples the input: positions, corners and weights of one tap.
//
// What lies outside is read as zeros, so that it contributes exactly 0 whatever the edge of the
// image holds: they are around the image in the windows that are sampled, so that a sample costs
// one address and four weights wherever it is.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/vectors.h"
#include "modulated_deform_conv2d/params.h"

namespace mafnet {

// 192 pixels are a multiple of every chunk and tile height. Longer runs along the planes of offsets
// serve the memory better (60 pixels cost twice the time of 160 at 180 x 320), shorter ones the
// caches.
constexpr int kMaxBlock = 96;
constexpr int kChunk = 16;

// The output pixels first .. first + count of image n, in raster order.
struct Block {
  int64_t n, first;
  int count;
};

// Rows of input: low <= row < high.
struct RowRange {
  int low, high;
};

template <typename A>
struct Plan {
  A base_y[kMaxBlock], base_x[kMaxBlock];  // where the pixels begin, without tap and offset
  int y[kMaxBlock], x[kMaxBlock];          // of the corner (y, x), perhaps outside
  A part_y[kMaxBlock], part_x[kMaxBlock];  // the distance from that corner; NaN where unknown
  A mask[kMaxBlock];
  A weight[4][kMaxBlock];  // of (y, x) (y, x + 1) (y + 1, x) (y + 1, x + 1), times mask
  A planes[3][kMaxBlock];  // dy, dx and mask where they need converting
  // Of raw offsets: the base flows (x, y), zero where there is none, and the derivatives of dy, dx
  // and mask by their raw values.
  A flow[2][2][kMaxBlock];
  A slope[3][kMaxBlock];
};

// Where an image lies in a window: pixel (y, x) at first + y * row_stride + x * column_stride. Of
// these rows, and of two above and below, all columns are there, and two more on either side; what
// is not the image's is zero.
struct Place {
  RowRange rows;
  int64_t first, row_stride, column_stride;
};

// Of pixels that are not the image's, around it in a window.
constexpr int kBorder = 2;

// Of a window that holds some rows and their border: that at the right of a row is that at the left
// of the next one.
inline Place make_place(const RowRange& rows, int width, int64_t column_stride) {
  const int64_t row_stride = (width + int64_t{kBorder}) * column_stride;
  return {rows, (kBorder - rows.low) * row_stride + kBorder * column_stride, row_stride,
          column_stride};
}

// Elements of such a window.
inline int64_t window_size(const Place& place) {
  return (place.rows.high - place.rows.low + 2 * kBorder) * place.row_stride +
         kBorder * place.column_stride;
}

// What a forward pass keeps of a tap.
template <typename A>
struct Samples {
  int64_t first;                          // of the place
  A weight[4][kMaxBlock];                 // as those of a plan
  int row[kMaxBlock], column[kMaxBlock];  // of the corner (y, x)
};

// Where the pixels of a block begin; first of all for a block.
template <typename A>
void plan_block(const ModulatedDeformConv2dParams& p, const Block& b, Plan<A>& plan);

// Makes the plan of a tap; plane = offset group * taps + tap.
template <typename A>
void plan_tap(const ModulatedDeformConv2dParams& p, const Block& b, int plane, Plan<A>& plan);

// Where the corners (y, x) of a plan lie in a window; of those outside, in its border.
template <typename A>
void find_corners(const Plan<A>& plan, int count, int width, const Place& place, int64_t* at);

// The same for a forward pass, for some taps of an offset group.
template <typename A>
void plan_samples(const ModulatedDeformConv2dParams& p, const Block& b, const Place& place,
                  int plane, int taps, Plan<A>& plan, Samples<A>* samples);

// Where dy, dx and mask of a tap of a block lie, for the caches to be told of in time; null where
// they do not lie in planes.
struct PlaneLines {
  // Of the line of a pixel.
  MAFNET_INLINE void prefetch(int pixel) const {
    __builtin_prefetch(offset + pixel * bytes);
    __builtin_prefetch(offset + offset_plane + pixel * bytes);
    __builtin_prefetch(mask + pixel * bytes);
  }
  MAFNET_INLINE void next_tap() {
    offset += 2 * offset_plane;
    mask += mask_plane;
  }

  const char *offset = nullptr, *mask = nullptr;
  int64_t offset_plane = 0, mask_plane = 0;
  int bytes = 0;  // of an element
};

PlaneLines plane_lines(const ModulatedDeformConv2dParams& p, const Block& b, int plane);

// The rows that the samples of a block read, of all taps of an offset group; what lies outside the
// image reads none.
template <typename A>
RowRange touched_rows(const ModulatedDeformConv2dParams& p, const Block& b, int offset_group,
                      Plan<A>& plan);

}  // namespace mafnet
