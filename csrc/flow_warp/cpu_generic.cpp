// See cpu_generic.h. Pixels are planned in blocks of one row: K taps per axis (1, 2 or 4, known
// only at run time, which keeps the templates few). A tap of weight zero does not contribute, so
// that an infinite neighbour cannot spoil an exact sample.
#include "flow_warp/cpu_generic.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

#include "common/simd.h"

namespace mafnet {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kMostTaps = 4;
// Planes are read one after another for all pixels of a block: long blocks spare the TLB.
constexpr int kBlock = 512;
// Channels summed at a time in channels_last.
constexpr int kChannelChunk = 64;

// Taps of count pixels on one axis.
template <typename A>
struct Axis {
  A position[kBlock];
  int index[kMostTaps][kBlock];
  A weight[kMostTaps][kBlock], slope[kMostTaps][kBlock];
};

// The pixels x0 .. x0 + count of row y of the output of image n.
template <typename A>
struct Block {
  int64_t n;
  int y, x0, count;
  int taps;  // per axis
  Axis<A> x, y_axis;

  // Tap t of pixel i: row, column (kOutside for a zero) and weight.
  MAFNET_INLINE int row(int t, int i) const { return y_axis.index[t / taps][i]; }
  MAFNET_INLINE int column(int t, int i) const { return x.index[t % taps][i]; }
  MAFNET_INLINE A weight(int t, int i) const {
    return y_axis.weight[t / taps][i] * x.weight[t % taps][i];
  }
};

// ---- plan

template <Interpolation I, typename A>
MAFNET_NOINLINE void plan_taps(Axis<A>& __restrict__ axis, int count, int size, Padding padding) {
  with_simd<A>([&]() MAFNET_INLINE_LAMBDA {
    for (int i = 0; i < count; ++i) {
      const auto taps = sample_axis<I, A>(axis.position[i], size, padding);
      for (int k = 0; k < kTapsPerAxis<I>; ++k) {
        axis.index[k][i] = taps.index[k];
        axis.weight[k][i] = taps.weight[k];
        axis.slope[k][i] = taps.slope[k];
      }
    }
  });
}

// Component 0 of the flow belongs to x, 1 to y.
template <typename A>
MAFNET_NOINLINE int plan_axis(const FlowWarpParams& p, int64_t n, int y, int x0, int count,
                              int component, Axis<A>& axis) {
  const int64_t first = n * p.flow_stride[0] + y * p.flow_stride[1] + x0 * p.flow_stride[2] +
                        component * p.flow_stride[3];
  dispatch_dtype<Half, BFloat16>(p.flow_dtype, [&](auto type) {
    const auto* flow = static_cast<const typename decltype(type)::type*>(p.flow) + first;
    for (int i = 0; i < count; ++i) {
      const A place = static_cast<A>(component == 0 ? x0 + i : y);
      axis.position[i] = place + static_cast<A>(flow[i * p.flow_stride[2]]);
    }
  });
  return dispatch_interpolation(p.interpolation, [&](auto interpolation) {
    constexpr Interpolation kInterpolation = decltype(interpolation)::value;
    plan_taps<kInterpolation>(axis, count, component == 0 ? p.width : p.height, p.padding);
    return kTapsPerAxis<kInterpolation>;
  });
}

template <typename A>
void plan_block(const FlowWarpParams& p, int64_t n, int y, int x0, int limit, Block<A>& block) {
  block.n = n;
  block.y = y;
  block.x0 = x0;
  block.count = std::min({kBlock, limit, p.out_width - x0});
  block.taps = plan_axis(p, n, y, x0, block.count, 0, block.x);
  plan_axis(p, n, y, x0, block.count, 1, block.y_axis);
}

// Calls visit(block) for the blocks of a span.
template <typename A, typename Visit>
void for_each_block(const FlowWarpParams& p, const PixelSpan& span, const Visit& visit) {
  Block<A> block;
  for (int done = 0; done < span.count; done += block.count) {
    const int64_t pixel = span.first + done;
    plan_block(p, span.n, static_cast<int>(pixel / p.out_width),
               static_cast<int>(pixel % p.out_width), span.count - done, block);
    visit(block);
  }
}

// ---- forward

// One pixel of channels_last: every tap for a chunk of channels at a time.
template <typename T, typename A>
MAFNET_INLINE void blend_pixel(const FlowWarpParams& p, const Block<A>& block, int i,
                               const T* image, T* __restrict__ output) {
  A sum[kChannelChunk];
  for (int64_t c0 = 0; c0 < p.channels; c0 += kChannelChunk) {
    const int count = static_cast<int>(std::min<int64_t>(kChannelChunk, p.channels - c0));
    for (int c = 0; c < count; ++c) sum[c] = 0;
    for (int t = 0; t < block.taps * block.taps; ++t) {
      const int row = block.row(t, i), column = block.column(t, i);
      const A w = block.weight(t, i);
      if (w == 0 || ((row < 0 || column < 0) && w == w)) continue;
      // A NaN weight makes the sum NaN, whatever pixel it meets.
      const T* source = image + std::max(row, 0) * p.input_stride[2] +
                        std::max(column, 0) * p.input_stride[3] + c0;
      for (int c = 0; c < count; ++c) sum[c] += w * static_cast<A>(source[c]);
    }
    for (int c = 0; c < count; ++c) output[c0 + c] = static_cast<T>(sum[c]);
  }
}

// One channel of a block of planes, tap by tap.
template <typename T, typename A>
MAFNET_INLINE void blend_plane(const FlowWarpParams& p, const Block<A>& block, const T* plane,
                               T* __restrict__ output) {
  A sum[kBlock];
  for (int i = 0; i < block.count; ++i) sum[i] = 0;
  for (int t = 0; t < block.taps * block.taps; ++t) {
    for (int i = 0; i < block.count; ++i) {
      const int row = block.row(t, i), column = block.column(t, i);
      const A w = block.weight(t, i);
      const bool used = row >= 0 && column >= 0;
      const T* source = plane + (used ? row * p.input_stride[2] + column * p.input_stride[3] : 0);
      const A value = used ? static_cast<A>(*source) : A(0);
      sum[i] += w == 0 ? A(0) : w * value;
    }
  }
  for (int i = 0; i < block.count; ++i) output[i] = static_cast<T>(sum[i]);
}

template <typename T, typename A>
void write_mask(const FlowWarpParams& p, const Block<A>& block) {
  T* mask = static_cast<T*>(p.mask) +
            (block.n * p.out_height + block.y) * static_cast<int64_t>(p.out_width) + block.x0;
  const A last_x = static_cast<A>(p.width - 1), last_y = static_cast<A>(p.height - 1);
  for (int i = 0; i < block.count; ++i) {
    const A x = block.x.position[i], y = block.y_axis.position[i];
    mask[i] = static_cast<T>(x >= 0 && x <= last_x && y >= 0 && y <= last_y ? 1.0f : 0.0f);
  }
}

template <typename T, typename A>
void forward_block(const FlowWarpParams& p, const Block<A>& block) {
  if (p.mask != nullptr) write_mask<T>(p, block);
  const T* image = static_cast<const T*>(p.input) + block.n * p.input_stride[0];
  T* output = static_cast<T*>(p.output) + block.n * p.output_stride[0] +
              block.y * p.output_stride[2] + block.x0 * p.output_stride[3];
  with_simd<T>([&]() MAFNET_INLINE_LAMBDA {
    if (p.channels_last) {
      for (int i = 0; i < block.count; ++i) {
        blend_pixel(p, block, i, image, output + i * p.output_stride[3]);
      }
    } else {
      for (int64_t c = 0; c < p.channels; ++c) {
        blend_plane(p, block, image + c * p.input_stride[1], output + c * p.output_stride[1]);
      }
    }
  });
}

// ---- grad_flow: the dot product of grad_output with each tap, then the slopes

// dots[t][i] = sum over the channels of grad * tap t of pixel i; 0 for a tap outside.
template <typename T, typename A>
MAFNET_INLINE void find_dots(const FlowWarpParams& p, const Block<A>& block, const T* image,
                             const T* grad, A (&dots)[kMostTaps * kMostTaps][kBlock]) {
  const int64_t* stride = p.grad_output_stride;
  for (int t = 0; t < block.taps * block.taps; ++t) {
    for (int i = 0; i < block.count; ++i) dots[t][i] = 0;
  }
  if (p.channels_last) {
    for (int i = 0; i < block.count; ++i) {
      for (int t = 0; t < block.taps * block.taps; ++t) {
        const int row = block.row(t, i), column = block.column(t, i);
        if (row < 0 || column < 0) continue;
        const T* source = image + row * p.input_stride[2] + column * p.input_stride[3];
        const T* g = grad + i * stride[3];
        A dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < p.channels; ++c) {
          dot += static_cast<A>(g[c]) * static_cast<A>(source[c]);
        }
        dots[t][i] = dot;
      }
    }
    return;
  }
  for (int64_t c = 0; c < p.channels; ++c) {
    const T *plane = image + c * p.input_stride[1], *g = grad + c * stride[1];
    for (int t = 0; t < block.taps * block.taps; ++t) {
      for (int i = 0; i < block.count; ++i) {
        const int row = block.row(t, i), column = block.column(t, i);
        const bool used = row >= 0 && column >= 0;
        const T* source = plane + (used ? row * p.input_stride[2] + column * p.input_stride[3] : 0);
        dots[t][i] += used ? static_cast<A>(g[i]) * static_cast<A>(*source) : A(0);
      }
    }
  }
}

