// flow_warp on the CPU: output(n, c, p) = image(n, c, p + flow(n, p)).
//
// Pixels are planned in blocks of one row (positions, taps and weights), once for all channels.
// channels_last then vectorises over C. Planes are read by scalar loads, and one channel follows
// another only after a strip of about 2000 pixels: shorter strips thrash the TLB (22 ms for 64 x
// 180 x 320 at 64 pixels, 6 at 2048), and gather instructions were no faster than scalar loads. A
// tap of weight zero does not contribute, so that an infinite neighbour cannot spoil an exact
// sample.
//
// Forward and grad_flow: one task per output row or strip. grad_input: one task per band of its
// rows, which only that task writes; it visits the source rows that reach the band in raster order.
// No atomics, and the same sums in the same order whatever the number of threads.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "common/simd.h"
#include "flow_warp/params.h"

namespace mafnet {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// 64 pixels: a bicubic plan (16 taps) stays within L1, and 64 is a multiple of every vector width.
constexpr int kBlock = 64;
constexpr int kStrip = 2048;
// Rows of grad_input per task: small enough to feed many cores, large enough that a source row,
// which reaches one or two bands under a smooth flow, is seldom planned twice.
constexpr int kBandRows = 8;
// Channels summed at a time where there are more taps than a loop can hold in registers.
constexpr int kChannelChunk = 64;
constexpr int64_t kGrainElements = 1 << 15;

template <typename A, int K>
struct AxisBlock {
  int index[K][kBlock];
  A weight[K][kBlock];
  A slope[K][kBlock];
};

// The taps of count pixels of row y of image n, beginning at x0.
template <typename A, int K>
struct BlockPlan {
  int64_t n;
  int y, x0, count;
  A x_position[kBlock], y_position[kBlock];
  AxisBlock<A, K> x, y_axis;
};

template <Interpolation I, typename A, Padding P>
MAFNET_INLINE void plan_axis_padded(const A* __restrict__ position, int count, int size,
                                    AxisBlock<A, kTapsPerAxis<I>>& __restrict__ block) {
  for (int i = 0; i < count; ++i) {
    const auto taps = sample_axis<I, A>(position[i], size, P);
    for (int k = 0; k < kTapsPerAxis<I>; ++k) {
      block.index[k][i] = taps.index[k];
      block.weight[k][i] = taps.weight[k];
      block.slope[k][i] = taps.slope[k];
    }
  }
}

template <Interpolation I, typename A>
MAFNET_NOINLINE void plan_axis(const A* position, int count, int size, Padding padding,
                               AxisBlock<A, kTapsPerAxis<I>>& block) {
  with_simd<A>([&]() MAFNET_INLINE_LAMBDA {
    switch (padding) {  // outside the loop: each of the three loops is straight-line code
      case Padding::kBorder:
        return plan_axis_padded<I, A, Padding::kBorder>(position, count, size, block);
      case Padding::kReflection:
        return plan_axis_padded<I, A, Padding::kReflection>(position, count, size, block);
      default:
        return plan_axis_padded<I, A, Padding::kZeros>(position, count, size, block);
    }
  });
}

// Positions in one axis: the pixel's own place plus component 0 (x) or 1 (y) of the flow.
template <typename A>
void read_positions(const FlowWarpParams& p, int64_t n, int y, int x0, int component, int count,
                    A* position) {
  const int64_t first = n * p.flow_stride[0] + y * p.flow_stride[1] + x0 * p.flow_stride[2] +
                        component * p.flow_stride[3];
  dispatch_dtype<Half, BFloat16>(p.flow_dtype, [&](auto type) {
    const auto* flow = static_cast<const typename decltype(type)::type*>(p.flow) + first;
    for (int i = 0; i < count; ++i) {
      const A place = static_cast<A>(component == 0 ? x0 + i : y);
      position[i] = place + static_cast<A>(flow[i * p.flow_stride[2]]);
    }
  });
}

template <Interpolation I, typename A>
MAFNET_NOINLINE void plan_block(const FlowWarpParams& p, int64_t n, int y, int x0, int limit,
                                BlockPlan<A, kTapsPerAxis<I>>& plan) {
  plan.n = n;
  plan.y = y;
  plan.x0 = x0;
  plan.count = std::min({kBlock, limit, p.out_width - x0});
  read_positions(p, n, y, x0, 0, plan.count, plan.x_position);
  read_positions(p, n, y, x0, 1, plan.count, plan.y_position);
  plan_axis<I>(plan.x_position, plan.count, p.width, p.padding, plan.x);
  plan_axis<I>(plan.y_position, plan.count, p.height, p.padding, plan.y_axis);
}

// Where the taps of one pixel lie in a channels_last image; taps that read as zero point at zeros.
template <bool kSkipZeroWeight, typename T, typename A, int K>
MAFNET_INLINE void find_taps(const FlowWarpParams& p, const BlockPlan<A, K>& plan, int i,
                             const T* image, const T* zeros, const T* (&source)[K * K],
                             A (&weight)[K * K]) {
  for (int j = 0; j < K; ++j) {
    const int row = plan.y_axis.index[j][i];
    for (int k = 0; k < K; ++k) {
      const int column = plan.x.index[k][i];
      const A w = plan.y_axis.weight[j][i] * plan.x.weight[k][i];
      const bool used = row >= 0 && column >= 0 && !(kSkipZeroWeight && w == 0);
      source[j * K + k] =
          used ? image + row * p.input_stride[2] + column * p.input_stride[3] : zeros;
      weight[j * K + k] = w;
    }
  }
}

// The taps of a strip: the pixels first .. first + count of image n, counted in raster order. A tap
// that reads as zero has a legal offset and weight 0 (or NaN). Index is int wherever a plane allows
// it.
template <typename A, int K, typename Index>
struct Strip {
  int64_t n, first;
  int count;
  Index offset[K * K][kStrip];
  A weight[K * K][kStrip];
};

// Taps in one pass over a strip.
template <int K>
constexpr int kGroup = K == 1 ? 1 : 4;

// Copies a block into a strip. Where kOnlyUse, weights become 1 (the tap is used) or 0.
template <bool kOnlyUse, typename A, int K, typename Index>
MAFNET_NOINLINE void append_block(const FlowWarpParams& p, const BlockPlan<A, K>& plan, int at,
                                  Strip<A, K, Index>& strip) {
  const Index row_stride = static_cast<Index>(p.input_stride[2]);
  const Index column_stride = static_cast<Index>(p.input_stride[3]);
  for (int t = 0; t < K * K; ++t) {
    for (int i = 0; i < plan.count; ++i) {
      const int row = plan.y_axis.index[t / K][i], column = plan.x.index[t % K][i];
      const A w = plan.y_axis.weight[t / K][i] * plan.x.weight[t % K][i];
      const bool used = row >= 0 && column >= 0;
      strip.offset[t][at + i] = used ? row * row_stride + column * column_stride : Index(0);
      strip.weight[t][at + i] = kOnlyUse ? A(used) : used || w != w ? w : A(0);
    }
  }
}

// Whether every offset within one plane of input fits in an int.
bool has_small_planes(const FlowWarpParams& p) {
  const int64_t last = (p.height - 1) * p.input_stride[2] + (p.width - 1) * p.input_stride[3];
  return last <= std::numeric_limits<int>::max();
}

int64_t strips_per_image(const FlowWarpParams& p) {
  return (static_cast<int64_t>(p.out_height) * p.out_width + kStrip - 1) / kStrip;
}

// Plans strip `task` and calls visit(plan, at) for each of its blocks, whose pixels begin at `at`.
template <Interpolation I, bool kOnlyUse, typename A, int K, typename Index, typename Visit>
void plan_strip(const FlowWarpParams& p, int64_t task, Strip<A, K, Index>& strip,
                const Visit& visit) {
  const int64_t pixels = static_cast<int64_t>(p.out_height) * p.out_width;
  strip.n = task / strips_per_image(p);
  strip.first = task % strips_per_image(p) * kStrip;
  strip.count = static_cast<int>(std::min<int64_t>(kStrip, pixels - strip.first));
  BlockPlan<A, K> plan;
  for (int at = 0; at < strip.count; at += plan.count) {
    const int64_t pixel = strip.first + at;
    plan_block<I>(p, strip.n, static_cast<int>(pixel / p.out_width),
                  static_cast<int>(pixel % p.out_width), strip.count - at, plan);
    append_block<kOnlyUse>(p, plan, at, strip);
    visit(plan, at);
  }
}

template <typename T, typename A>
MAFNET_INLINE const T* input_image(const FlowWarpParams& p, const A& plan) {
  return static_cast<const T*>(p.input) + plan.n * p.input_stride[0];
}

// ---- forward

// output[c] = sum over taps of weight[t] * source[t][c], four taps at a time.
template <int kTaps, typename T, typename A>
MAFNET_INLINE void blend(const T* const* source, const A* weight, int64_t channels,
                         T* __restrict__ output) {
  if constexpr (kTaps == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      output[c] = static_cast<T>(weight[0] * static_cast<A>(source[0][c]));
    }
    return;
  }
  A sum[kChannelChunk];
  for (int64_t c0 = 0; c0 < channels; c0 += kChannelChunk) {
    const int count = static_cast<int>(std::min<int64_t>(kChannelChunk, channels - c0));
#pragma GCC unroll 1
    for (int t = 0; t < kTaps; t += 4) {
      const T *s0 = source[t] + c0, *s1 = source[t + 1] + c0;
      const T *s2 = source[t + 2] + c0, *s3 = source[t + 3] + c0;
      const A w0 = weight[t], w1 = weight[t + 1], w2 = weight[t + 2], w3 = weight[t + 3];
      for (int c = 0; c < count; ++c) {
        const A part = w0 * static_cast<A>(s0[c]) + w1 * static_cast<A>(s1[c]) +
                       (w2 * static_cast<A>(s2[c]) + w3 * static_cast<A>(s3[c]));
        if constexpr (kTaps == 4) {
          output[c0 + c] = static_cast<T>(part);
        } else {
          sum[c] = t == 0 ? part : sum[c] + part;
        }
      }
    }
    if constexpr (kTaps > 4) {
      for (int c = 0; c < count; ++c) output[c0 + c] = static_cast<T>(sum[c]);
    }
  }
}

