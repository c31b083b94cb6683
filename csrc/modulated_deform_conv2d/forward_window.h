// The input of the forward pass on the CPU, rewritten for sampling: in the accumulators' type, or
// in bfloat16.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/parallel.h"
#include "common/pixels.h"
#include "common/vectors.h"
#include "modulated_deform_conv2d/cut.h"
#include "modulated_deform_conv2d/plan.h"

namespace mafnet {

// Rows of an image as [slab][row][column][channel], padded: a slab is an offset group of a part.
// The border at the right of a row is that at the left of the next one.
template <typename S>
struct Window {
  explicit Window(const ModulatedDeformConv2dParams& p)
      : slabs(p.parts * p.offset_groups),
        column_stride(round_up(p.offset_group_channels(), kChannelPad)),
        row_stride((p.width + int64_t{kBorder}) * column_stride),
        rows{0, 0},
        data(0) {}

  int64_t slab_size() const { return (rows.high - rows.low + 2 * kBorder) * row_stride; }
  // Where row 0 of the image would begin, and a slab's channel `low`.
  Place place_of(int slab, int low) const {
    const int64_t first = slab * slab_size() + (kBorder - rows.low) * row_stride;
    return {rows, first + kBorder * column_stride + low, row_stride, column_stride};
  }

  int slabs;
  int64_t column_stride, row_stride;
  RowRange rows;
  Buffer<S> data;
};

// The bits of numbers that are bfloat16.
inline MAFNET_NOINLINE void narrow(const float* from, int64_t count, uint16_t* to) {
  with_simd([&]() MAFNET_INLINE_LAMBDA {
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, from + i, sizeof(bits));
      to[i] = static_cast<uint16_t>(bits >> 16);
    }
  });
}

template <typename A, typename S>
void read_window(const ModulatedDeformConv2dParams& p, int64_t n, const RowRange& rows,
                 Window<S>& window) {
  const int64_t count = rows.high - rows.low, border = kBorder * window.column_stride;
  // Planes: all rows of a few, long runs that the hardware foresees. Else all slabs of a row, as
  // the channels of a pixel share lines.
  const bool planes = p.input_stride[3] == 1;
  window.rows = rows;
  // Behind the last row is its border.
  window.data.resize(window.slabs * window.slab_size() + border,
                     window.column_stride != p.offset_group_channels());
  std::fill_n(window.data.data() + window.slabs * window.slab_size(), border, S(0));
  parallel_for(0, count + 2 * kBorder, 4, [&](int64_t begin, int64_t end) {
    Buffer<A> numbers(std::is_same_v<A, S> ? 0 : window.row_stride);
    const int64_t of_slab = end - begin;
    for (int64_t i = 0; i < of_slab * window.slabs; ++i) {
      const int64_t slab = planes ? i / of_slab : i % window.slabs;
      const int64_t y = begin + (planes ? i % of_slab : i / window.slabs);
      S* row = window.data.data() + slab * window.slab_size() + y * window.row_stride;
      if (y < kBorder || y >= kBorder + count) {
        std::fill_n(row, window.row_stride, S(0));
        continue;
      }
      std::fill_n(row, border, S(0));
      const int64_t first = n * p.input_stride[0] + (rows.low + y - kBorder) * p.input_stride[2] +
                            slab * p.offset_group_channels() * p.input_stride[1];
      A* to = numbers.data();
      if constexpr (std::is_same_v<A, S>) to = row + border;
      gather_pixels({p.input, p.dtype, first, p.input_stride[3], p.input_stride[1]}, p.width,
                    p.offset_group_channels(), to, window.column_stride);
      if constexpr (!std::is_same_v<A, S>) narrow(to, window.row_stride - border, row + border);
    }
  });
}

}  // namespace mafnet
