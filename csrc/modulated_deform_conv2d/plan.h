// Where a block of output pixels samples the input: positions, corners and weights of one tap.
//
// Cells of four pixels that lie wholly inside the image, nearly all, cost one address and four
// weights. Pixels go in chunks of 16; a chunk with a sample that touches the outside chooses each
// corner by itself, and what lies outside is read from a vector of zeros, so that it contributes
// exactly 0 whatever the edge of the image holds.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "modulated_deform_conv2d/params.h"
#include "modulated_deform_conv2d/vectors.h"

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

MAFNET_INLINE Block block_of(const ModulatedDeformConv2dParams& p, int64_t n, int64_t index,
                             int size) {
  return {n, index * size, static_cast<int>(std::min<int64_t>(size, p.pixels() - index * size))};
}

// The channels of one offset group of one image as [row][column][channel].
template <typename A>
struct Source {
  const A* data;
  int64_t row_stride, column_stride;
};

template <typename A>
struct Plan {
  A base_y[kMaxBlock], base_x[kMaxBlock];    // where the pixels begin, without tap and offset
  int64_t offset[kMaxBlock];                 // of the corner (y, x) in the source
  int y[kMaxBlock], x[kMaxBlock];            // its row and column, perhaps outside
  A part_y[kMaxBlock], part_x[kMaxBlock];    // the distance from that corner; NaN where unknown
  A mask[kMaxBlock];
  A weight[4][kMaxBlock];  // of (y, x) (y, x + 1) (y + 1, x) (y + 1, x + 1), times mask
  bool inside[kMaxBlock / kChunk];  // all cells of a chunk
  A planes[3][kMaxBlock];  // dy, dx and mask where they need converting
};

template <typename A>
MAFNET_INLINE void plan_block(const ModulatedDeformConv2dParams& p, const Block& b, Plan<A>& plan) {
  int64_t row = b.first / p.out_width;
  int column = static_cast<int>(b.first % p.out_width);
  for (int i = 0; i < b.count;) {
    const int end = std::min(b.count, i + p.out_width - column);
    const A y = static_cast<A>(row * p.stride_h - p.padding_h);
    for (; i < end; ++i, ++column) {
      plan.mask[i] = 1;  // what plan_tap finds where there is no mask
      plan.base_y[i] = y;
      plan.base_x[i] = static_cast<A>(int64_t{column} * p.stride_w - p.padding_w);
    }
    column = 0;
    ++row;
  }
}

// count elements of a plane as A: where they lie, or copied to room, which holds whole chunks.
template <typename A>
MAFNET_INLINE const A* read_plane(const void* data, Dtype dtype, int64_t first, int64_t stride,
                                  int count, A* room) {
  return dispatch_dtype<torch::headeronly::Half, torch::headeronly::BFloat16>(
      dtype, [&](auto type) MAFNET_INLINE_LAMBDA -> const A* {
        using T = typename decltype(type)::type;
        const T* plane = static_cast<const T*>(data) + first;
        if constexpr (std::is_same_v<T, A>) {
          if (stride == 1 && count % kChunk == 0) return plane;
        }
        for (int i = 0; i < count; ++i) room[i] = static_cast<A>(plane[i * stride]);
        return room;
      });
}

// Planes lie far apart, so that the hardware does not foresee the next one.
MAFNET_INLINE void prefetch(const void* data, Dtype dtype, int64_t first, int64_t stride,
                            int count) {
  const int64_t size = dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
  const char* from = static_cast<const char*>(data) + first * size;
  for (int64_t at = 0; at < count * size && stride == 1; at += 64) __builtin_prefetch(from + at);
}

MAFNET_INLINE void prefetch_plane(const ModulatedDeformConv2dParams& p, const Block& b,
                                  int plane) {
  if (plane >= p.offset_groups * p.taps()) return;
  const int64_t at = b.n * p.offset_stride[0] + b.first * p.offset_stride[2] +
                     2 * plane * p.offset_stride[1];
  prefetch(p.offset, p.offset_dtype, at, p.offset_stride[2], b.count);
  prefetch(p.offset, p.offset_dtype, at + p.offset_stride[1], p.offset_stride[2], b.count);
  if (p.mask == nullptr) return;
  prefetch(p.mask, p.mask_dtype,
           b.n * p.mask_stride[0] + b.first * p.mask_stride[2] + plane * p.mask_stride[1],
           p.mask_stride[2], b.count);
}

