// A 1 x 1 convolution, both poolings of what it gives and their 1 x 1 convolution, on tensor cores:
// the map between them, the largest of the pyramid, is never in memory.
//
// A block owns 8 x 16 pooled pixels, all outputs, and the 17 x 33 pixels of the map that they pool:
// it makes those once, in shared memory and in the dtype, 16 pixels of a warp at a time. Then a
// warp pools one row of 16 pixels into fragments. Per pooled pixel the map has 4.4 pixels instead
// of 4.
#pragma once

#include "pyramid_spatial_attention/tensor_core_patch.cuh"

namespace mafnet {

constexpr int kMapRows = 2 * kPatchRows + 1, kMapColumns = 2 * kPatchColumns + 1;
constexpr int kMapPixels = kMapRows * kMapColumns, kMapVectors = kTile / kLaneChannels;
// Channels, those of the map and outputs are at most kTile: two steps, of two parts for the second.
constexpr int kMapSteps = kTile / kStepChannels;
constexpr size_t kMapBytes =
    (3 * kMapSteps * kStepVectors + kMapPixels * kMapVectors) * sizeof(uint4);
static_assert(kMapBytes <= 99 << 10, "the smallest of these SMs");

// An epilogue: bias and activation into the map, whose pixel number place.x is.
template <typename T>
struct StoreMap {
  uint4* map;
  const T* bias;
  int channels;
  float slope;

  template <Access, int N>
  DEVICE void store(const Place& place, int c, float (&sums)[N]) const {
    add_bias(bias, channels, c, sums);
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = leaky_relu(sums[i], slope);
    map[place.x * kMapVectors + c / kLaneChannels] = pack_lane(sums, T());
  }
};

// Maximum and mean of the 3 x 3 pixels of the map from `first` on, of which `corner` is the place.
template <typename T>
DEVICE void pool_map(const uint4* map, int first, const Place& corner, int height, int width,
                     uint4 (&parts)[2]) {
  float maxima[kLaneChannels], means[kLaneChannels];
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    maxima[i] = -INFINITY;
    means[i] = 0;
  }
#pragma unroll 1
  for (int row = 0; row < 3; ++row) {
#pragma unroll
    for (int column = 0; column < 3; ++column) {
      if (!is_inside({corner.n, corner.y + row, corner.x + column}, height, width)) continue;
      T some[kLaneChannels];
      const uint4 bits = map[(first + row * kMapColumns + column) * kMapVectors];
      std::memcpy(some, &bits, sizeof bits);
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) {
        const float v = to_accumulator(some[i]);
        maxima[i] = larger(maxima[i], v);
        means[i] += v;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) means[i] /= 9;
  parts[0] = pack_lane(maxima, T());
  parts[1] = pack_lane(means, T());
}

template <typename T, typename Epilogue>
__global__ void __launch_bounds__(kThreads, 2)
    pyramid_conv_pool_conv_kernel(const Product<T> first, const T* first_bias, float slope,
                                  const Pixels<T> input, const Product<T> second,
                                  const Epilogue epilogue, int patches_down, int patches_across) {
  DYN_SHARED(uint4, weights);
  uint4* second_weights = weights + kMapSteps * kStepVectors;
  uint4* map = second_weights + 2 * kMapSteps * kStepVectors;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Place number = place_of(blockIdx.x, patches_down, patches_across);
  const int first_y = number.y * kPatchRows, first_x = number.x * kPatchColumns;
#pragma unroll 1
  for (int step = 0; step < kMapSteps; ++step) {
    const int c = step * kStepChannels;
    weights[step * kStepVectors + threadIdx.x] = fetch_weights(first, 0, 0, 0, c);
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      second_weights[(2 * step + part) * kStepVectors + threadIdx.x] =
          fetch_weights(second, 0, 0, part, c);
    }
  }
  __syncthreads();

  const StoreMap<T> store{map, first_bias, first.outputs, slope};
#pragma unroll 1
  for (int from = warp * kWarpPixels; from < kMapPixels; from += kBlockPixels) {
    Place place[2], at[2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int pixel = from + lane / 4 + 8 * q;
      place[q] = {number.n, 2 * first_y - 1 + pixel / kMapColumns,
                  2 * first_x - 1 + pixel % kMapColumns};
      at[q] = {0, 0, pixel};
    }
    float sums[kColumnTiles][4] = {};
#pragma unroll 1
    for (int step = 0; step < kMapSteps; ++step) {
      uint4 a[2];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        float values[1][kLaneChannels];
        input.template load<Access::kVectors>(
            place[q], 0, step * kStepChannels + lane % 4 * kLaneChannels, values);
        a[q] = pack_lane(values[0], T());
      }
      multiply_step(sums, a[0], a[1], weights + step * kStepVectors + lane, T());
    }
    store_sums(sums, at, at[0].x < kMapPixels, at[1].x < kMapPixels, 0, store);
  }
  __syncthreads();

  float sums[kColumnTiles][4] = {};
#pragma unroll 1
  for (int step = 0; step < kMapSteps; ++step) {
    uint4 low[2] = {}, high[2] = {};
#pragma unroll 1
    for (int column = lane / 4; column < kPatchColumns; column += 8) {
      const Place corner{number.n, 2 * (first_y + warp) - 1, 2 * (first_x + column) - 1};
#pragma unroll
      for (int part = 0; part < 2; ++part) low[part] = high[part];  // the second time
      pool_map<T>(map + step * 4 + lane % 4, 2 * warp * kMapColumns + 2 * column, corner,
                  input.height, input.width, high);
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      multiply_step(sums, low[part], high[part],
                    second_weights + (2 * step + part) * kStepVectors + lane, T());
    }
  }
  const int y = first_y + warp, x = first_x + lane / 4;
  const Place place[2] = {{number.n, y, x}, {number.n, y, x + 8}};
  store_sums(sums, place, is_inside(place[0], second.height, second.width),
             is_inside(place[1], second.height, second.width), 0, epilogue);
}

template <typename T, typename Epilogue>
int launch_conv_pool_conv(const Product<T>& first, const T* first_bias, float slope,
                          const Pixels<T>& input, const Product<T>& second,
                          const Epilogue& epilogue, void* stream) {
  if (second.pixels == 0) return 0;
  const int64_t down = divide_up(second.height, kPatchRows);
  const int64_t across = divide_up(second.width, kPatchColumns);
  const int64_t images = second.pixels / second.height / second.width;
  return launch(pyramid_conv_pool_conv_kernel<T, Epilogue>,
                dim3(static_cast<unsigned>(images * down * across)), dim3(kThreads), kMapBytes,
                stream, first, first_bias, slope, input, second, epilogue, static_cast<int>(down),
                static_cast<int>(across));
}

}  // namespace mafnet
