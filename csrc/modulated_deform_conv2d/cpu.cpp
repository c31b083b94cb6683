// modulated_deform_conv2d on the CPU: y(p) = bias + sum_k W_k * (mask_k(p) * x(p * stride - padding + k * dilation
// + offset_k(p))), sampled bilinearly, zero outside.
//
// Output pixels go in blocks of one image. Of a block the samples of all taps are written side by side,
// columns[pixel][tap][channel], small enough for the L2 cache; a blocked matrix product with the packed weight follows.
// No column buffer of the image ever exists. Forward: one task per block. Backward: one task per image, so that
// grad_input needs no atomics; grad_weight is summed over the images in their order. Both are deterministic.
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
constexpr int kLanes = 16;     // floats of one vector: a zmm register, two ymm, four xmm
constexpr int kTileRows = 6;   // 6 x 2 accumulators, two of B and a broadcast: within 16 AVX-512 registers
constexpr int kTileVectors = 2;

// Offset groups of 8 channels are the usual case, so channels go by eight; what is left goes one by one.
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

// ------------------------------------------------------------------------------------ matrix product

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
MAFNET_INLINE void multiply(const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_row,
                            int rows, int depth, int columns, float* c, int64_t c_row, bool add) {
  for (int n = 0; n < columns; n += kTileVectors * kLanes) {
    const bool wide = n + kTileVectors * kLanes <= columns;
    int m = 0;
    for (; m + kTileRows <= rows; m += kTileRows) {
      const float* left = a + m * a_row;
      float* out = c + m * c_row + n;
      if (wide) {
        multiply_tile<kTileRows, kTileVectors>(left, a_row, a_depth, b + n, b_row, depth, out, c_row, add);
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

// ------------------------------------------------------------------------------------------ sampling

// The four corners of one sample: their channels (a row of zeros outside the image) and the fractions.
struct Sample {
  const float* corner[4];  // (y0, x0) (y0, x1) (y1, x0) (y1, x1)
  int64_t pixel[4];        // index into the image, or -1 outside
  float fy, fx;
};

// Where a coordinate falls; in the cells before -1 and after size nothing is read. NaN keeps a NaN fraction and
// reads nothing.
MAFNET_INLINE int cell(float position, int size, float& fraction) {
  const float end = static_cast<float>(size);
  position = position < -1.f ? -2.f : (position > end ? end : position);
  const float base = std::floor(position);
  fraction = position - base;
  return position == position ? static_cast<int>(base) : -2;
}

MAFNET_INLINE Sample locate(const ModulatedDeformConv2dParams& p, const float* image, float y, float x,
                            const float* zeros) {
  Sample s;
  const int y0 = cell(y, p.height, s.fy), x0 = cell(x, p.width, s.fx);
  for (int i = 0; i < 4; ++i) {
    const int yi = y0 + (i >> 1), xi = x0 + (i & 1);
    const bool inside = yi >= 0 && yi < p.height && xi >= 0 && xi < p.width;
    s.pixel[i] = inside ? int64_t{yi} * p.width + xi : -1;
    s.corner[i] = inside ? image + s.pixel[i] * p.channels : zeros;
  }
  return s;
}

// A block of output pixels of one image and one group of the convolution.
struct Block {
  int64_t n, first;
  int count;
  int group;
};

// Calls body(pixel in block, tap, offset group, first channel, channels, sample, mask value) for every sample that
// the block's group needs: the part of each offset group that lies in the convolution group.
template <typename Body>
MAFNET_INLINE void for_each_sample(const ModulatedDeformConv2dParams& p, const Block& b, const float* zeros,
                                   const Body& body) {
  const int taps = p.taps(), group_channels = p.channels / p.groups;
  const int offset_channels = p.channels / p.offset_groups;
  const int begin = b.group * group_channels, end = begin + group_channels;
  const float* image = p.input + b.n * p.height * p.width * p.channels;
  for (int g = begin / offset_channels; g * offset_channels < end; ++g) {
    const int low = std::max(begin, g * offset_channels);
    const int high = std::min(end, (g + 1) * offset_channels);
    for (int k = 0; k < taps; ++k) {
      const int64_t plane = (b.n * p.offset_groups + g) * taps + k;
      const float* dy = p.offset + 2 * plane * p.pixels() + b.first;
      const float* dx = dy + p.pixels();
      const float* mask = p.mask == nullptr ? nullptr : p.mask + plane * p.pixels() + b.first;
      const float tap_y = static_cast<float>(k / p.kernel_w * p.dilation_h - p.padding_h);
      const float tap_x = static_cast<float>(k % p.kernel_w * p.dilation_w - p.padding_w);
      int row = static_cast<int>(b.first / p.out_width), column = static_cast<int>(b.first % p.out_width);
      for (int i = 0; i < b.count; ++i) {
        const float y = static_cast<float>(row * p.stride_h) + tap_y + dy[i];
        const float x = static_cast<float>(column * p.stride_w) + tap_x + dx[i];
        const Sample s = locate(p, image, y, x, zeros);
        body(i, k, g, low, high - low, s, mask == nullptr ? 1.f : mask[i]);
        if (++column == p.out_width) {
          column = 0;
          ++row;
        }
      }
    }
  }
}

// columns[pixel][tap][channel of the group], masked.
MAFNET_INLINE void fill_columns(const ModulatedDeformConv2dParams& p, const Block& b, const float* zeros,
                                float* columns, int64_t row) {
  const int group_channels = p.channels / p.groups, begin = b.group * group_channels;
  for_each_sample(p, b, zeros, [&](int i, int k, int, int low, int channels, const Sample& s, float m)
                  MAFNET_INLINE_LAMBDA {
    float* out = columns + i * row + k * group_channels + (low - begin);
    const float w00 = m * (1 - s.fy) * (1 - s.fx), w01 = m * (1 - s.fy) * s.fx;
    const float w10 = m * s.fy * (1 - s.fx), w11 = m * s.fy * s.fx;
    const float *x00 = s.corner[0] + low, *x01 = s.corner[1] + low, *x10 = s.corner[2] + low, *x11 = s.corner[3] + low;
    int c = 0;
    for (; c + kChannelLanes <= channels; c += kChannelLanes) {
      store(out + c, w00 * load_as<Vector8>(x00 + c) + w01 * load_as<Vector8>(x01 + c) +
                         w10 * load_as<Vector8>(x10 + c) + w11 * load_as<Vector8>(x11 + c));
    }
    for (; c < channels; ++c) out[c] = w00 * x00[c] + w01 * x01[c] + w10 * x10[c] + w11 * x11[c];
  });
}

// ------------------------------------------------------------------------------------------- forward

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

int64_t blocks_of(const ModulatedDeformConv2dParams& p) { return (p.pixels() + kBlock - 1) / kBlock; }

Block block_of(const ModulatedDeformConv2dParams& p, int64_t n, int64_t index, int group) {
  const int64_t first = index * kBlock;
  return {n, first, static_cast<int>(std::min<int64_t>(kBlock, p.pixels() - first)), group};
}

void forward_block(const ModulatedDeformConv2dParams& p, const Block& b, const float* packed, const float* zeros,
                   float* columns, float* result) {
  const int out = p.out_channels / p.groups, depth = p.taps() * (p.channels / p.groups);
  with_simd([&]() MAFNET_INLINE_LAMBDA {
    fill_columns(p, b, zeros, columns, depth);
    multiply(columns, depth, 1, packed + int64_t{b.group} * depth * padded(out), padded(out), b.count, depth,
             padded(out), result, padded(out), false);
    const float* bias = p.bias == nullptr ? zeros : p.bias + b.group * out;
    for (int i = 0; i < b.count; ++i) {
      float* y = p.output + (b.n * p.pixels() + b.first + i) * p.out_channels + b.group * out;
      for (int o = 0; o < out; ++o) y[o] = result[i * padded(out) + o] + bias[o];
    }
  });
}

// ------------------------------------------------------------------------------------------ backward

// Gradients of one block from those of its columns: offset and mask are written, input is added to.
MAFNET_INLINE void scatter_columns(const ModulatedDeformConv2dParams& p, const Block& b, const float* zeros,
                                   const float* grad_columns, int64_t row) {
  const int taps = p.taps(), group_channels = p.channels / p.groups, begin = b.group * group_channels;
  float* grad_image = p.grad_input + b.n * p.height * p.width * p.channels;
  for_each_sample(p, b, zeros, [&](int i, int k, int g, int low, int channels, const Sample& s, float m)
                  MAFNET_INLINE_LAMBDA {
    const float* grad = grad_columns + i * row + k * group_channels + (low - begin);
    float dot[4];
    for (int j = 0; j < 4; ++j) {
      const float* x = s.corner[j] + low;
      Vector8 partial{};
      int c = 0;
      for (; c + kChannelLanes <= channels; c += kChannelLanes) {
        partial += load_as<Vector8>(grad + c) * load_as<Vector8>(x + c);
      }
      dot[j] = sum_of(partial);
      for (; c < channels; ++c) dot[j] += grad[c] * x[c];
    }
    const float gy = 1 - s.fy, gx = 1 - s.fx;
    const int64_t plane = (b.n * p.offset_groups + g) * taps + k;
    // An offset group that straddles convolution groups gets a part from each; the first one writes.
    const bool first = low == g * (p.channels / p.offset_groups);
    float* grad_dy = p.grad_offset + 2 * plane * p.pixels() + b.first + i;
    float* grad_dx = grad_dy + p.pixels();
    const float to_y = m * (gx * (dot[2] - dot[0]) + s.fx * (dot[3] - dot[1]));
    const float to_x = m * (gy * (dot[1] - dot[0]) + s.fy * (dot[3] - dot[2]));
    *grad_dy = to_y + (first ? 0.f : *grad_dy);
    *grad_dx = to_x + (first ? 0.f : *grad_dx);
    if (p.grad_mask != nullptr) {
      float* grad_mask = p.grad_mask + plane * p.pixels() + b.first + i;
      const float to_mask = gy * (gx * dot[0] + s.fx * dot[1]) + s.fy * (gx * dot[2] + s.fx * dot[3]);
      *grad_mask = to_mask + (first ? 0.f : *grad_mask);
    }
    const float weight[4] = {m * gy * gx, m * gy * s.fx, m * s.fy * gx, m * s.fy * s.fx};
    for (int j = 0; j < 4; ++j) {
      if (s.pixel[j] < 0) continue;
      float* out = grad_image + s.pixel[j] * p.channels + low;
      int c = 0;
      for (; c + kChannelLanes <= channels; c += kChannelLanes) {
        store(out + c, load_as<Vector8>(out + c) + weight[j] * load_as<Vector8>(grad + c));
      }
      for (; c < channels; ++c) out[c] += weight[j] * grad[c];
    }
  });
}

// Buffers of one task of the backward.
struct Scratch {
  std::vector<float> columns, grad_columns, grad_output;
};

void backward_block(const ModulatedDeformConv2dParams& p, const Block& b, const float* weight_rows,
                    const float* zeros, float* grad_packed, Scratch& scratch) {
  const int out = p.out_channels / p.groups, depth = p.taps() * (p.channels / p.groups);
  float* columns = scratch.columns.data();
  float* grad_columns = scratch.grad_columns.data();
  float* grad = scratch.grad_output.data();
  with_simd([&]() MAFNET_INLINE_LAMBDA {
    for (int i = 0; i < b.count; ++i) {
      const float* g = p.grad_output + (b.n * p.pixels() + b.first + i) * p.out_channels + b.group * out;
      std::copy(g, g + out, grad + i * padded(out));
      std::fill(grad + i * padded(out) + out, grad + (i + 1) * padded(out), 0.f);
    }
    fill_columns(p, b, zeros, columns, depth);
    multiply(columns, 1, depth, grad, padded(out), depth, b.count, padded(out),
             grad_packed + int64_t{b.group} * depth * padded(out), padded(out), true);
    multiply(grad, padded(out), 1, weight_rows + int64_t{b.group} * out * padded(depth), padded(depth), b.count,
             out, padded(depth), grad_columns, padded(depth), false);
    scatter_columns(p, b, zeros, grad_columns, padded(depth));
  });
}

// (group, out channel) x (tap, channel), the rows padded with zeros.
std::vector<float> transpose_weight(const ModulatedDeformConv2dParams& p) {
  const int taps = p.taps(), in = p.channels / p.groups, depth = padded(taps * in);
  std::vector<float> rows(static_cast<size_t>(p.out_channels) * depth, 0.f);
  for (int64_t o = 0; o < p.out_channels; ++o) {
    for (int c = 0; c < in; ++c) {
      for (int k = 0; k < taps; ++k) rows[o * depth + k * in + c] = p.weight[(o * in + c) * taps + k];
    }
  }
  return rows;
}

// The layout of pack_weight back to that of weight, summed over the images in their order.
void unpack_grad_weight(const ModulatedDeformConv2dParams& p, const std::vector<float>& packed, size_t size) {
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
  const std::vector<float> zeros(static_cast<size_t>(std::max(p.channels, p.out_channels)), 0.f);
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
  const std::vector<float> zeros(static_cast<size_t>(p.channels), 0.f);
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
          backward_block(p, block_of(p, n, index, group), weight_rows.data(), zeros.data(),
                         grad_packed.data() + n * packed_size, scratch);
        }
      }
    }
  });
  unpack_grad_weight(p, grad_packed, packed_size);
  return 0;
}

}  // namespace mafnet