template <typename T, typename A>
void grad_flow_block(const FlowWarpParams& p, const Block<A>& block) {
  const T* image = static_cast<const T*>(p.input) + block.n * p.input_stride[0];
  const T* grad = static_cast<const T*>(p.grad_output) + block.n * p.grad_output_stride[0] +
                  block.y * p.grad_output_stride[2] + block.x0 * p.grad_output_stride[3];
  A dots[kMostTaps * kMostTaps][kBlock];
  with_simd<T>([&]() MAFNET_INLINE_LAMBDA { find_dots(p, block, image, grad, dots); });
  const int64_t pixel =
      (block.n * p.out_height + block.y) * static_cast<int64_t>(p.out_width) + block.x0;
  dispatch_dtype<Half, BFloat16>(p.flow_dtype, [&](auto type) {
    using F = typename decltype(type)::type;
    F* target = static_cast<F*>(p.grad_flow) + 2 * pixel;
    for (int i = 0; i < block.count; ++i) {
      A grad_x = 0, grad_y = 0;
      for (int t = 0; t < block.taps * block.taps; ++t) {
        const int j = t / block.taps, k = t % block.taps;
        grad_x += block.y_axis.weight[j][i] * block.x.slope[k][i] * dots[t][i];
        grad_y += block.y_axis.slope[j][i] * block.x.weight[k][i] * dots[t][i];
      }
      target[2 * i] = static_cast<F>(grad_x);
      target[2 * i + 1] = static_cast<F>(grad_y);
    }
  });
}

