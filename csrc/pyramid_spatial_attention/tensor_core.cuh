// The convolutions on tensor cores: fp16 and bf16 on sm_80 and later, 16-byte groups of channels.
//
// A warp owns 16 pixels and 64 outputs. Lane 4 r + t makes channels 8 t ... 8 t + 7 of pixels r and
// r + 8, which are its share of the left operand: mma numbers the columns of A and the rows of B as
// the lanes hold them, and that both agree is all that counts. So features go from global memory
// (or from what pools, resizes, differentiates) straight into fragments. The right operand's
// columns are numbered so that a lane's sums are 8 neighbouring outputs, which go to the epilogue.
//
// Weights lie in shared memory in the lanes' order, 4 KiB for each 32 channels of a slot; where all
// fit, a block reads them once and walks over tiles of 128 pixels.
#pragma once

#include <algorithm>
#include <cstring>

#include "pyramid_spatial_attention/product.cuh"

namespace mafnet {

constexpr int kLaneChannels = 8, kStepChannels = 4 * kLaneChannels;
constexpr int kColumnTiles = kTile / 8, kStepVectors = kColumnTiles * 32;  // one for every thread
constexpr int kWarpPixels = 16, kBlockPixels = kThreads / 32 * kWarpPixels;
static_assert(kStepVectors == kThreads);
// Steps in shared memory: 64 channels under a 3 x 3 kernel are 18, which leaves room for one block
// on the smallest of these SMs (99 KiB) and for two or three on the largest.
constexpr int kMostSteps = 18;
constexpr int kMostBlocks = 2 * 132;  // of an output tile: two for each SM of the largest

DEVICE uint32_t pack(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  std::memcpy(&bits, &pair, sizeof bits);
  return bits;
}
DEVICE uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  std::memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// What a lane holds of 8 channels.
template <typename T>
DEVICE uint4 pack_lane(const float (&v)[kLaneChannels], T) {
  return make_uint4(pack(v[0], v[1], T()), pack(v[2], v[3], T()), pack(v[4], v[5], T()),
                    pack(v[6], v[7], T()));
}

// The output that column `column` of column tile `tile` stands for.
DEVICE int output_of(int tile, int column) {
  return 32 * (tile / 4) + 8 * (column / 2) + 2 * (tile % 4) + column % 2;
}

// This thread's share of the weights of one step: 8 channels of one output.
template <typename T>
DEVICE uint4 fetch_weights(const Product<T>& p, int first_output, int tap, int part,
                           int first_channel) {
  const int lane = threadIdx.x % 32;
  const int o = first_output + output_of(threadIdx.x / 32, lane / 4);
  const int c = first_channel + lane % 4 * kLaneChannels;
  const T* from = p.weight + o * p.output_stride + tap * p.tap_stride + part * p.part_stride +
                  c * p.channel_stride;
  const bool known = o < p.outputs && c < p.channels;
  float weights[kLaneChannels];
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    weights[i] = known ? to_accumulator(from[i * p.channel_stride]) : 0.0f;
  }
  return pack_lane(weights, T());
}

// sums += a step's features of pixels r and r + 8 by its weights, of which this lane's first is
// given.
template <typename T>
DEVICE void multiply_step(float (&sums)[kColumnTiles][4], const uint4& low, const uint4& high,
                          const uint4* weights, T) {
#pragma unroll
  for (int column_tile = 0; column_tile < kColumnTiles; ++column_tile) {
    const uint4 w = weights[column_tile * 32];
    mma_m16n8k16(sums[column_tile], {low.x, high.x, low.y, high.y}, {w.x, w.y}, T());
    mma_m16n8k16(sums[column_tile], {low.z, high.z, low.w, high.w}, {w.z, w.w}, T());
  }
}

// Of this lane: outputs 8 t ... of pixel r, then of r + 8, where wanted, then the same 32 outputs
// later, which may be past the last; what stores checks that.
template <typename Epilogue>
DEVICE void store_sums(const float (&sums)[kColumnTiles][4], const Place (&place)[2],
                       bool wants_low, bool wants_high, int first_output,
                       const Epilogue& epilogue) {
  float groups[4][kLaneChannels];
#pragma unroll
  for (int g = 0; g < 4; ++g) {
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      groups[g][i] = sums[g / 2 * 4 + i / 2][g % 2 * 2 + i % 2];
    }
  }