template <typename T, typename A, int K>
MAFNET_INLINE void forward_channels_last(const FlowWarpParams& p, const BlockPlan<A, K>& plan,
                                         const T* zeros) {
  const T* image = input_image<T>(p, plan);
  T* output = static_cast<T*>(p.output) + plan.n * p.output_stride[0] +
              plan.y * p.output_stride[2] + plan.x0 * p.output_stride[3];
  for (int i = 0; i < plan.count; ++i) {
    const T* source[K * K];
    A weight[K * K];
    find_taps<true>(p, plan, i, image, zeros, source, weight);
    blend<K * K>(source, weight, p.channels, output + i * p.output_stride[3]);
  }
}

// One channel of a strip: output[i] = sum over taps of weight * plane[offset].
template <typename T, typename A, int K, typename Index>
void blend_plane(const Strip<A, K, Index>& strip, const T* plane, T* __restrict__ output) {
  A sum[kStrip];
#pragma GCC unroll 1
  for (int t = 0; t < K * K; t += kGroup<K>) {
    for (int i = 0; i < strip.count; ++i) {
      A part = 0;
      for (int u = t; u < t + kGroup<K>; ++u) {
        const A w = strip.weight[u][i], value = static_cast<A>(plane[strip.offset[u][i]]);
        part += w == 0 ? A(0) : w * value;
      }
      if constexpr (K * K == kGroup<K>) {
        output[i] = static_cast<T>(part);
      } else {
        sum[i] = t == 0 ? part : sum[i] + part;
      }
    }
  }
  if constexpr (K * K > kGroup<K>) {
    for (int i = 0; i < strip.count; ++i) output[i] = static_cast<T>(sum[i]);
  }
}

