// spatial_gate forward in channels_last by vectors of 64 bytes: gate and sum of a block are made
// between the products of the next one. A core has room for both: products wait for
// multiplications, and most of the rest is none.
#include "common/gemm_bf16_tiles.h"
#include "common/gemm_tiles.h"
#include "pyramid_spatial_attention/gate_blocks.h"

namespace mafnet {

#if defined(MAFNET_HAS_BF16)

namespace {

constexpr int kLanes = 16;
using Vector = VectorOf<float, kLanes>;

// What is left to do with a block whose products are there; T is float or BFloat16.
template <typename T>
struct Finish {
  static constexpr int kVectors = 4 / sizeof(T), kChannels = kVectors * kLanes;

  const float *features = nullptr, *bias = nullptr;
  Row<T> mask{nullptr, 0}, input{nullptr, 0};
  T* out = nullptr;
  int64_t out_stride = 0;
  int pixels = 0, channels = 0, c = 0, wait = 0;
  float scale = 0, slope = 0;
  bool from_feature = false, around = false;

  // The next channels; false where there are none.
  MAFNET_INLINE bool take() {
    if (pixels == 0) return false;
    // The line that the product after the next wants first, and the one that comes here next.
    __builtin_prefetch(mask.data + c + 2 * kBlock * mask.stride, 0, 2);
    __builtin_prefetch(input.data + c + kBlock * input.stride, 0, 2);
    Vector from[kVectors], in[kVectors], sums[kVectors];
    load_vectors(mask.data + c, from);
    load_vectors(input.data + c, in);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const int at = c + v * kLanes;
      const Vector feature =
          leaky_relu(load<Vector>(features + at) + load<Vector>(bias + at), slope);
      const Vector gate = sigmoid_for<T>(from_feature ? feature : from[v], scale);
      sums[v] = in[v] * gate + feature;
    }
    if (around) {
      store_vectors<StoreAround>(out + c, sums);
    } else {
      store_vectors(out + c, sums);
    }
    c += kChannels;
    if (c == channels) next_pixel();
    return true;
  }
  MAFNET_INLINE void next_pixel() {
    c = 0;
    --pixels;
    features += channels;
    mask.data += mask.stride;
    input.data += input.stride;
    out += out_stride;
  }
  // Beside the products of as many pixels there are channels / 16 steps for each of these.
  MAFNET_INLINE void step() {
    if (--wait >= 0) return;
    wait = channels / 16 - 1;
    take();
  }
};

// features = mask * weight for so many pixels, while `finish` is done.
MAFNET_TARGET_AVX512 void multiply_beside(const Gate<float>& gate, const Row<float>& mask,
                                          int pixels, Block<float>& block, Finish<float> finish) {
  const int channels = gate.row;
  float* features = block.features.data();
  for (int n = 0; n < channels; n += 4 * kLanes) {
    for (int i = 0; i < pixels; i += 4) {  // few sums: finish needs registers, too
      const Matrix<float> rows{mask.data + i * mask.stride, mask.stride, 1};
      multiply_tile<4, 4, Level<SimdLevel::kAvx512>>(rows, gate.product.row(0) + n, channels,
                                                     channels, features + i * channels + n,
                                                     channels, false, finish);
    }
  }
  while (finish.take()) {
  }
}
MAFNET_TARGET_BF16 void multiply_beside(const Gate<float>& gate, const Row<BFloat16>& mask,
                                        int pixels, Block<float>& block, Finish<BFloat16> finish) {
  const int channels = gate.row;
  if (pixels > 0) pack_bf16_rows(mask.data, mask.stride, pixels, channels, block.scratch.data());
  multiply_bf16_by_vectors(block.scratch.data(), gate.product.packed(), pixels, channels, channels,
                           block.features.data(), channels, false, finish);
  while (finish.take()) {
  }
}

template <typename T>
void forward(const SpatialGateParams& p) {
  const Gate<float> gate(p, sizeof(T) == 2);
  const bool around = prepare(p.output, p.batch, int64_t{p.channels} * p.height * p.width);
  parallel_for(0, p.batch * p.height * gate.per_row, 1, [&](int64_t begin, int64_t end) {
    Block<float> even(gate), odd(gate);
    Finish<T> finish;
    for (int64_t index = begin; index < end; ++index) {
      Block<float>& block = index % 2 ? odd : even;
      block.start(p, gate, index);
      const Row<T> mask = block.template read_mask<T>(p, gate, p.channels);
      multiply_beside(gate, mask, block.count, block, finish);
      finish.features = block.features.data();
      finish.bias = gate.bias.data();
      finish.mask = mask;
      finish.input = block.template read<T>(p.input, p, gate, block.values);
      finish.out = pixel_at<T>(p.output, block.n, block.y, block.x);
      finish.out_stride = p.output.stride[3];
      finish.pixels = block.count;
      finish.channels = p.channels;
      finish.scale = gate.scale;
      finish.slope = gate.slope;
      finish.from_feature = p.from_feature;
      finish.around = around;
    }
    multiply_beside(gate, Row<T>{nullptr, 0}, 0, even, finish);
  });
}

template <typename T>
bool all_lie_as(const SpatialGateParams& p) {
  return p.dtype == kDense<T> && lies_as<T>(p.input) && lies_as<T>(p.mask) && lies_as<T>(p.output);
}

}  // namespace

bool gate_forward_beside(const SpatialGateParams& p) {
  if (p.channels == 0) return false;
  const SimdLevel level = simd_level();
  if (level >= SimdLevel::kAvx512 && p.channels % 64 == 0 && all_lie_as<float>(p)) {
    return forward<float>(p), true;
  }
  // Tile registers are for products alone.
  if (level == SimdLevel::kAvx512Bf16 && p.channels % 32 == 0 && all_lie_as<BFloat16>(p)) {
    return forward<BFloat16>(p), true;
  }
  return false;
}

#else

bool gate_forward_beside(const SpatialGateParams&) { return false; }

#endif

}  // namespace mafnet