// ---- grad_input

// Where a band is summed; strides of channel, row and column.
template <typename A>
struct Sums {
  A* sum;
  int64_t stride[3];
};

template <typename T, typename A>
MAFNET_INLINE void scatter_block(const FlowWarpParams& p, const Block<A>& block, const Band& band,
                                 const Sums<A>& sums) {
  const int64_t* stride = p.grad_output_stride;
  const T* grad = static_cast<const T*>(p.grad_output) + block.n * stride[0] +
                  band.first_channel * stride[1] + block.y * stride[2] + block.x0 * stride[3];
  for (int i = 0; i < block.count; ++i) {
    for (int t = 0; t < block.taps * block.taps; ++t) {
      const int row = block.row(t, i), column = block.column(t, i);
      const A w = block.weight(t, i);
      if (row < band.first_row || row > band.last_row || column < 0 || w == 0) continue;
      const T* g = grad + i * stride[3];
      A* sum = sums.sum + (row - band.first_row) * sums.stride[1] + column * sums.stride[2];
      if (p.channels_last) {
        for (int64_t c = 0; c < band.channels; ++c) sum[c] += w * static_cast<A>(g[c]);
      } else {
        for (int64_t c = 0; c < band.channels; ++c) {
          sum[c * sums.stride[0]] += w * static_cast<A>(g[c * stride[1]]);
        }
      }
    }
  }
}