template <typename T, typename A, int K>
void write_mask(const FlowWarpParams& p, const BlockPlan<A, K>& plan) {
  T* mask = static_cast<T*>(p.mask) +
            (plan.n * p.out_height + plan.y) * static_cast<int64_t>(p.out_width) + plan.x0;
  const A last_x = static_cast<A>(p.width - 1), last_y = static_cast<A>(p.height - 1);
  for (int i = 0; i < plan.count; ++i) {
    const A x = plan.x_position[i], y = plan.y_position[i];
    mask[i] = static_cast<T>(x >= 0 && x <= last_x && y >= 0 && y <= last_y ? 1.0f : 0.0f);
  }
}

template <typename T, Interpolation I>
void forward_rows(const FlowWarpParams& p, int64_t begin, int64_t end, const T* zeros) {
  BlockPlan<Accumulator<T>, kTapsPerAxis<I>> plan;
  for (int64_t r = begin; r < end; ++r) {
    for (int x0 = 0; x0 < p.out_width; x0 += kBlock) {
      plan_block<I>(p, r / p.out_height, static_cast<int>(r % p.out_height), x0, kBlock, plan);
      if (p.mask != nullptr) write_mask<T>(p, plan);
      with_simd<T>([&]() MAFNET_INLINE_LAMBDA { forward_channels_last<T>(p, plan, zeros); });
    }
  }
}

