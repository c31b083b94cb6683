// The convolution of convolution_patch.cuh on tensor cores.
//
// A block owns 8 x 16 pixels and 64 outputs, a warp one row of them. 32 channels at a time, the
// features of the pixels and of those around them go to shared memory in the dtype, beside the
// weights of all taps; the lanes take what tensor_core.cuh says from there. Per output pixel the
// features of 1.4 pixels are made.
#pragma once

#include "pyramid_spatial_attention/tensor_core.cuh"

namespace mafnet {

constexpr int kPatchRows = kThreads / 32, kPatchColumns = kWarpPixels;  // without what is around
constexpr int kPatchPixels = (kPatchRows + 2) * (kPatchColumns + 2);

// In shared memory: for each tap and part the weights of a step, for each part the patch, whose
// pixels have 4 vectors each.
template <typename Features>
constexpr int kPatchWeights = 9 * Features::kParts * kStepVectors;
template <typename Features>
constexpr size_t kPatchBytes =
    (kPatchWeights<Features> + Features::kParts * kPatchPixels * 4) * sizeof(uint4);
static_assert(kPatchBytes<PooledMap<float>> <= 99 << 10, "the smallest of these SMs");

template <typename T, typename Features, typename Epilogue>
__global__ void __launch_bounds__(kThreads, 2)
    pyramid_conv_patch_tensor_core_kernel(const Product<T> p, const Features features,
                                          const Epilogue epilogue, int patches_down,
                                          int patches_across) {
  constexpr int kParts = Features::kParts, kCentre = 4;
  DYN_SHARED(uint4, weights);
  uint4* patch = weights + kPatchWeights<Features>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_output = static_cast<int>(blockIdx.y) * kTile;
  const Place number = place_of(blockIdx.x, patches_down, patches_across);
  const int first_y = number.y * kPatchRows, first_x = number.x * kPatchColumns;
  float sums[kColumnTiles][4] = {};
  for (int first = 0; first < p.channels; first += kStepChannels) {
    __syncthreads();  // all have left what is overwritten
    for (int step = 0; step < 9 * kParts; ++step) {
      weights[step * kStepVectors + threadIdx.x] =
          fetch_weights(p, first_output, step / kParts, step % kParts, first);
    }
    for (int i = threadIdx.x; i < kPatchPixels * 4; i += kThreads) {
      const int pixel = i / 4;
      const Place place{number.n, first_y + pixel / (kPatchColumns + 2) - 1,
                        first_x + pixel % (kPatchColumns + 2) - 1};
      float values[kParts][kLaneChannels];
      features.template load<Access::kVectors>(place, kCentre, first + i % 4 * kLaneChannels,
                                               values);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        patch[part * kPatchPixels * 4 + i] = pack_lane(values[part], T());
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int tap = 0; tap < 9; ++tap) {
      const int pixel = (warp + tap / 3) * (kPatchColumns + 2) + lane / 4 + tap % 3;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint4* from = patch + (part * kPatchPixels + pixel) * 4 + lane % 4;
        multiply_step(sums, from[0], from[8 * 4],
                      weights + (tap * kParts + part) * kStepVectors + lane, T());
      }
    }
  }
  const int y = first_y + warp, x = first_x + lane / 4;
  const Place place[2] = {{number.n, y, x}, {number.n, y, x + 8}};
  store_sums(sums, place, is_inside(place[0], p.height, p.width),
             is_inside(place[1], p.height, p.width), first_output, epilogue);
}

template <typename T, typename Features, typename Epilogue>
int launch_tensor_core_patch(const Product<T>& p, const Features& features,
                             const Epilogue& epilogue, void* stream) {
  const int64_t down = divide_up(p.height, kPatchRows), across = divide_up(p.width, kPatchColumns);
  const int64_t images = p.pixels / p.height / p.width;
  const dim3 grid(static_cast<unsigned>(images * down * across),
                  static_cast<unsigned>(divide_up(p.outputs, kTile)));
  return launch(pyramid_conv_patch_tensor_core_kernel<T, Features, Epilogue>, grid, dim3(kThreads),
                kPatchBytes<Features>, stream, p, features, epilogue, static_cast<int>(down),
                static_cast<int>(across));
}

}  // namespace mafnet
