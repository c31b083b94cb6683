// modulated_deform_conv2d on the CPU: y(p) = bias + sum_k W_k * (mask_k(p) * x(p * stride - padding
// + k * dilation
// + offset_k(p))), sampled bilinearly, zero outside.
//
// Output pixels go in blocks of one image. Of a block the samples of all taps are written side by
// side, columns[pixel][tap][channel], small enough for the L2 cache; a blocked matrix product with
// the packed weight follows. No column buffer of the image ever exists. Forward: one task per
// block. Backward: one task per image, so that grad_input needs no atomics; grad_weight is summed
// over the images in their order. Both are deterministic.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/simd.h"
#include "modulated_deform_conv2d/params.h"

namespace mafnet {
namespace {

// 64 pixels x 9 taps x 32 channels of columns are 74 kB: in L2 beside as much of gradient columns.
constexpr int kBlock = 64;
constexpr int kLanes = 16;  // floats of one vector: a zmm register, two ymm, four xmm
constexpr int kTileRows =
    6;  // 6 x 2 accumulators, two of B and a broadcast: within 16 AVX-512 registers
constexpr int kTileVectors = 2;

// Offset groups of 8 channels are the usual case, so channels go by eight; what is left goes one by
// one.
constexpr int kChannelLanes = 8;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Vector8 __attribute__((vector_size(kChannelLanes * sizeof(float))));

template <typename V>
MAFNET_INLINE V load_as(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
MAFNET_INLINE Vector load(const float* p) { return load_as<Vector>(p); }
template <typename V>
MAFNET_INLINE void store(float* p, const V& v) {
  std::memcpy(p, &v, sizeof(v));
}
MAFNET_INLINE float sum_of(const Vector8& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

inline int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// ------------------------------------------------------------------------------------ matrix
// product

// One tile of C (+)= A B: R rows, V vectors of columns. A(m, k) lies at a[m * a_row + k * a_depth].
template <int R, int V>
MAFNET_INLINE void multiply_tile(const float* a, int64_t a_row, int64_t a_depth, const float* b,
                                 int64_t b_row, int depth, float* c, int64_t c_row, bool add) {
  Vector sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load(c + r * c_row + v * kLanes) : Vector{};
  }
  for (int k = 0; k < depth; ++k) {
    Vector right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) right[v] = load(b + k * b_row + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector left = Vector{} + a[r * a_row + k * a_depth];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + r * c_row + v * kLanes, sum[r][v]);
  }
}

// C (rows x columns) (+)= A (rows x depth) B (depth x columns); columns is a multiple of kLanes.
MAFNET_INLINE void multiply(const float* a, int64_t a_row, int64_t a_depth, const float* b,
                            int64_t b_row, int rows, int depth, int columns, float* c,
                            int64_t c_row, bool add) {
  for (int n = 0; n < columns; n += kTileVectors * kLanes) {
    const bool wide = n + kTileVectors * kLanes <= columns;
    int m = 0;
    for (; m + kTileRows <= rows; m += kTileRows) {
      const float* left = a + m * a_row;
      float* out = c + m * c_row + n;
      if (wide) {
        multiply_tile<kTileRows, kTileVectors>(left, a_row, a_depth, b + n, b_row, depth, out,
                                               c_row, add);
      } else {
        multiply_tile<kTileRows, 1>(left, a_row, a_depth, b + n, b_row, depth, out, c_row, add);
      }
    }
    for (; m < rows; ++m) {
      const float* left = a + m * a_row;
      float* out = c + m * c_row + n;
      if (wide) {
        multiply_tile<1, kTileVectors>(left, a_row, a_depth, b + n, b_row, depth, out, c_row, add);
      } else {
        multiply_tile<1, 1>(left, a_row, a_depth, b + n, b_row, depth, out, c_row, add);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------
// sampling

// A block of output pixels of one image and one group of the convolution.
struct Block {
  int64_t n, first;
  int count;
  int group;
};

// One axis of the samples of one tap over a block: two neighbouring rows (or columns) of the image,
// brought into range, with weights and slopes that are zero where the neighbour lies outside. NaN
// keeps NaN weights.
struct Axis {
  int index[2][kBlock];
  float weight[2][kBlock];
  float slope[2][kBlock];  // d weight / d coordinate: that of the cell [n, n + 1)
};

// The samples of one tap over a block.
struct Plan {
  Axis y, x;
  float base_y[kBlock], base_x[kBlock];
};

MAFNET_INLINE void plan_axis(const float* position, int count, int size, Axis& axis) {
  // Branch-free, so that it becomes vector code: selects, and unsigned comparisons for 0 <= index <
  // size.
  const float end = static_cast<float>(size);
  const unsigned extent = static_cast<unsigned>(size);
  for (int i = 0; i < count; ++i) {
    float p = position[i];
    p = p < -2.f ? -2.f : p;
    p = p > end ? end : p;
    const float base = std::floor(p), t = p - base;
    const float known = base == base ? base : 0.f;  // NaN stays in t alone
    const float nan = t == t ? 0.f : t;
    const int low = static_cast<int>(known), high = low + 1;
    const float low_inside = static_cast<unsigned>(low) < extent ? 1.f : 0.f;
    const float high_inside = static_cast<unsigned>(high) < extent ? 1.f : 0.f;
    axis.index[0][i] = std::min(std::max(low, 0), size - 1);
    axis.index[1][i] = std::min(std::max(high, 0), size - 1);
    axis.weight[0][i] = low_inside * (1 - t);
    axis.weight[1][i] = high_inside * t;
    axis.slope[0][i] = nan - low_inside;
    axis.slope[1][i] = nan + high_inside;
  }
}

// Where the pixels of a block begin in the input, without tap and offset.
MAFNET_INLINE void plan_block(const ModulatedDeformConv2dParams& p, const Block& b, Plan& plan) {
  int row = static_cast<int>(b.first / p.out_width),
      column = static_cast<int>(b.first % p.out_width);
  for (int i = 0; i < b.count; ++i) {
    plan.base_y[i] = static_cast<float>(row * p.stride_h - p.padding_h);
    plan.base_x[i] = static_cast<float>(column * p.stride_w - p.padding_w);
    if (++column == p.out_width) {
      column = 0;
      ++row;
    }
  }
}

MAFNET_INLINE void plan_tap(const ModulatedDeformConv2dParams& p, const Block& b, int k,
                            int64_t plane, Plan& plan) {
  const float* dy = p.offset + 2 * plane * p.pixels() + b.first;
  const float* dx = dy + p.pixels();
  const float tap_y = static_cast<float>(k / p.kernel_w * p.dilation_h);
  const float tap_x = static_cast<float>(k % p.kernel_w * p.dilation_w);
  float y[kBlock], x[kBlock];
  for (int i = 0; i < b.count; ++i) {
    y[i] = plan.base_y[i] + tap_y + dy[i];
    x[i] = plan.base_x[i] + tap_x + dx[i];
  }
  plan_axis(y, b.count, p.height, plan.y);
  plan_axis(x, b.count, p.width, plan.x);
}

// The four corners of pixel i: offsets into the image in floats.
struct Corners {
  int64_t at[4];  // (y0, x0) (y0, x1) (y1, x0) (y1, x1)
};

MAFNET_INLINE Corners corners_of(const ModulatedDeformConv2dParams& p, const Plan& plan, int i) {
  const int64_t row0 = int64_t{plan.y.index[0][i]} * p.width,
                row1 = int64_t{plan.y.index[1][i]} * p.width;
  const int x0 = plan.x.index[0][i], x1 = plan.x.index[1][i];
  return {{(row0 + x0) * p.channels, (row0 + x1) * p.channels, (row1 + x0) * p.channels,
           (row1 + x1) * p.channels}};
}

// Calls body(tap, offset group, plane of the offset group and tap, first channel, channels) for
// every tap and offset group that the block's group needs, with the plan of that tap made.
template <typename Body>
MAFNET_INLINE void for_each_tap(const ModulatedDeformConv2dParams& p, const Block& b, Plan& plan,
                                const Body& body) {
  const int group_channels = p.channels / p.groups, offset_channels = p.channels / p.offset_groups;
  const int begin = b.group * group_channels, end = begin + group_channels;
  plan_block(p, b, plan);
  for (int g = begin / offset_channels; g * offset_channels < end; ++g) {
    const int low = std::max(begin, g * offset_channels);
    const int high = std::min(end, (g + 1) * offset_channels);
    for (int k = 0; k < p.taps(); ++k) {
      const int64_t plane = (b.n * p.offset_groups + g) * p.taps() + k;
      plan_tap(p, b, k, plane, plan);
      body(k, g, plane, low, high - low);
    }
  }
}

// columns[pixel][tap][channel of the group], masked.
MAFNET_INLINE void fill_columns(const ModulatedDeformConv2dParams& p, const Block& b, Plan& plan,
                                float* columns, int64_t row) {
  const int group_channels = p.channels / p.groups, begin = b.group * group_channels;
  const float* image = p.input + b.n * p.height * p.width * p.channels;
  for_each_tap(
      p, b, plan, [&](int k, int, int64_t plane, int low, int channels) MAFNET_INLINE_LAMBDA {
        const float* mask = p.mask == nullptr ? nullptr : p.mask + plane * p.pixels() + b.first;
        for (int i = 0; i < b.count; ++i) {
          const float m = mask == nullptr ? 1.f : mask[i];
          const float y0 = m * plan.y.weight[0][i], y1 = m * plan.y.weight[1][i];
          const float x0 = plan.x.weight[0][i], x1 = plan.x.weight[1][i];
          const float w00 = y0 * x0, w01 = y0 * x1, w10 = y1 * x0, w11 = y1 * x1;
          const Corners corners = corners_of(p, plan, i);
          const float *c00 = image + corners.at[0] + low, *c01 = image + corners.at[1] + low;
          const float *c10 = image + corners.at[2] + low, *c11 = image + corners.at[3] + low;
          float* out = columns + i * row + k * group_channels + (low - begin);
          int c = 0;
          for (; c + kChannelLanes <= channels; c += kChannelLanes) {
            store(out + c, w00 * load_as<Vector8>(c00 + c) + w01 * load_as<Vector8>(c01 + c) +
                               w10 * load_as<Vector8>(c10 + c) + w11 * load_as<Vector8>(c11 + c));
          }
          for (; c < channels; ++c)
            out[c] = w00 * c00[c] + w01 * c01[c] + w10 * c10[c] + w11 * c11[c];
        }
      });
}

// -------------------------------------------------------------------------------------------
// forward

// (group, tap, channel) x out channel of the group, the out channels padded with zeros.
std::vector<float> pack_weight(const ModulatedDeformConv2dParams& p) {
  const int taps = p.taps(), in = p.channels / p.groups, out = p.out_channels / p.groups;
  std::vector<float> packed(static_cast<size_t>(p.groups) * taps * in * padded(out), 0.f);
  for (int o = 0; o < p.out_channels; ++o) {
    for (int c = 0; c < in; ++c) {
      for (int k = 0; k < taps; ++k) {
        const int64_t row = (int64_t{o / out} * taps + k) * in + c;
        packed[row * padded(out) + o % out] = p.weight[(int64_t{o} * in + c) * taps + k];
      }
    }
  }
  return packed;
}

int64_t blocks_of(const ModulatedDeformConv2dParams& p) {
  return (p.pixels() + kBlock - 1) / kBlock;
}

Block block_of(const ModulatedDeformConv2dParams& p, int64_t n, int64_t index, int group) {
  const int64_t first = index * kBlock;
  return {n, first, static_cast<int>(std::min<int64_t>(kBlock, p.pixels() - first)), group};
}

void forward_block(const ModulatedDeformConv2dParams& p, const Block& b, const float* packed,
                   const float* zeros, float* columns, float* result) {
  const int out = p.out_channels / p.groups, depth = p.taps() * (p.channels / p.groups);
  with_simd([&]() MAFNET_INLINE_LAMBDA {
    Plan plan;
    fill_columns(p, b, plan, columns, depth);
    multiply(columns, depth, 1, packed + int64_t{b.group} * depth * padded(out), padded(out),
             b.count, depth, padded(out), result, padded(out), false);
    const float* bias = p.bias == nullptr ? zeros : p.bias + b.group * out;
    for (int i = 0; i < b.count; ++i) {
      float* y = p.output + (b.n * p.pixels() + b.first + i) * p.out_channels + b.group * out;
      for (int o = 0; o < out; ++o) y[o] = result[i * padded(out) + o] + bias[o];
    }
  });
}

// ------------------------------------------------------------------------------------------
// backward

MAFNET_INLINE float dot(const float* a, const float* b, int channels) {
  Vector8 partial{};
  int c = 0;
  for (; c + kChannelLanes <= channels; c += kChannelLanes)
    partial += load_as<Vector8>(a + c) * load_as<Vector8>(b + c);
  float sum = sum_of(partial);
  for (; c < channels; ++c) sum += a[c] * b[c];
  return sum;
}

MAFNET_INLINE void add_scaled(const float* a, float scale, int channels, float* out) {
  int c = 0;
  for (; c + kChannelLanes <= channels; c += kChannelLanes) {
    store(out + c, load_as<Vector8>(out + c) + scale * load_as<Vector8>(a + c));
  }
  for (; c < channels; ++c) out[c] += scale * a[c];
}

// Gradients of one block from those of its columns: offset and mask are written, input is added to.
MAFNET_INLINE void scatter_columns(const ModulatedDeformConv2dParams& p, const Block& b, Plan& plan,
                                   const float* grad_columns, int64_t row) {
  const int group_channels = p.channels / p.groups, begin = b.group * group_channels;
  const int64_t first_pixel = b.n * p.height * p.width * p.channels;
  const float* image = p.input + first_pixel;
  float* grad_image = p.grad_input + first_pixel;
  for_each_tap(
      p, b, plan, [&](int k, int g, int64_t plane, int low, int channels) MAFNET_INLINE_LAMBDA {
        const int64_t at = plane * p.pixels() + b.first;
        const float* mask = p.mask == nullptr ? nullptr : p.mask + at;
        float* grad_mask = p.grad_mask == nullptr ? nullptr : p.grad_mask + at;
        float* grad_dy = p.grad_offset + 2 * plane * p.pixels() + b.first;
        float* grad_dx = grad_dy + p.pixels();
        // An offset group that straddles convolution groups gets a part from each; the first one
        // writes.
        const bool first = low == g * (p.channels / p.offset_groups);
        for (int i = 0; i < b.count; ++i) {
          const float m = mask == nullptr ? 1.f : mask[i];
          const float *wy[2] = {plan.y.weight[0], plan.y.weight[1]},
                      *wx[2] = {plan.x.weight[0], plan.x.weight[1]};
          const float* grad = grad_columns + i * row + k * group_channels + (low - begin);
          const Corners corners = corners_of(p, plan, i);
          float by_row[2], by_row_slope[2];  // the corners of a row, blended by the weights and by
                                             // the slopes in x
          for (int j = 0; j < 2; ++j) {
            const float left = dot(grad, image + corners.at[2 * j] + low, channels);
            const float right = dot(grad, image + corners.at[2 * j + 1] + low, channels);
            by_row[j] = wx[0][i] * left + wx[1][i] * right;
            by_row_slope[j] = plan.x.slope[0][i] * left + plan.x.slope[1][i] * right;
          }
          const float to_y = m * (plan.y.slope[0][i] * by_row[0] + plan.y.slope[1][i] * by_row[1]);
          const float to_x = m * (wy[0][i] * by_row_slope[0] + wy[1][i] * by_row_slope[1]);
          const float to_mask = wy[0][i] * by_row[0] + wy[1][i] * by_row[1];
          grad_dy[i] = to_y + (first ? 0.f : grad_dy[i]);
          grad_dx[i] = to_x + (first ? 0.f : grad_dx[i]);
          if (grad_mask != nullptr) grad_mask[i] = to_mask + (first ? 0.f : grad_mask[i]);
          for (int j = 0; j < 4; ++j) {
            const float weight = m * wy[j >> 1][i] * wx[j & 1][i];
            // Zero outside the image; NaN sends nothing.
            if (weight > 0 || weight < 0)
              add_scaled(grad, weight, channels, grad_image + corners.at[j] + low);
          }
        }
      });
}

// Buffers of one task of the backward.
struct Scratch {
  std::vector<float> columns, grad_columns, grad_output;
};

void backward_block(const ModulatedDeformConv2dParams& p, const Block& b, const float* weight_rows,
                    float* grad_packed, Scratch& scratch) {
  const int out = p.out_channels / p.groups, depth = p.taps() * (p.channels / p.groups);
  float* columns = scratch.columns.data();
  float* grad_columns = scratch.grad_columns.data();
  float* grad = scratch.grad_output.data();
  with_simd([&]() MAFNET_INLINE_LAMBDA {
    for (int i = 0; i < b.count; ++i) {
      const float* g =
          p.grad_output + (b.n * p.pixels() + b.first + i) * p.out_channels + b.group * out;
      std::copy(g, g + out, grad + i * padded(out));
      std::fill(grad + i * padded(out) + out, grad + (i + 1) * padded(out), 0.f);
    }
    Plan plan;
    fill_columns(p, b, plan, columns, depth);
    multiply(columns, 1, depth, grad, padded(out), depth, b.count, padded(out),
             grad_packed + int64_t{b.group} * depth * padded(out), padded(out), true);
    multiply(grad, padded(out), 1, weight_rows + int64_t{b.group} * out * padded(depth),
             padded(depth), b.count, out, padded(depth), grad_columns, padded(depth), false);
    scatter_columns(p, b, plan, grad_columns, padded(depth));
  });
}

// (group, out channel) x (tap, channel), the rows padded with zeros.
std::vector<float> transpose_weight(const ModulatedDeformConv2dParams& p) {
  const int taps = p.taps(), in = p.channels / p.groups, depth = padded(taps * in);
  std::vector<float> rows(static_cast<size_t>(p.out_channels) * depth, 0.f);
  for (int64_t o = 0; o < p.out_channels; ++o) {
    for (int c = 0; c < in; ++c) {
      for (int k = 0; k < taps; ++k)
        rows[o * depth + k * in + c] = p.weight[(o * in + c) * taps + k];
    }
  }
  return rows;
}

// The layout of pack_weight back to that of weight, summed over the images in their order.
void unpack_grad_weight(const ModulatedDeformConv2dParams& p, const std::vector<float>& packed,
                        size_t size) {
  const int taps = p.taps(), in = p.channels / p.groups, out = p.out_channels / p.groups;
  for (int o = 0; o < p.out_channels; ++o) {
    for (int c = 0; c < in; ++c) {
      for (int k = 0; k < taps; ++k) {
        const int64_t index = ((int64_t{o / out} * taps + k) * in + c) * padded(out) + o % out;
        float sum = 0;
        for (int64_t n = 0; n < p.batch; ++n) sum += packed[n * size + index];
        p.grad_weight[(int64_t{o} * in + c) * taps + k] = sum;
      }
    }
  }
}

}  // namespace

int launch_modulated_deform_conv2d_forward(const ModulatedDeformConv2dParams& p, void*) {
  const int64_t blocks = blocks_of(p);
  if (p.batch * blocks == 0) return 0;
  const std::vector<float> packed = pack_weight(p);
  const std::vector<float> zeros(static_cast<size_t>(p.out_channels),
                                 0.f);  // where there is no bias
  torch::stable::parallel_for(0, p.batch * blocks, 4, [&](int64_t begin, int64_t end) {
    const int out = padded(p.out_channels / p.groups);
    std::vector<float> columns(static_cast<size_t>(kBlock) * p.taps() * (p.channels / p.groups));
    std::vector<float> result(static_cast<size_t>(kBlock) * out);
    for (int64_t task = begin; task < end; ++task) {
      for (int group = 0; group < p.groups; ++group) {
        const Block b = block_of(p, task / blocks, task % blocks, group);
        forward_block(p, b, packed.data(), zeros.data(), columns.data(), result.data());
      }
    }
  });
  return 0;
}

int launch_modulated_deform_conv2d_backward(const ModulatedDeformConv2dParams& p, void*) {
  const int64_t blocks = blocks_of(p), image = int64_t{p.height} * p.width * p.channels;
  const int out = padded(p.out_channels / p.groups), depth = p.taps() * (p.channels / p.groups);
  const size_t packed_size = static_cast<size_t>(p.groups) * depth * out;
  const std::vector<float> weight_rows = transpose_weight(p);
  std::vector<float> grad_packed(packed_size * p.batch, 0.f);
  torch::stable::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    scratch.columns.resize(static_cast<size_t>(kBlock) * depth);
    scratch.grad_columns.resize(static_cast<size_t>(kBlock) * padded(depth));
    scratch.grad_output.resize(static_cast<size_t>(kBlock) * out);
    for (int64_t n = begin; n < end; ++n) {
      std::fill_n(p.grad_input + n * image, image, 0.f);
      for (int64_t index = 0; index < blocks; ++index) {
        for (int group = 0; group < p.groups; ++group) {
          backward_block(p, block_of(p, n, index, group), weight_rows.data(),
                         grad_packed.data() + n * packed_size, scratch);
        }
      }
    }
  });
  unpack_grad_weight(p, grad_packed, packed_size);
  return 0;
}

}  // namespace mafnet