template <typename T, Interpolation I, typename Index>
void forward_strips(const FlowWarpParams& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int K = kTapsPerAxis<I>;
  auto strip = std::make_unique<Strip<A, K, Index>>();
  for (int64_t task = begin; task < end; ++task) {
    plan_strip<I, false>(p, task, *strip, [&](const BlockPlan<A, K>& plan, int) {
      if (p.mask != nullptr) write_mask<T>(p, plan);
    });
    const T* image = static_cast<const T*>(p.input) + strip->n * p.input_stride[0];
    T* output = static_cast<T*>(p.output) + strip->n * p.output_stride[0] + strip->first;
    for (int64_t c = 0; c < p.channels; ++c) {
      blend_plane(*strip, image + c * p.input_stride[1], output + c * p.output_stride[1]);
    }
  }
}

// ---- grad_flow: the dot product of grad_output with each tap, then the slopes

template <typename T, typename A, int K>
MAFNET_INLINE void store_grad_flow(const FlowWarpParams& p, const BlockPlan<A, K>& plan, int i,
                                   const A (&dot)[K * K]) {
  A grad_x = 0, grad_y = 0;
  for (int j = 0; j < K; ++j) {
    for (int k = 0; k < K; ++k) {
      grad_x += plan.y_axis.weight[j][i] * plan.x.slope[k][i] * dot[j * K + k];
      grad_y += plan.y_axis.slope[j][i] * plan.x.weight[k][i] * dot[j * K + k];
    }
  }
  const int64_t pixel =
      (plan.n * p.out_height + plan.y) * static_cast<int64_t>(p.out_width) + plan.x0 + i;
  if (p.flow_dtype == p.dtype) {
    static_cast<T*>(p.grad_flow)[2 * pixel] = static_cast<T>(grad_x);
    static_cast<T*>(p.grad_flow)[2 * pixel + 1] = static_cast<T>(grad_y);
  } else {
    static_cast<float*>(p.grad_flow)[2 * pixel] = static_cast<float>(grad_x);
    static_cast<float*>(p.grad_flow)[2 * pixel + 1] = static_cast<float>(grad_y);
  }
}