template <typename T>
void grad_input_band(const FlowWarpParams& p, const RowRange* ranges, const Band& band) {
  using A = Accumulator<T>;
  const int64_t rows = band.last_row - band.first_row + 1;
  // The band has the order of grad_input: channels last, or planes of its rows.
  std::vector<A> buffer(static_cast<size_t>(rows * p.width * band.channels), A(0));
  Sums<A> sums{buffer.data(), {rows * p.width, p.width, 1}};
  if (p.channels_last) sums = {buffer.data(), {1, p.width * band.channels, band.channels}};
  Block<A> block;
  for (int y = 0; y < p.out_height; ++y) {
    if (ranges[y].last < band.first_row || ranges[y].first > band.last_row) continue;
    for (int x0 = 0; x0 < p.out_width; x0 += block.count) {
      plan_block(p, band.n, y, x0, kBlock, block);
      with_simd<T>([&]() MAFNET_INLINE_LAMBDA { scatter_block<T>(p, block, band, sums); });
    }
  }
  const int64_t runs = p.channels_last ? 1 : band.channels;
  const int64_t length = static_cast<int64_t>(buffer.size()) / std::max<int64_t>(runs, 1);
  for (int64_t r = 0; r < runs; ++r) {
    T* target = static_cast<T*>(p.grad_input) + band.n * p.grad_input_stride[0] +
                (band.first_channel + r) * p.grad_input_stride[1] +
                band.first_row * p.grad_input_stride[2];
    const A* source = buffer.data() + r * length;
    for (int64_t e = 0; e < length; ++e) target[e] = static_cast<T>(source[e]);
  }
}

}  // namespace

void generic_forward(const FlowWarpParams& p, const PixelSpan& span) {
  dispatch_dtype<Half, BFloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_block<Accumulator<T>>(p, span, [&](const auto& b) { forward_block<T>(p, b); });
  });
}

void generic_grad_flow(const FlowWarpParams& p, const PixelSpan& span) {
  dispatch_dtype<Half, BFloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_block<Accumulator<T>>(p, span, [&](const auto& b) { grad_flow_block<T>(p, b); });
  });
}

RowRange generic_row_range(const FlowWarpParams& p, int64_t n, int y) {
  return dispatch_dtype<Half, BFloat16>(p.dtype, [&](auto type) {
    using A = Accumulator<typename decltype(type)::type>;
    Axis<A> axis;
    RowRange range{p.height, -1};
    for (int x0 = 0; x0 < p.out_width; x0 += kBlock) {
      const int count = std::min(kBlock, p.out_width - x0);
      const int taps = plan_axis(p, n, y, x0, count, 1, axis);
      for (int k = 0; k < taps; ++k) {
        for (int i = 0; i < count; ++i) {
          const int row = axis.index[k][i];
          range.first = std::min(range.first, row < 0 ? p.height : row);
          range.last = std::max(range.last, row);
        }
      }
    }
    return range;
  });
}

void generic_grad_input(const FlowWarpParams& p, const RowRange* ranges, const Band& band) {
  dispatch_dtype<Half, BFloat16>(
      p.dtype, [&](auto type) { grad_input_band<typename decltype(type)::type>(p, ranges, band); });
}

}  // namespace mafnet
