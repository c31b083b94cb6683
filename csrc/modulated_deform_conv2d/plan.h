// Where a block of output pixels samples the input: positions, corners and weights of one tap.
//
// Cells of four pixels that lie wholly inside the image, nearly all, cost one address and four
// weights. What lies outside is read as zeros, so that it contributes exactly 0 whatever the edge
// of the image holds: in the forward pass they are around the image, in the backward pixels go in
// chunks of 16, and one with a sample that touches the outside chooses each corner by itself.
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

// The channels of one offset group of one image as [row][column][channel], of accumulators or, as
// the bits of bfloat16, of uint16_t.
template <typename S>
struct Source {
  const S* data;
  int64_t row_stride, column_stride;
};

template <typename A>
struct Plan {
  A base_y[kMaxBlock], base_x[kMaxBlock];  // where the pixels begin, without tap and offset
  int64_t offset[kMaxBlock];               // of the corner (y, x) in the source
  int y[kMaxBlock], x[kMaxBlock];          // its row and column, perhaps outside
  A part_y[kMaxBlock], part_x[kMaxBlock];  // the distance from that corner; NaN where unknown
  A mask[kMaxBlock];
  A weight[4][kMaxBlock];           // of (y, x) (y, x + 1) (y + 1, x) (y + 1, x + 1), times mask
  bool inside[kMaxBlock / kChunk];  // all cells of a chunk
  A planes[3][kMaxBlock];           // dy, dx and mask where they need converting
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

// What a forward pass keeps of a tap. It samples such a window, so that it chooses no corners.
template <typename A>
struct Samples {
  int64_t first;                          // of the place
  A weight[4][kMaxBlock];                 // as those of a plan
  int row[kMaxBlock], column[kMaxBlock];  // of the corner (y, x)
};

// Where the pixels of a block begin; first of all for a block.
template <typename A>
void plan_block(const ModulatedDeformConv2dParams& p, const Block& b, Plan<A>& plan);

// Makes the plan of a tap, for sources of these strides; plane = offset group * taps + tap.
template <typename A>
void plan_tap(const ModulatedDeformConv2dParams& p, const Block& b, int64_t row_stride,
              int64_t column_stride, int plane, Plan<A>& plan);

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

// The four corners of a sample, or zeros.
template <typename S>
struct Corners {
  const S* at[4];
};

template <typename S, typename A>
MAFNET_INLINE Corners<S> inner_corners(const Source<S>& source, const Plan<A>& plan, int i) {
  const S* top = source.data + plan.offset[i];
  const S* bottom = top + source.row_stride;
  return {{top, top + source.column_stride, bottom, bottom + source.column_stride}};
}

// Which corners lie in the image.
MAFNET_INLINE bool corner_is_inside(int height, int width, int y, int x, int corner) {
  return static_cast<unsigned>(y + corner / 2) < static_cast<unsigned>(height) &&
         static_cast<unsigned>(x + corner % 2) < static_cast<unsigned>(width);
}

template <typename S, typename A>
MAFNET_INLINE Corners<S> edge_corners(const ModulatedDeformConv2dParams& p, const Source<S>& source,
                                      const Plan<A>& plan, int i, const S* zeros) {
  Corners<S> corners = inner_corners(source, plan, i);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const bool inside = corner_is_inside(p.height, p.width, plan.y[i], plan.x[i], k);
    corners.at[k] = inside ? corners.at[k] : zeros;
  }
  return corners;
}

// Calls body(i, corners) for the pixels of a block; corners point at channel `low` of the source.
template <typename S, typename A, typename Body>
MAFNET_INLINE void for_samples(const ModulatedDeformConv2dParams& p, const Block& b,
                               const Source<S>& source, const Plan<A>& plan, const S* zeros,
                               const Body& body) {
  for (int begin = 0; begin < b.count; begin += kChunk) {
    const int end = std::min(b.count, begin + kChunk);
    if (plan.inside[begin / kChunk]) {
      for (int i = begin; i < end; ++i) body(i, inner_corners(source, plan, i));
    } else {
      for (int i = begin; i < end; ++i) body(i, edge_corners(p, source, plan, i, zeros));
    }
  }
}

}  // namespace mafnet