template <typename T, typename A>
MAFNET_INLINE void dot4(const T* const* source, const T* grad, int64_t channels, A* dot) {
  const T *s0 = source[0], *s1 = source[1], *s2 = source[2], *s3 = source[3];
  A d0 = 0, d1 = 0, d2 = 0, d3 = 0;
#pragma omp simd reduction(+ : d0, d1, d2, d3)
  for (int64_t c = 0; c < channels; ++c) {
    const A g = static_cast<A>(grad[c]);
    d0 += g * static_cast<A>(s0[c]);
    d1 += g * static_cast<A>(s1[c]);
    d2 += g * static_cast<A>(s2[c]);
    d3 += g * static_cast<A>(s3[c]);
  }
  dot[0] = d0;
  dot[1] = d1;
  dot[2] = d2;
  dot[3] = d3;
}

template <typename T>
MAFNET_INLINE const T* grad_output_row(const FlowWarpParams& p, int64_t n, int y, int x0) {
  return static_cast<const T*>(p.grad_output) + n * p.grad_output_stride[0] +
         y * p.grad_output_stride[2] + x0 * p.grad_output_stride[3];
}

template <typename T, typename A, int K>
MAFNET_INLINE void grad_flow_channels_last(const FlowWarpParams& p, const BlockPlan<A, K>& plan,
                                           const T* zeros) {
  const T* image = input_image<T>(p, plan);
  const T* grad = grad_output_row<T>(p, plan.n, plan.y, plan.x0);
  for (int i = 0; i < plan.count; ++i) {
    const T* source[K * K];
    A weight[K * K], dot[K * K];
    find_taps<false>(p, plan, i, image, zeros, source, weight);
#pragma GCC unroll 1
    for (int t = 0; t < K * K; t += 4) {
      dot4(source + t, grad + i * p.grad_output_stride[3], p.channels, dot + t);
    }
    store_grad_flow<T>(p, plan, i, dot);
  }
}

// Dot products of grad_output with the taps of a strip's pixels, tap by tap.
template <typename A, int K>
struct StripDots {
  A at[K * K][kStrip];
};

// Adds what one channel contributes; the weights of the strip say which taps are used.
template <typename T, typename A, int K, typename Index>
void add_plane_dots(const Strip<A, K, Index>& strip, const T* plane, const T* grad,
                    StripDots<A, K>& __restrict__ dots) {
#pragma GCC unroll 1
  for (int t = 0; t < K * K; t += kGroup<K>) {
    for (int i = 0; i < strip.count; ++i) {
      const A g = static_cast<A>(grad[i]);
      for (int u = t; u < t + kGroup<K>; ++u) {
        const A value = static_cast<A>(plane[strip.offset[u][i]]);
        dots.at[u][i] += strip.weight[u][i] == 0 ? A(0) : g * value;
      }
    }
  }
}

template <typename T, Interpolation I>
void grad_flow_rows(const FlowWarpParams& p, int64_t begin, int64_t end, const T* zeros) {
  BlockPlan<Accumulator<T>, kTapsPerAxis<I>> plan;
  for (int64_t r = begin; r < end; ++r) {
    for (int x0 = 0; x0 < p.out_width; x0 += kBlock) {
      plan_block<I>(p, r / p.out_height, static_cast<int>(r % p.out_height), x0, kBlock, plan);
      with_simd<T>([&]() MAFNET_INLINE_LAMBDA { grad_flow_channels_last<T>(p, plan, zeros); });
    }
  }
}