#pragma unroll 1
  for (int g = 0; g < 4; ++g) {
    const int o = first_output + g / 2 * kStepChannels + threadIdx.x % 4 * kLaneChannels;
    if (g % 2 == 0 ? wants_low : wants_high) {
      const Place at = g % 2 == 0 ? place[0] : place[1];
      epilogue.template store<Access::kVectors>(at, o, groups[0]);
    }
    shift(groups);
  }
}

// Two blocks on an SM, or one where a lane holds two parts of nine pixels: more would spill.
template <typename T, typename Features, typename Epilogue>
__global__ void __launch_bounds__(kThreads, 3 - Features::kParts)
    pyramid_conv_tensor_core_kernel(const Product<T> p, const Features features,
                                    const Epilogue epilogue) {
  constexpr int kParts = Features::kParts, kMostUnits = kMostSteps / kParts;
  DYN_SHARED(uint4, weights);
  const int lane = threadIdx.x % 32;
  const int first_output = static_cast<int>(blockIdx.y) * kTile;
  // A unit is a tap of 32 channels, with all parts of the feature.
  const int units_per_tap = (p.channels + kStepChannels - 1) / kStepChannels;
  const int units = p.taps * units_per_tap;
  const int64_t tiles = (p.pixels + kBlockPixels - 1) / kBlockPixels;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    // This lane's two pixels; those past the end repeat the last one and are not stored.
    const int64_t pixel = tile * kBlockPixels + threadIdx.x / 32 * kWarpPixels + lane / 4;
    const Place place[2] = {place_of(min(pixel, p.pixels - 1), p.height, p.width),
                            place_of(min(pixel + 8, p.pixels - 1), p.height, p.width)};
    float sums[kColumnTiles][4] = {};
    for (int first = 0; first < units; first += kMostUnits) {
      const int some = min(units - first, kMostUnits);
      if (units > kMostUnits || tile == blockIdx.x) {
        __syncthreads();  // all have left the weights that are overwritten
        for (int step = 0; step < some * kParts; ++step) {
          const int unit = first + step / kParts;
          weights[step * kStepVectors + threadIdx.x] =
              fetch_weights(p, first_output, unit / units_per_tap, step % kParts,
                            unit % units_per_tap * kStepChannels);
        }
        __syncthreads();
      }
#pragma unroll 1
      for (int at = 0; at < some; ++at) {
        const int tap = (first + at) / units_per_tap;
        const int c = (first + at) % units_per_tap * kStepChannels + lane % 4 * kLaneChannels;
        uint4 a[2][kParts];
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          float values[kParts][kLaneChannels];
          features.template load<Access::kVectors>(place[q], tap, c, values);
#pragma unroll
          for (int part = 0; part < kParts; ++part) a[q][part] = pack_lane(values[part], T());
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          multiply_step(sums, a[0][part], a[1][part],
                        weights + (at * kParts + part) * kStepVectors + lane, T());
        }
      }
    }
    store_sums(sums, place, pixel < p.pixels, pixel + 8 < p.pixels, first_output, epilogue);
  }
}

// Whether groups of 8 channels and outputs are whole; views are made for groups of kOwn.
template <typename T, typename Features, typename Epilogue>
bool suits_tensor_cores(const Product<T>& p, const Features& features, const Epilogue& epilogue) {
  return has_bfloat16_tensor_cores() && features.vectors() && epilogue.vectors() &&
         p.channels % kLaneChannels == 0 && p.outputs % kLaneChannels == 0;
}

template <typename T, typename Features, typename Epilogue>
int launch_tensor_core(const Product<T>& p, const Features& features, const Epilogue& epilogue,
                       void* stream) {
  const int64_t steps = divide_up(p.channels, kStepChannels) * p.taps * int64_t{Features::kParts};
  const size_t bytes = std::min<int64_t>(steps, kMostSteps) * kStepVectors * sizeof(uint4);
  const int64_t blocks = std::min<int64_t>(divide_up(p.pixels, kBlockPixels), kMostBlocks);
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(divide_up(p.outputs, kTile)));
  return launch(pyramid_conv_tensor_core_kernel<T, Features, Epilogue>, grid, dim3(kThreads), bytes,
                stream, p, features, epilogue);
}

}  // namespace mafnet