// Makes the plan of a tap: plane = offset group * taps + tap.
template <typename A>
MAFNET_INLINE void plan_tap(const ModulatedDeformConv2dParams& p, const Block& b,
                            const Source<A>& source, int plane, Plan<A>& plan) {
  const int tap = plane % p.taps();
  const A tap_y = static_cast<A>(tap / p.kernel_w * p.dilation_h);
  const A tap_x = static_cast<A>(tap % p.kernel_w * p.dilation_w);
  const int64_t pixel = b.n * p.offset_stride[0] + b.first * p.offset_stride[2];
  const int64_t at = pixel + 2 * plane * p.offset_stride[1];
  const A* dy = read_plane<A>(p.offset, p.offset_dtype, at, p.offset_stride[2], b.count,
                              plan.planes[0]);
  const A* dx = read_plane<A>(p.offset, p.offset_dtype, at + p.offset_stride[1],
                              p.offset_stride[2], b.count, plan.planes[1]);
  const A* mask = plan.mask;
  if (p.mask != nullptr) {
    mask = read_plane<A>(
        p.mask, p.mask_dtype,
        b.n * p.mask_stride[0] + b.first * p.mask_stride[2] + plane * p.mask_stride[1],
        p.mask_stride[2], b.count, plan.planes[2]);
  }

  prefetch_plane(p, b, plane + 1);
  const A end_y = static_cast<A>(p.height), end_x = static_cast<A>(p.width);
  const unsigned cells_y = static_cast<unsigned>(std::max(p.height - 1, 0));
  const unsigned cells_x = static_cast<unsigned>(std::max(p.width - 1, 0));
  for (int chunk = 0; chunk * kChunk < b.count; ++chunk) {
    const int begin = chunk * kChunk;
    int outside = 0;
#pragma omp simd reduction(| : outside)
    for (int i = begin; i < begin + kChunk; ++i) {
      // Two pixels outside is as far as it gets; selects, which a NaN passes unchanged.
      A y = plan.base_y[i] + tap_y + dy[i], x = plan.base_x[i] + tap_x + dx[i];
      y = y < A(-2) ? A(-2) : y;
      x = x < A(-2) ? A(-2) : x;
      y = y > end_y ? end_y : y;
      x = x > end_x ? end_x : x;
      const A floor_y = std::floor(y), floor_x = std::floor(x);
      const A ty = y - floor_y, tx = x - floor_x;  // NaN where y or x is
      const int row = static_cast<int>(floor_y == floor_y ? floor_y : A(-2));
      const int column = static_cast<int>(floor_x == floor_x ? floor_x : A(-2));
      const A m = mask[i];
      const A w1 = ty * m, w0 = (1 - ty) * m;
      plan.weight[0][i] = w0 * (1 - tx);
      plan.weight[1][i] = w0 * tx;
      plan.weight[2][i] = w1 * (1 - tx);
      plan.weight[3][i] = w1 * tx;
      plan.y[i] = row;
      plan.x[i] = column;
      plan.part_y[i] = ty;
      plan.part_x[i] = tx;
      plan.mask[i] = m;
      plan.offset[i] = row * source.row_stride + column * source.column_stride;
      outside |= !(static_cast<unsigned>(row) < cells_y && static_cast<unsigned>(column) < cells_x);
    }
    plan.inside[chunk] = outside == 0;
  }
}

// The four corners of a sample, or zeros.
template <typename A>
struct Corners {
  const A* at[4];
};

template <typename A>
MAFNET_INLINE Corners<A> inner_corners(const Source<A>& source, const Plan<A>& plan, int i) {
  const A* top = source.data + plan.offset[i];
  const A* bottom = top + source.row_stride;
  return {{top, top + source.column_stride, bottom, bottom + source.column_stride}};
}

// Which corners lie in the image.
MAFNET_INLINE bool corner_is_inside(int height, int width, int y, int x, int corner) {
  return static_cast<unsigned>(y + corner / 2) < static_cast<unsigned>(height) &&
         static_cast<unsigned>(x + corner % 2) < static_cast<unsigned>(width);
}

template <typename A>
MAFNET_INLINE Corners<A> edge_corners(const ModulatedDeformConv2dParams& p, const Source<A>& source,
                                      const Plan<A>& plan, int i, const A* zeros) {
  Corners<A> corners = inner_corners(source, plan, i);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const bool inside = corner_is_inside(p.height, p.width, plan.y[i], plan.x[i], k);
    corners.at[k] = inside ? corners.at[k] : zeros;
  }
  return corners;
}

// Calls body(i, corners) for the pixels of a block; corners point at channel `low` of the source.
template <typename A, typename Body>
MAFNET_INLINE void for_samples(const ModulatedDeformConv2dParams& p, const Block& b,
                               const Source<A>& source, const Plan<A>& plan, const A* zeros,
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