template <typename T, Interpolation I, typename Index>
void grad_flow_strips(const FlowWarpParams& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int K = kTapsPerAxis<I>;
  auto strip = std::make_unique<Strip<A, K, Index>>();
  auto dots = std::make_unique<StripDots<A, K>>();
  std::vector<BlockPlan<A, K>> plans;
  for (int64_t task = begin; task < end; ++task) {
    plans.clear();
    plan_strip<I, true>(p, task, *strip,
                        [&](const BlockPlan<A, K>& plan, int) { plans.push_back(plan); });
    const T* image = static_cast<const T*>(p.input) + strip->n * p.input_stride[0];
    const T* grad =
        static_cast<const T*>(p.grad_output) + strip->n * p.grad_output_stride[0] + strip->first;
    *dots = {};
    for (int64_t c = 0; c < p.channels; ++c) {
      add_plane_dots(*strip, image + c * p.input_stride[1], grad + c * p.grad_output_stride[1],
                     *dots);
    }
    int at = 0;
    for (const BlockPlan<A, K>& plan : plans) {
      for (int i = 0; i < plan.count; ++i, ++at) {
        A dot[K * K];
        for (int t = 0; t < K * K; ++t) dot[t] = dots->at[t][at];
        store_grad_flow<T>(p, plan, i, dot);
      }
    }
  }
}

// ---- grad_input

struct RowRange {
  int first, last;  // rows of the image that an output row reads; empty where first > last
};

template <Interpolation I, typename A>
MAFNET_NOINLINE void find_row_ranges(const FlowWarpParams& p, int64_t begin, int64_t end,
                                     RowRange* ranges) {
  constexpr int K = kTapsPerAxis<I>;
  A position[kBlock];
  AxisBlock<A, K> block;
  for (int64_t r = begin; r < end; ++r) {
    RowRange range{p.height, -1};
    for (int x0 = 0; x0 < p.out_width; x0 += kBlock) {
      const int count = std::min(kBlock, p.out_width - x0);
      read_positions(p, r / p.out_height, static_cast<int>(r % p.out_height), x0, 1, count,
                     position);
      plan_axis<I>(position, count, p.height, p.padding, block);
      for (int k = 0; k < K; ++k) {
        for (int i = 0; i < count; ++i) {
          const int row = block.index[k][i];
          range.first = std::min(range.first, row < 0 ? p.height : row);
          range.last = std::max(range.last, row);
        }
      }
    }
    ranges[r] = range;
  }
}

// Accumulators of rows first .. last of grad_input of image n.
template <typename A>
struct Band {
  A* sum;
  int64_t channel_stride, row_stride, column_stride;
  int64_t n;
  int first, last;
};

template <typename T, typename A, int K>
MAFNET_INLINE void scatter_channels_last(const FlowWarpParams& p, const BlockPlan<A, K>& plan,
                                         const Band<A>& band) {
  const T* grad = grad_output_row<T>(p, plan.n, plan.y, plan.x0);
  for (int i = 0; i < plan.count; ++i) {
    const T* __restrict__ g = grad + i * p.grad_output_stride[3];
    for (int j = 0; j < K; ++j) {
      const int row = plan.y_axis.index[j][i];
      if (row < band.first || row > band.last) continue;
      for (int k = 0; k < K; ++k) {
        const int column = plan.x.index[k][i];
        const A w = plan.y_axis.weight[j][i] * plan.x.weight[k][i];
        if (column < 0 || w == 0) continue;
        A* __restrict__ sum =
            band.sum + (row - band.first) * band.row_stride + column * band.column_stride;
        for (int64_t c = 0; c < p.channels; ++c) sum[c] += w * static_cast<A>(g[c]);
      }
    }
  }
}

// Contributions to the planes of a band, gathered over several blocks: sum[offset] += weight *
// grad[pixel].
template <typename A>
struct Contributions {
  std::vector<int64_t> offset;
  std::vector<int64_t> pixel;
  std::vector<A> weight;

  template <int K>
  void append(const FlowWarpParams& p, const BlockPlan<A, K>& plan, const Band<A>& band) {
    for (int i = 0; i < plan.count; ++i) {
      for (int t = 0; t < K * K; ++t) {
        const int row = plan.y_axis.index[t / K][i], column = plan.x.index[t % K][i];
        const A w = plan.y_axis.weight[t / K][i] * plan.x.weight[t % K][i];
        if (row < band.first || row > band.last || column < 0 || w == 0) continue;
        offset.push_back((row - band.first) * band.row_stride + column * band.column_stride);
        pixel.push_back(static_cast<int64_t>(plan.y) * p.out_width + plan.x0 + i);
        weight.push_back(w);
      }
    }
  }

  template <typename T>
  void flush(const FlowWarpParams& p, const Band<A>& band) {
    const T* grad = static_cast<const T*>(p.grad_output) + band.n * p.grad_output_stride[0];
    for (int64_t c = 0; c < p.channels; ++c) {
      const T* plane = grad + c * p.grad_output_stride[1];
      A* sum = band.sum + c * band.channel_stride;
      for (size_t e = 0; e < offset.size(); ++e) {
        sum[offset[e]] += weight[e] * static_cast<A>(plane[pixel[e]]);
      }
    }
    offset.clear();
    pixel.clear();
    weight.clear();
  }
};

template <typename T, Interpolation I>
void scatter_into_band(const FlowWarpParams& p, const RowRange* ranges,
                       const Band<Accumulator<T>>& band) {
  using A = Accumulator<T>;
  constexpr int K = kTapsPerAxis<I>;
  BlockPlan<A, K> plan;
  Contributions<A> contributions;
  for (int y = 0; y < p.out_height; ++y) {
    const RowRange range = ranges[band.n * p.out_height + y];
    if (range.last < band.first || range.first > band.last) continue;
    for (int x0 = 0; x0 < p.out_width; x0 += kBlock) {
      plan_block<I>(p, band.n, y, x0, kBlock, plan);
      if (p.channels_last) {
        with_simd<T>([&]() MAFNET_INLINE_LAMBDA { scatter_channels_last<T>(p, plan, band); });
      } else {
        contributions.append(p, plan, band);
        if (contributions.offset.size() >= K * K * kStrip) contributions.template flush<T>(p, band);
      }
    }
  }
  contributions.template flush<T>(p, band);
}

// A band in grad_input itself where that holds accumulators, else in buffer; zeroed. The band is
// `runs` runs of `length` neighbours: one where channels are last, one per channel where they are
// planes.
template <typename T, Interpolation I>
void grad_input_band(const FlowWarpParams& p, const RowRange* ranges, int64_t task,
                     std::vector<Accumulator<T>>& buffer) {
  using A = Accumulator<T>;
  const int64_t bands = (p.height + kBandRows - 1) / kBandRows;
  const int64_t n = task / bands;
  const int first = static_cast<int>(task % bands) * kBandRows;
  const int last = std::min(first + kBandRows, p.height) - 1;
  const int64_t plane = static_cast<int64_t>(last - first + 1) * p.width;
  const int64_t runs = p.channels_last ? 1 : p.channels;
  const int64_t length = p.channels_last ? plane * p.channels : plane;
  T* target =
      static_cast<T*>(p.grad_input) + n * p.grad_input_stride[0] + first * p.grad_input_stride[2];
  const int64_t target_stride = p.grad_input_stride[1];

  Band<A> band{nullptr, target_stride, p.grad_input_stride[2], p.grad_input_stride[3], n,
               first,   last};
  if constexpr (std::is_same_v<T, A>) {
    band.sum = target;
    for (int64_t r = 0; r < runs; ++r) std::fill_n(target + r * target_stride, length, A(0));
  } else {
    buffer.assign(static_cast<size_t>(runs * length), A(0));
    band.sum = buffer.data();
    band.channel_stride = p.channels_last ? 1 : length;
  }
  scatter_into_band<T, I>(p, ranges, band);
  if constexpr (!std::is_same_v<T, A>) {
    with_simd<T>([&]() MAFNET_INLINE_LAMBDA {
      for (int64_t r = 0; r < runs; ++r) {
        for (int64_t e = 0; e < length; ++e) {
          target[r * target_stride + e] = static_cast<T>(buffer[r * length + e]);
        }
      }
    });
  }
}

// ---- launchers

template <typename Body>
void for_each_row(const FlowWarpParams& p, const Body& body) {
  const int64_t row_elements = std::max<int64_t>(1, p.out_width * p.channels);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / row_elements);
  torch::stable::parallel_for(0, p.batch * p.out_height, grain, body);
}

// Calls body(begin, end, index) over all strips; index has the type that offsets within a plane
// need.
template <typename Body>
void for_each_strip(const FlowWarpParams& p, const Body& body) {
  const bool small = has_small_planes(p);
  torch::stable::parallel_for(0, p.batch * strips_per_image(p), 1, [&](int64_t begin, int64_t end) {
    small ? body(begin, end, int{}) : body(begin, end, int64_t{});
  });
}

template <typename T, Interpolation I>
void forward(const FlowWarpParams& p, const T* zeros) {
  if (p.channels_last) {
    for_each_row(p, [&](int64_t begin, int64_t end) { forward_rows<T, I>(p, begin, end, zeros); });
  } else {
    for_each_strip(p, [&](int64_t begin, int64_t end, auto index) {
      forward_strips<T, I, decltype(index)>(p, begin, end);
    });
  }
}

template <typename T, Interpolation I>
void grad_flow(const FlowWarpParams& p, const T* zeros) {
  if constexpr (I == Interpolation::kNearest) {  // piecewise constant
    const int64_t elements = p.batch * p.out_height * p.out_width * 2;
    const size_t size = p.flow_dtype == p.dtype ? sizeof(T) : sizeof(float);
    std::memset(p.grad_flow, 0, static_cast<size_t>(elements) * size);
  } else if (p.channels_last) {
    for_each_row(p,
                 [&](int64_t begin, int64_t end) { grad_flow_rows<T, I>(p, begin, end, zeros); });
  } else {
    for_each_strip(p, [&](int64_t begin, int64_t end, auto index) {
      grad_flow_strips<T, I, decltype(index)>(p, begin, end);
    });
  }
}

template <typename T, Interpolation I>
void grad_input(const FlowWarpParams& p) {
  std::vector<RowRange> ranges(static_cast<size_t>(p.batch * p.out_height));
  for_each_row(p, [&](int64_t begin, int64_t end) {
    find_row_ranges<I, Accumulator<T>>(p, begin, end, ranges.data());
  });
  const int64_t tasks = p.batch * ((p.height + kBandRows - 1) / kBandRows);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Accumulator<T>> buffer;
    for (int64_t task = begin; task < end; ++task) {
      grad_input_band<T, I>(p, ranges.data(), task, buffer);
    }
  });
}

// Calls body(type, interpolation, zeros): zeros is a pixel of zeros, what taps outside the image
// read.
template <typename Body>
void dispatch(const FlowWarpParams& p, const Body& body) {
  dispatch_dtype<Half, BFloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const std::vector<T> zeros(p.channels_last ? static_cast<size_t>(p.channels) : 0, T(0.0f));
    dispatch_interpolation(p.interpolation,
                           [&](auto interpolation) { body(type, interpolation, zeros.data()); });
  });
}

}  // namespace

int launch_flow_warp_forward(const FlowWarpParams& p, void*) {
  dispatch(p, [&](auto type, auto interpolation, auto* zeros) {
    forward<typename decltype(type)::type, decltype(interpolation)::value>(p, zeros);
  });
  return 0;
}

int launch_flow_warp_backward(const FlowWarpParams& p, void*) {
  dispatch(p, [&](auto type, auto interpolation, auto* zeros) {
    using T = typename decltype(type)::type;
    constexpr Interpolation kInterpolation = decltype(interpolation)::value;
    if (p.grad_flow != nullptr) grad_flow<T, kInterpolation>(p, zeros);
    if (p.grad_input != nullptr) grad_input<T, kInterpolation>(p);
  });
  return 0;
}

}  // namespace mafnet
